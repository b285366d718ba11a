"""In vLLM's worker: score the response rows of a step, all requests together, and nothing else.

It takes the place of one private method of vLLM's V1 model runner, `_get_prompt_logprobs_dict`, on that runner alone;
`probe.py` says for which versions. vLLM's own scores each request by itself, all of its prompt, as float32 logprobs of
all rows at once, and ranks them.

Legend: P tokens of a request, S = P - score_start scored ones, K top-k entries, C candidates, R rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from teacher_service.engine.vllm.adapter import detach_from_logits
from teacher_service.engine.vllm.fast.kernel import Asked, Scored, concatenate, num_lm_head_rows, score_rows
from teacher_service.engine.vllm.fast.parameters import Parameters
from teacher_service.engine.vllm.fast.probe import ProbeError, check_runner

OriginalMethod = Callable[[Tensor, Mapping[str, int]], dict[str, Any]]


class ScoringExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`; its methods are called by `collective_rpc`."""

    model_runner: Any

    def free_device_bytes(self) -> int | None:
        """Memory left on the device; None where the model computes in main memory."""
        device = self.model_runner.device
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None

    def detach_adapter_from_logits(self) -> None:
        """See `adapter.detach_from_logits`."""
        detach_from_logits(self.model_runner.model)

    def install_scoring(self) -> str | None:
        """Score by this route from now on; returns why not, where this version's runner is another than expected."""
        runner = self.model_runner
        try:
            check_runner(runner)
        except ProbeError as exc:
            return str(exc)
        runner._get_prompt_logprobs_dict = ResponseScorer(runner, runner._get_prompt_logprobs_dict)
        return None


class _Answer(NamedTuple):
    """What a request's rows are written to as its chunks come; NaN where nothing came."""

    topk_ids: Tensor
    """`[S, K]` int32."""
    columns: Tensor
    """`[S, num_columns]` float32."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one request that this step computes."""

    first: int
    """Index of the first in the step's hidden states."""
    sampled: list[int]
    """The tokens that they predict."""
    parameters: Parameters
    num_logprobs: int
    answer: _Answer
    at: slice
    """Where they lie in the answer."""


class ResponseScorer:
    """Called by the runner after each step, instead of its own method."""

    def __init__(self, runner: Any, original: OriginalMethod) -> None:
        """A scorer for one runner.

        Args:
            runner: vLLM's `GPUModelRunner`, or its form for a CPU.
            original: the method whose place this takes; it serves requests without parameters.
        """
        self._runner = runner
        self._original = original

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
        rows: list[_Rows] = []
        for key in list(ours):
            if (num_tokens := num_scheduled_tokens.get(key)) is None:
                continue  # preempted before its prompt was complete
            answer, here, complete = self._rows(key, ours[key], parameters[key], num_tokens)
            if here is not None:
                rows.append(here)
            if complete:
                answers[key] = _as_vllm(answer)
                del ours[key]
                runner.requests[key].in_progress_prompt_logprobs_cpu = None
        runner.num_prompt_logprobs = ours | others
        if rows:
            self._score(hidden_states, rows)
        return answers

    def _rows(
        self, key: str, num_logprobs: int, parameters: Parameters, num_tokens: int
    ) -> tuple[_Answer, _Rows | None, bool]:
        """A request's answer so far, its rows of this step, and whether its prompt ends with it."""
        runner = self._runner
        request = runner.requests[key]
        token_ids = request.prompt_token_ids
        # the row that predicts token i is that of token i - 1
        first, end = parameters.score_start - 1, len(token_ids) - 1
        answer: _Answer | None = request.in_progress_prompt_logprobs_cpu
        if answer is None:
            answer = _Answer(
                torch.full((end - first, num_logprobs), -1, dtype=torch.int32),
                torch.full((end - first, parameters.num_columns(num_logprobs)), torch.nan),
            )
            request.in_progress_prompt_logprobs_cpu = answer
        computed = request.num_computed_tokens
        start, stop = max(first, computed), min(end, computed + num_tokens)
        complete = computed + num_tokens >= len(token_ids)
        if start >= stop:
            return answer, None, complete
        offset = runner.query_start_loc.np[runner.input_batch.req_id_to_index[key]].item()
        rows = _Rows(
            first=offset + start - computed,
            sampled=token_ids[start + 1 : stop + 1],
            parameters=parameters,
            num_logprobs=num_logprobs,
            answer=answer,
            at=slice(start - first, stop - first),
        )
        return answer, rows, complete

    def _score(self, hidden_states: Tensor, rows: list[_Rows]) -> None:
        """Score all rows of the step together, as many at a time as the LM head may make logits of."""
        device = hidden_states.device
        index = torch.cat([torch.arange(one.first, one.first + len(one.sampled)) for one in rows]).to(device)
        asked = _asked(rows, device)
        vocab_rows = self._runner.model_config.get_vocab_size()
        size = num_lm_head_rows(device.type, vocab_rows=vocab_rows, itemsize=hidden_states.element_size())
        parts: list[Scored] = []
        from vllm.distributed.parallel_state import get_tp_group

        answers = get_tp_group().is_first_rank
        for start in range(0, index.shape[0], size):
            block = slice(start, start + size)
            logits = self._runner.model.compute_logits(hidden_states[index[block]])
            if answers:  # the other ranks are here for the LM head, and nobody reads what they return
                parts.append(score_rows(logits, _slice(asked, block)))
        if not parts:
            return
        done = concatenate([one.cpu() for one in parts])
        start = 0
        for one in rows:
            stop = start + len(one.sampled)
            _write(one, done, slice(start, stop))
            start = stop


def _asked(rows: list[_Rows], device: torch.device) -> Asked:
    lengths = torch.tensor([len(one.sampled) for one in rows])
    temperatures = torch.tensor([one.parameters.temperature for one in rows])
    num_candidates = max(one.parameters.num_candidates for one in rows)
    candidates = None
    if num_candidates:
        candidates = torch.zeros((int(lengths.sum()), num_candidates), dtype=torch.int64)
        start = 0
        for one in rows:
            if one.parameters.candidates is not None:
                chosen = torch.from_numpy(one.parameters.candidates[one.at].astype(np.int64))
                candidates[start : start + len(one.sampled), : one.parameters.num_candidates] = chosen
            start += len(one.sampled)
        candidates = candidates.to(device)
    return Asked(
        num_logprobs=max(one.num_logprobs for one in rows),
        temperatures=None if bool((temperatures == 1).all()) else temperatures.repeat_interleave(lengths).to(device),
        sampled=torch.tensor([token for one in rows for token in one.sampled], dtype=torch.int64).to(device),
        entropy=any(one.parameters.entropy for one in rows),
        candidates=candidates,
    )


def _slice(asked: Asked, block: slice) -> Asked:
    return asked._replace(
        temperatures=None if asked.temperatures is None else asked.temperatures[block],
        sampled=asked.sampled[block],
        candidates=None if asked.candidates is None else asked.candidates[block],
    )


def _write(rows: _Rows, scored: Scored, at: slice) -> None:
    """One request's part, in the columns of `Parameters.num_columns`."""
    k, into = rows.num_logprobs, rows.answer.columns[rows.at]
    rows.answer.topk_ids[rows.at] = scored.topk_ids[at, :k]
    into[:, 0] = scored.sampled[at]
    into[:, 1 : k + 1] = scored.topk[at, :k]
    tail = scored.log_tail[at]
    if k < scored.topk.shape[1]:  # another request of the step asked for more: what it got is part of this tail
        tail = torch.logaddexp(tail, scored.topk[at, k:].logsumexp(-1))
    into[:, k + 1] = tail
    column = k + 2
    if rows.parameters.entropy and scored.entropy is not None:
        into[:, column] = scored.entropy[at]
        column += 1
    if scored.candidates is not None and rows.parameters.num_candidates:
        into[:, column:] = scored.candidates[at, : rows.parameters.num_candidates]


def _as_vllm(answer: _Answer) -> Any:
    from vllm.v1.outputs import LogprobsTensors

    return LogprobsTensors(answer.topk_ids, answer.columns, torch.empty(0, dtype=torch.int32))
