"""The fast route on vLLM's V1 model runner.

It takes the place of one private method of the runner, `_get_prompt_logprobs_dict`, on that runner alone. vLLM's own
scores each request by itself, all of its prompt, as float32 logprobs of all rows at once, and ranks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors

from teacher_service.engine.vllm.fast.parameters import Parameters
from teacher_service.engine.vllm.fast.scorer import Answer, Rows, RowScorer, index_of, rows_of_step

OriginalMethod = Callable[[Tensor, Mapping[str, int]], dict[str, Any]]


class V1Scorer:
    """Called by the runner after each step, instead of its own method."""

    def __init__(self, runner: Any, score: RowScorer) -> None:
        """A scorer for one runner.

        Args:
            runner: vLLM's `GPUModelRunner`, or its form for a CPU; its own method serves requests without parameters.
            score: scores rows.
        """
        self._runner = runner
        self._score = score
        self._original: OriginalMethod = runner._get_prompt_logprobs_dict

    def __call__(self, hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> dict[str, Any]:
        """The answers of the requests whose prompts are complete, by request id."""
        runner = self._runner
        asked: dict[str, int] = runner.num_prompt_logprobs
        if not asked:
            return {}
        parameters = {
            key: found
            for key in asked
            if (found := Parameters.unpack(runner.requests[key].sampling_params.extra_args)) is not None
        }
        ours = {key: asked[key] for key in parameters}
        others = {key: k for key, k in asked.items() if key not in ours}
        answers: dict[str, Any] = {}
        if others:
            runner.num_prompt_logprobs = others
            answers |= self._original(hidden_states, num_scheduled_tokens)
        complete: dict[str, Answer] = {}
        rows: list[Rows] = []
        targets: list[np.ndarray] = []
        for key in list(ours):
            if (num_tokens := num_scheduled_tokens.get(key)) is None:
                continue  # preempted before its prompt was complete
            request = runner.requests[key]
            prompt_len, computed = len(request.prompt_token_ids), request.num_computed_tokens
            answer = self._answer(request, parameters[key], ours[key], prompt_len, hidden_states.device)
            index = runner.input_batch.req_id_to_index[key]
            here = rows_of_step(
                answer,
                prompt_len=prompt_len,
                computed=computed,
                num_tokens=num_tokens,
                offset=runner.query_start_loc.np[index].item(),
            )
            if here is not None:
                rows.append(here)
                targets.append(runner.input_batch.token_ids_cpu[index, here.first_token : here.first_token + len(here)])
            if computed + num_tokens >= prompt_len:
                complete[key] = answer
                request.in_progress_prompt_logprobs_cpu = None
                del ours[key]
        runner.num_prompt_logprobs = ours | others
        if rows:
            # one transfer for both
            at = np.stack([index_of(rows), np.concatenate(targets)])
            hidden_at, target_ids = torch.from_numpy(at).to(hidden_states.device, non_blocking=True)
            self._score(hidden_states, rows, hidden_at, target_ids)
        return answers | self._in_main_memory(complete)

    @staticmethod
    def _answer(
        request: Any, parameters: Parameters, num_logprobs: int, prompt_len: int, device: torch.device
    ) -> Answer:
        """A request's answer so far, kept where vLLM keeps its own."""
        answer: Answer | None = request.in_progress_prompt_logprobs_cpu
        if answer is None:
            answer = Answer.empty(parameters, num_logprobs, prompt_len=prompt_len, device=device)
            request.in_progress_prompt_logprobs_cpu = answer
        return answer

    def _in_main_memory(self, complete: Mapping[str, Answer]) -> dict[str, Any]:
        if not complete:
            return {}
        answers = {key: as_vllm(answer).to_cpu_nonblocking() for key, answer in complete.items()}
        self._runner._sync_device()
        return answers


def as_vllm(answer: Answer) -> LogprobsTensors:
    """An answer in the form in which vLLM passes prompt logprobs on; it has no ranks."""
    ranks = torch.empty(0, dtype=torch.int32, device=answer.columns.device)
    return LogprobsTensors(answer.topk_ids, answer.columns, ranks)


def install(runner: Any, score: RowScorer) -> None:
    """Score by this route from now on."""
    runner._get_prompt_logprobs_dict = V1Scorer(runner, score)
