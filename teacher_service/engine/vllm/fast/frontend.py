"""In the service's process: what the worker sends stays arrays.

It takes the place of one class of vLLM's frontend, `LogprobsProcessor`, by a subclass that makes no Python object per
logprob of the requests that carry our parameters; `probe.py` says for which versions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from protos.arrays import ScoreArrays
from teacher_service.engine.numerics import clip_rounding
from teacher_service.engine.vllm.fast.parameters import Parameters
from teacher_service.errors import EngineError
from teacher_service.types import ScoreJob


class RawAnswer:
    """What stands where vLLM keeps prompt logprobs: the worker's tensors, as they came."""

    def __init__(self) -> None:
        self.tensors: Any = None

    def __len__(self) -> int:
        """Tokens described; vLLM asks whether there are any."""
        return 0 if self.tensors is None else len(self.tensors.logprobs)


def install() -> None:
    """Let vLLM's frontend keep our answers as arrays. Idempotent."""
    from vllm.v1.engine import output_processor
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if output_processor.LogprobsProcessor is not LogprobsProcessor:
        return

    class ArrayLogprobsProcessor(LogprobsProcessor):  # type: ignore[misc] # vllm carries no types
        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> Any:
            processor = super().from_new_request(tokenizer, request)
            if Parameters.unpack(request.sampling_params.extra_args) is not None:
                processor.prompt_logprobs = RawAnswer()
            return processor

        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            if isinstance(self.prompt_logprobs, RawAnswer):
                self.prompt_logprobs.tensors = prompt_logprobs_tensors
            else:
                super()._update_prompt_logprobs(prompt_logprobs_tensors)

    output_processor.LogprobsProcessor = ArrayLogprobsProcessor


def score_arrays(answer: RawAnswer, job: ScoreJob) -> ScoreArrays:
    """An answer's columns, see `Parameters.num_columns`.

    Raises:
        EngineError: it has another shape than the job asks for.
    """
    k, parameters = job.num_logprobs, Parameters.of(job)
    ids_SK, columns = answer.tensors.logprob_token_ids.numpy(), answer.tensors.logprobs.numpy()
    if ids_SK.shape != (job.num_scored, k) or columns.shape != (job.num_scored, parameters.num_columns(k)):
        raise EngineError(
            f"vLLM's worker answered {ids_SK.shape} ids and {columns.shape} columns for {job.num_scored} positions and "
            f"{k} logprobs; report this as a bug"
        )
    candidates_at = k + 2 + int(job.return_entropy)
    logprobs = clip_rounding(columns)
    return ScoreArrays(
        sampled_logprobs=np.ascontiguousarray(logprobs[:, 0]),
        topk_token_ids=np.ascontiguousarray(ids_SK) if k else None,
        topk_logprobs=np.ascontiguousarray(logprobs[:, 1 : k + 1]) if k else None,
        log_tail_mass=np.ascontiguousarray(logprobs[:, k + 1]) if k else None,
        entropy=np.maximum(columns[:, k + 2], 0) if job.return_entropy else None,
        candidate_logprobs=(
            None if job.candidate_token_ids is None else np.ascontiguousarray(logprobs[:, candidates_at:])
        ),
    )
