"""Off-policy responses: the data's own answers, tokenised, and the agent loop that hands them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register

from trainer.errors import DatasetError

AGENT_NAME = "gkd_ground_truth"
"""`agent_name` of off-policy rows."""
ANSWER_IDS = "gkd_answer_ids"
"""Their column of response tokens."""


@register(AGENT_NAME)
class GroundTruthAgentLoop(AgentLoopBase):  # type: ignore[misc]  # verl carries no types
    """Generates nothing: the response is the row's answer."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """The prompt as the student would see it, then the answer, all of it learned."""
        response_ids = list(kwargs[ANSWER_IDS])
        step = int(kwargs["global_steps"])
        return AgentLoopOutput(
            prompt_ids=await self.ct_build_initial_tokens(list(kwargs["raw_prompt"])),
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            num_turns=2,
            metrics={},
            # verl's bookkeeping wants the weights' version; nothing here is stale
            extra_fields={"min_global_steps": step, "max_global_steps": step, "turn_scores": [], "tool_rewards": []},
        )


def tokenize_answers(answers: Sequence[str], tokenizer: Any, *, max_tokens: int, truncation: str) -> list[list[int]]:
    """Token ids of each answer with EOS at its end.

    Args:
        answers: texts, in the order of the rows.
        tokenizer: the student's, of Hugging Face.
        max_tokens: `data.max_response_length`.
        truncation: `data.truncation`: an overlong answer is an error, or loses its end (right), its beginning (left)
            or its middle.

    Raises:
        DatasetError: an answer is overlong under `error`, or the tokenizer has no EOS.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DatasetError("the student's tokenizer has no EOS token, so off-policy answers can't be ended")
    if not answers:
        return []
    encoded = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    return [
        _fit([*ids, eos] if not ids or ids[-1] != eos else list(ids), max_tokens, truncation, row)
        for row, ids in enumerate(encoded)
    ]


def _fit(ids: list[int], limit: int, truncation: str, row: int) -> list[int]:
    if len(ids) <= limit:
        return ids
    match truncation:
        case "right":
            return ids[:limit]
        case "left":
            return ids[-limit:]
        case "middle":
            head = limit // 2
            return ids[:head] + ids[len(ids) - (limit - head) :]
        case _:
            raise DatasetError(
                f"the off-policy answer of row {row} has {len(ids)} tokens with EOS, more than "
                f"data.max_response_length={limit}; raise it, or set data.truncation to right, left or middle"
            )
