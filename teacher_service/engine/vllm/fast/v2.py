"""The fast route on vLLM's V2 model runner.

It takes the place of one attribute of the runner, `prompt_logprobs_worker`, by a subclass of vLLM's own class. Answers
stay on the device: vLLM copies them to main memory on a stream of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from teacher_service.engine.vllm.fast.parameters import Parameters
from teacher_service.engine.vllm.fast.scorer import Answer, Rows, RowScorer, index_of, rows_of_step
from teacher_service.engine.vllm.fast.v1 import as_vllm


@dataclass(slots=True)
class _Request:
    """A request of this route, from its admission to its answer."""

    parameters: Parameters
    num_logprobs: int
    answer: Answer | None = None


class ResponseRowsWorker(PromptLogprobsWorker):  # type: ignore[misc] # vllm carries no types
    """Requests that carry `Parameters` are scored here, all others by vLLM's own code."""

    def __init__(self, original: PromptLogprobsWorker, score: RowScorer) -> None:
        self.__dict__.update(vars(original))  # its constructor differs by version
        self._score = score
        self._requests: dict[str, _Request] = {}

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        """Take a request in; also one that is resumed after a preemption, which starts anew."""
        super().add_request(req_id, req_idx, sampling_params)
        parameters = Parameters.unpack(sampling_params.extra_args)
        if parameters is None or sampling_params.prompt_logprobs is None:
            return
        # vLLM's own code passes over it; whoever gets this index next sets the flag again
        self.uses_prompt_logprobs[req_idx] = False
        self.in_progress_prompt_logprobs.pop(req_id, None)
        self._requests[req_id] = _Request(parameters, sampling_params.prompt_logprobs)

    def remove_request(self, req_id: str) -> None:
        """Drop a request that is finished, aborted or preempted."""
        super().remove_request(req_id)
        self._requests.pop(req_id, None)

    def compute_prompt_logprobs(
        self,
        logits_fn: Any,
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Tensor,
        num_computed_tokens: Tensor,
        prompt_lens: np.ndarray,
    ) -> dict[str, LogprobsTensors]:
        """The answers of the requests whose prompts are complete, by request id."""
        answers: dict[str, LogprobsTensors] = super().compute_prompt_logprobs(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        rows: list[Rows] = []
        states: list[int] = []
        for i, req_id in enumerate(input_batch.req_ids):
            request = self._requests.get(req_id)
            if request is None:
                continue
            state = int(input_batch.idx_mapping_np[i])
            prompt_len = int(prompt_lens[state])
            computed = int(input_batch.num_computed_prefill_tokens_np[i])
            num_tokens = int(input_batch.num_scheduled_tokens[i])
            if computed >= prompt_len or prompt_len < int(input_batch.prefill_len_np[i]):
                continue  # it generates, or was resumed after its answer was sent
            if request.answer is None:
                request.answer = Answer.empty(
                    request.parameters, request.num_logprobs, prompt_len=prompt_len, device=hidden_states.device
                )
            here = rows_of_step(
                request.answer,
                prompt_len=prompt_len,
                computed=computed,
                num_tokens=num_tokens,
                offset=int(input_batch.query_start_loc_np[i]),
            )
            if here is not None:
                rows.append(here)
                states.append(state)
            if computed + num_tokens >= prompt_len:
                answers[req_id] = as_vllm(request.answer)
                del self._requests[req_id]
        if rows:
            self._score(hidden_states, rows, *_locate(rows, states, all_token_ids))
        return answers


def _locate(rows: list[Rows], states: list[int], all_token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows lie in the hidden states, and the tokens that they predict, both on the device."""
    state_at = np.repeat(np.array(states), [len(one) for one in rows])
    token_at = np.concatenate([np.arange(one.first_token, one.first_token + len(one)) for one in rows])
    # one transfer for the three
    at = torch.from_numpy(np.stack([index_of(rows), state_at, token_at])).to(all_token_ids.device, non_blocking=True)
    return at[0], all_token_ids[at[1], at[2]].to(torch.int64)


def install(runner: Any, score: RowScorer) -> None:
    """Score by this route from now on. Only the last rank of a pipeline has prompt logprobs."""
    original = runner.prompt_logprobs_worker
    if original is not None:
        runner.prompt_logprobs_worker = ResponseRowsWorker(original, score)
