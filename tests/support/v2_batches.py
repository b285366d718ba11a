"""Drives vLLM's V2 prompt-logprobs worker by hand: vLLM's own classes, random hidden states, and a random LM head.

Importing it imports vLLM's V2 runner, which needs Triton and, on a CPU, `vllm.v1.worker.cpu.shm` imported before. Each
step is checked at once: the first fault is shown.

Legend: P tokens of a prompt, S = P - score_start scored ones, K top-k entries, C candidates, T tokens of a step,
H hidden size, V vocabulary rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu.states import RequestState

from protos.arrays import Int32Array
from teacher_service.engine.vllm.fast.kernel import score_rows
from teacher_service.engine.vllm.fast.parameters import Parameters
from teacher_service.engine.vllm.fast.scorer import RowScorer, score_from_logits

MAX_REQUESTS, MAX_LEN, STEP_TOKENS = 5, 128, 192
H, V = 16, 61
TOLERANCE = 5e-5
NUM_PADDED = 3
"""Rows at the end of a step that belong to no request, as a CUDA graph adds them."""
LARGE_VOCABULARY = 1 << 40
"""Of so many rows the LM head makes logits for `kernel.MIN_LM_HEAD_ROWS` rows at once: a large step has several
blocks."""
CPU = torch.device("cpu")

Install = Callable[[Any, RowScorer], None]
"""`v2.install`, or a mutated one."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, and the hidden states that a model would make of it."""

    id: str
    prompt: Int32Array
    """`[P]`, P >= 2."""
    num_logprobs: int | None
    """K; None: a request that only generates."""
    parameters: Parameters | None
    """None: vLLM's own code answers."""
    outputs: Int32Array
    """The tokens that it generates, at least one."""
    hidden: Tensor
    """`[P + len(outputs), H]`."""

    @property
    def sampling(self) -> SamplingParams:
        """As vLLM's worker gets it."""
        packed = None if self.parameters is None else self.parameters.pack()
        return SamplingParams(prompt_logprobs=self.num_logprobs, max_tokens=len(self.outputs), extra_args=packed)


@dataclass(eq=False)
class Progress:
    """How far a request has come."""

    request: Request
    computed: int = 0
    """Tokens whose hidden states are there."""
    num_outputs: int = 0
    is_answered: bool = False

    @property
    def tokens(self) -> Int32Array:
        """The prompt and what was generated so far."""
        return np.concatenate([self.request.prompt, self.request.outputs[: self.num_outputs]])

    @property
    def num_left(self) -> int:
        """Tokens that a step could compute now."""
        return len(self.request.prompt) + self.num_outputs - self.computed

    @property
    def num_scored(self) -> int:
        """Scored rows that are computed, where this project's code scores them."""
        if self.request.parameters is None:
            return 0
        return max(0, min(self.computed, len(self.request.prompt) - 1) - self.request.parameters.score_start + 1)

    @property
    def is_done(self) -> bool:
        """Whether all is generated."""
        return self.num_outputs == len(self.request.outputs)


class Part(NamedTuple):
    """What a step computes of a request."""

    progress: Progress
    num_tokens: int

    @property
    def request(self) -> Request:
        """Whose part it is."""
        return self.progress.request

    @property
    def answers(self) -> bool:
        """Whether the request's answer is due after this step."""
        prompt_len, computed = len(self.request.prompt), self.progress.computed
        asks = self.request.num_logprobs is not None and not self.progress.is_answered
        return asks and computed < prompt_len <= computed + self.num_tokens

    @property
    def num_scored(self) -> int:
        """Rows that this project's code must score in this step."""
        if self.progress.is_answered:
            return 0
        after = dataclasses.replace(self.progress, computed=self.progress.computed + self.num_tokens)
        return after.num_scored - self.progress.num_scored


class Driver:
    """A runner with the worker under test, and vLLM's own worker alone with the requests that are its own."""

    def __init__(self, install: Install, head_HV: Tensor) -> None:
        self._head_HV = head_HV
        self._states = RequestState(MAX_REQUESTS, MAX_LEN, STEP_TOKENS, 0, V, CPU)
        self._buffers = InputBuffers(MAX_REQUESTS, STEP_TOKENS, CPU)
        runner = SimpleNamespace(prompt_logprobs_worker=PromptLogprobsWorker(MAX_REQUESTS, CPU))
        score_block = score_from_logits(self._scored_logits, score_rows, answers=True)
        install(runner, RowScorer(score_block, vocab_rows=LARGE_VOCABULARY))
        self._worker = runner.prompt_logprobs_worker
        self._alone = PromptLogprobsWorker(MAX_REQUESTS, CPU)
        self._num_scored = 0
        self.num_blocks = 0
        """Blocks of rows that the last step scored."""

    @property
    def has_room(self) -> bool:
        """Whether a request can be admitted."""
        return bool(self._states.free_indices)

    def admit(self, progress: Progress, *, hit: int) -> int:
        """Take a request in, new or after a preemption, with `hit` tokens from the cache; returns its index."""
        request, tokens = progress.request, progress.tokens
        progress.computed = hit
        self._states.add_request(request.id, len(request.prompt), tokens.tolist(), hit, len(request.outputs))
        self._states.apply_staged_writes()
        index = int(self._states.req_id_to_index[request.id])
        self._worker.add_request(request.id, index, request.sampling)
        if request.parameters is None:
            self._alone.add_request(request.id, index, request.sampling)
        return index

    def remove(self, progress: Progress) -> None:
        """Finished, aborted or preempted: for the worker it is the same."""
        key = progress.request.id
        self._states.remove_request(key)
        self._worker.remove_request(key)
        self._alone.remove_request(key)
        assert not [name for name, held in _dictionaries(self._worker).items() if key in held], f"{key} is kept"

    def assert_empty(self) -> None:
        """Nothing of any request is left."""
        left = {name: held for name, held in _dictionaries(self._worker).items() if held}
        assert not left, left

    def step(self, parts: Sequence[Part]) -> None:
        """Compute `parts`, at least one, and check what is answered."""
        self._num_scored = self.num_blocks = 0
        with torch.inference_mode():
            answers = self._compute(self._worker, parts)
            own = [part for part in parts if part.request.parameters is None]
            alone = self._compute(self._alone, own) if own else {}
        due = {part.request.id for part in parts if part.answers}
        assert answers.keys() == due, f"answered: {sorted(answers)}, due in this step: {sorted(due)}"
        for part in parts:
            if part.answers:
                self._check(part.request, answers, alone)
        num_due = sum(part.num_scored for part in parts)
        assert self._num_scored == num_due, f"the LM head made logits of {self._num_scored} rows, not of {num_due}"
        for part in parts:
            self._advance(part)

    def _check(
        self, request: Request, answers: Mapping[str, LogprobsTensors], alone: Mapping[str, LogprobsTensors]
    ) -> None:
        if request.parameters is None:
            assert_close(answers[request.id], alone[request.id], request.id)
        else:
            assert_scored(answers[request.id], request, request.parameters, self._head_HV)

    def _advance(self, part: Part) -> None:
        progress = part.progress
        progress.is_answered |= part.answers
        progress.computed += part.num_tokens
        if progress.num_left == 0:  # its last row gives a token
            index = self._states.req_id_to_index[part.request.id]
            self._states.all_token_ids.gpu[index, progress.computed] = int(part.request.outputs[progress.num_outputs])
            progress.num_outputs += 1

    def _compute(self, worker: Any, parts: Sequence[Part]) -> dict[str, LogprobsTensors]:
        """As vLLM's runner calls its worker, once per step."""
        hidden = [part.request.hidden[part.progress.computed :][: part.num_tokens] for part in parts]
        answers: dict[str, LogprobsTensors] = worker.compute_prompt_logprobs(
            lambda hidden_TH: hidden_TH @ self._head_HV,
            torch.cat([*hidden, torch.full((NUM_PADDED, H), torch.nan)]),
            self._batch(parts),
            self._states.all_token_ids.gpu,
            self._states.num_computed_tokens.gpu,
            self._states.prompt_len.np,
        )
        return answers

    def _batch(self, parts: Sequence[Part]) -> InputBatch:
        """As vLLM's runner makes it of its states."""
        index = np.array([self._states.req_id_to_index[part.request.id] for part in parts], dtype=np.intp)
        computed = np.array([part.progress.computed for part in parts], dtype=np.int32)
        self._states.num_computed_tokens.gpu[torch.from_numpy(index)] = torch.from_numpy(computed)
        prefill_len = self._states.prefill_len.np[index]
        num_tokens = np.array([part.num_tokens for part in parts], dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int32)
        return dataclasses.replace(
            InputBatch.make_dummy(len(parts), int(num_tokens.sum()), self._buffers),
            req_ids=[part.request.id for part in parts],
            idx_mapping=torch.from_numpy(index.astype(np.int64)),
            idx_mapping_np=index,
            num_scheduled_tokens=num_tokens,
            query_start_loc=torch.from_numpy(starts),
            query_start_loc_np=starts,
            num_computed_tokens_np=computed,
            num_computed_prefill_tokens_np=np.minimum(computed, prefill_len),
            prefill_len_np=prefill_len,
            is_prefilling_np=computed < prefill_len,
            has_prefill=bool((computed < prefill_len).any()),
        )

    def _scored_logits(self, hidden_TH: Tensor) -> Tensor:
        self._num_scored += len(hidden_TH)
        self.num_blocks += 1
        return hidden_TH @ self._head_HV


def assert_close(answer: LogprobsTensors, expected: LogprobsTensors, name: str) -> None:
    """Two answers of vLLM's own code are equal but for rounding."""
    for field in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        torch.testing.assert_close(
            getattr(answer, field), getattr(expected, field), rtol=0, atol=TOLERANCE, msg=_named(name, field)
        )


def assert_scored(answer: LogprobsTensors, request: Request, parameters: Parameters, head_HV: Tensor) -> None:
    """Every field of an answer equals a plain log_softmax of the request's rows, and no entry is missing."""
    start, k = parameters.score_start, request.num_logprobs or 0
    hidden_SH = request.hidden[start - 1 : len(request.prompt) - 1].double()
    logprobs_SV = (hidden_SH @ head_HV.double() / parameters.temperature).log_softmax(-1)
    expected = expected_columns(logprobs_SV, request.prompt[start:], k, parameters)
    torch.testing.assert_close(
        answer.logprobs, expected.float(), rtol=0, atol=TOLERANCE, msg=_named(request.id, "columns")
    )
    ids = answer.logprob_token_ids.long()
    assert all(len(set(row)) == k for row in ids.tolist()), f"{request.id}: a token twice"
    torch.testing.assert_close(
        logprobs_SV.gather(1, ids), expected[:, 1 : k + 1], rtol=0, atol=TOLERANCE, msg=_named(request.id, "ids")
    )


def expected_columns(logprobs_SV: Tensor, targets: Int32Array, k: int, parameters: Parameters) -> Tensor:
    """The columns that `Parameters.num_columns` names: `[S, columns]` float64."""
    likeliest = logprobs_SV.sort(-1, descending=True).values
    columns = [
        logprobs_SV.gather(1, torch.from_numpy(targets).long().unsqueeze(1)),
        likeliest[:, :k],
        likeliest[:, k:].logsumexp(-1, keepdim=True),
    ]
    if parameters.entropy:
        columns.append(-(logprobs_SV.exp() * logprobs_SV).sum(-1, keepdim=True))
    if parameters.candidates is not None:
        columns.append(logprobs_SV.gather(1, torch.from_numpy(parameters.candidates).long()))
    return torch.cat(columns, 1)


def _named(name: str, what: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {what}: {message}"


def _dictionaries(worker: Any) -> dict[str, dict[str, Any]]:
    """What a worker keeps per request."""
    return {name: value for name, value in vars(worker).items() if isinstance(value, dict)}
