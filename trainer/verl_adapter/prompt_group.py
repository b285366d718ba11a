"""The responses of one prompt, while they are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping


class PromptGroup:
    """Collects one reward per response; a failed response counts too, so that its siblings never wait for it."""

    def __init__(self, num_responses: int) -> None:
        self.num_responses = num_responses
        self._open = set(range(num_responses))
        self._rewards: dict[int, float] = {}
        self._complete = asyncio.Event()

    def settle(self, response: int, reward: float | None = None) -> None:
        """Record a response's reward, or, with None, that it will have none. Only the first call counts."""
        if response not in self._open:
            return
        self._open.remove(response)
        if reward is not None:
            self._rewards[response] = reward
        if not self._open:
            self._complete.set()

    async def rewards(self) -> Mapping[int, float]:
        """The rewards by response, once every response has one or has failed."""
        await self._complete.wait()
        return self._rewards
