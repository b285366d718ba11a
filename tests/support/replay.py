"""Agent loops whose responses no engine generates: the same in every run that asks the same questions."""

from __future__ import annotations

import hashlib
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register


class _Replay(AgentLoopBase):  # type: ignore[misc]  # verl carries no types
    async def _output(self, mask: list[int] | None, **kwargs: Any) -> AgentLoopOutput:
        """Four to seven characters that depend on the question and the number of the response alone."""
        question = kwargs["raw_prompt"][0]["content"]
        digest = hashlib.sha256(f"{question}{kwargs['session_id']}".encode()).digest()
        text = "".join(f"{byte % 10}" if byte % 3 else "," for byte in digest[: 4 + digest[-1] % 4])
        response_ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        step = int(kwargs["global_steps"])
        return AgentLoopOutput(
            prompt_ids=await self.ct_build_initial_tokens(list(kwargs["raw_prompt"])),
            response_ids=response_ids,
            response_mask=[1] * len(response_ids) if mask is None else mask[: len(response_ids)],
            response_logprobs=[-1.0 - position for position in range(len(response_ids))],
            num_turns=2,
            metrics={},
            extra_fields={"min_global_steps": step, "max_global_steps": step, "turn_scores": [], "tool_rewards": []},
        )


@register("replay")
class ReplayAgentLoop(_Replay):
    """One turn."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """All of it learned."""
        return await self._output(None, **kwargs)


@register("replay_turns")
class ReplayTurnsAgentLoop(_Replay):
    """The student's two tokens, a tool's two, and the student's again."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """What the tool said is attended to and not learned."""
        return await self._output([1, 1, 0, 0, 1, 1, 1, 1], **kwargs)
