"""The two ways of asking vLLM for a sequence's logprobs, and of reading its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from protos.arrays import ScoreArrays
from teacher_service.engine import pricing
from teacher_service.engine.vllm import flat_logprobs
from teacher_service.engine.vllm.fast import frontend
from teacher_service.engine.vllm.fast.parameters import Parameters
from teacher_service.types import Capability, Price, ScoreJob

NUM_GENERATED_TOKENS = 1
LOGIT_BYTES = 12
"""What the public route holds of each logit of a step: itself, its float32, its logprob, and the ranking's."""
LISTED_ENTRY_BYTES = 220
"""An id, a logprob and a rank in Python lists, and as they were sent and received."""
RANKED_ENTRY_BYTES = 12
"""An id and a logprob as the public route holds them for all rows of a step."""
ANSWER_ENTRY_BYTES = 8
"""An id and a logprob of an answer that waits in the worker for its last row."""
V2_CHUNK_ROWS = 1024
"""Rows of a step of which the V2 runner makes public prompt logprobs at once."""


class Route(Protocol):
    """One of them."""

    @property
    def name(self) -> str:
        """As in logs and metrics."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can do beyond top-k and sampled logprobs at temperature 1."""
        ...

    def price(self, job: ScoreJob) -> Price:
        """The memory that a job takes, at most."""
        ...

    def sampling(self, job: ScoreJob) -> dict[str, Any]:
        """The arguments of vLLM's `SamplingParams` that ask for a job's logprobs."""
        ...

    def score_arrays(self, answer: Any, job: ScoreJob) -> ScoreArrays:
        """What vLLM's `prompt_logprobs` hold.

        Raises:
            EngineError: they are not what was asked for.
        """
        ...


@dataclass(frozen=True, slots=True)
class FlatRoute:
    """vLLM's public prompt logprobs, in their flat form."""

    vocab_rows: int
    step_tokens: int
    """Tokens of one step of vLLM, at most."""
    chunk_rows: int | None
    """Rows of a step, of all sequences, whose logits the V2 runner makes at once. None: the V1 runner, which makes
    those of one sequence at once."""
    name: str = "flat"
    capabilities: frozenset[Capability] = frozenset()

    def price(self, job: ScoreJob) -> Price:
        """See `Route.price`. vLLM keeps Python lists of the whole prompt, and logits several times."""
        held_bytes = pricing.TOKEN_BYTES * job.num_tokens
        held_bytes += LISTED_ENTRY_BYTES * pricing.num_entries(job, rows=job.num_tokens)
        if self.chunk_rows is None:
            rows = min(job.num_tokens, self.step_tokens)
            return Price(held_bytes=held_bytes, peak_bytes=LOGIT_BYTES * self.vocab_rows * rows)
        rows = min(self.chunk_rows, self.step_tokens)
        row_bytes = RANKED_ENTRY_BYTES * (job.num_logprobs + 1)
        return Price(
            held_bytes=held_bytes,
            peak_bytes=LOGIT_BYTES * self.vocab_rows * rows + row_bytes * self.step_tokens,
            held_device_bytes=row_bytes * job.num_tokens,
        )

    def sampling(self, job: ScoreJob) -> dict[str, Any]:
        """See `Route.sampling`."""
        return {"prompt_logprobs": job.num_logprobs, "flat_logprobs": True}

    def score_arrays(self, answer: Any, job: ScoreJob) -> ScoreArrays:
        """See `Route.score_arrays`."""
        return flat_logprobs.score_arrays(answer, job, vocab_rows=self.vocab_rows)


@dataclass(frozen=True, slots=True)
class FastRoute:
    """Response rows alone, scored in the worker, with the prompt's prefix from the cache."""

    scratch_bytes: int
    """Logits and copies of them that are there at once, whatever is asked."""
    name: str = "fast"
    capabilities: frozenset[Capability] = frozenset(
        {Capability.TEMPERATURE, Capability.CANDIDATES, Capability.ENTROPY, Capability.EXACT_TAIL_MASS}
    )

    def price(self, job: ScoreJob) -> Price:
        """See `Route.price`."""
        return Price(
            held_bytes=pricing.answer_bytes(job),
            peak_bytes=self.scratch_bytes,
            held_device_bytes=ANSWER_ENTRY_BYTES * pricing.num_entries(job),
        )

    def sampling(self, job: ScoreJob) -> dict[str, Any]:
        """See `Route.sampling`."""
        return {
            "prompt_logprobs": job.num_logprobs,
            "skip_reading_prefix_cache": False,
            "extra_args": Parameters.of(job).pack(),
        }

    def score_arrays(self, answer: Any, job: ScoreJob) -> ScoreArrays:
        """See `Route.score_arrays`."""
        return frontend.score_arrays(answer, job)
