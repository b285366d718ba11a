"""Responses of long-tailed lengths, and an agent-loop worker that asks the teacher when all are generated."""

from __future__ import annotations

import asyncio
import hashlib
import math
from typing import Any

import ray
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

from trainer.types import TeacherScores
from trainer.verl_adapter.agent_loop import GKDAgentLoopWorker

SHORTEST = 16


def response_tokens(text: str, longest: int) -> int:
    """A length that depends on the text alone: log-uniform, so that half of them are below a quarter of the range."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
    return round(SHORTEST * math.exp(share * math.log(longest / SHORTEST)))


@register("long_tailed")
class LongTailedAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]  # verl carries no types
    """One turn of exactly so many tokens, whatever the student writes."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """As verl's, for a length of its own."""
        question = f"{kwargs['raw_prompt'][0]['content']}{kwargs['session_id']}"
        length = response_tokens(question, self.response_length)
        return await super().run(
            {**sampling_params, "max_tokens": length, "min_tokens": length, "ignore_eos": True}, **kwargs
        )


class SerialWorker(GKDAgentLoopWorker):
    """Asks for all responses of a batch at once, when the last one is complete."""

    _num_missing = 0
    _all_there: asyncio.Event

    async def generate_sequences(self, batch: TensorDict) -> None:
        """verl's, which also opens a new batch."""
        self._num_missing = len(batch) * int(self.config.actor_rollout_ref.rollout.n)
        self._all_there = asyncio.Event()
        await super().generate_sequences(batch)

    async def _score_output(self, output: AgentLoopOutput, kwargs: dict[str, Any]) -> TeacherScores | None:
        self._num_missing -= 1
        if not self._num_missing:
            self._all_there.set()
        await self._all_there.wait()
        return await super()._score_output(output, kwargs)


class SerialManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's manager over the worker above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(SerialWorker)
