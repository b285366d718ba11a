"""The scoring core: validate, admit, ask the engine, check its answer. Knows no transport.

Legend: S scored positions, K top-k entries, C candidates per position.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from teacher_service import memory
from teacher_service.admission import Admission, AdmissionLimits, Demand, MemoryBudget, Phase
from teacher_service.dedupe import AnswerCache, Deduplicator, content_digest
from teacher_service.engine.base import Engine
from teacher_service.engine.numerics import checked
from teacher_service.errors import (
    AnswerTooLargeError,
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    EngineStartError,
    TeacherServiceError,
)
from teacher_service.offload import off_loop
from teacher_service.telemetry import Progress, RequestRecord
from teacher_service.types import Capability, EngineInfo, Manifest, ScoreArrays, ScoreJob, ScoreResult, Timings
from teacher_service.validation import ScoreRequest, validate

FREE_MEMORY_SHARE = 0.5
"""Of the free memory that scoring may take, where nothing else is said: the rest is for what no price knows."""
UNKNOWN_VERSION = "0+unknown"
"""The service's version where the distribution is not installed, e.g. a bare source tree on the path."""
SERVICE_CAPABILITIES = frozenset({Capability.WIRE_FLOAT16, Capability.WIRE_BFLOAT16, Capability.IDEMPOTENCY})
"""What the service itself adds to an engine's capabilities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringLimits:
    """The operator's bounds; the engine's own may be tighter."""

    admission: AdmissionLimits
    """Bounds of the queue and of what is in the engine."""
    max_num_logprobs: int
    """Largest K."""
    max_request_bytes: int
    """Largest body; transports enforce it, the manifest tells it."""
    max_response_bytes: int
    """Largest answer, as a message with float32."""
    memory_budget_bytes: int | None
    """Main memory that the work in the engine may take; None: `FREE_MEMORY_SHARE` of what is free once it is loaded."""
    answer_cache_bytes: int
    """Answers kept for repeated requests, in bytes, as far as the memory budget has them to spare; 0: none."""
    answer_cache_s: float
    """Seconds that such an answer is kept; 0: none is."""
    max_timeout_s: float
    """Seconds a request may take, whatever its caller allows."""


class Scorer:
    """Scores sequences on one engine. Belongs to one event loop."""

    def __init__(self, engine: Engine, limits: ScoringLimits) -> None:
        self._engine = engine
        self._limits = limits
        self._manifest: Manifest | None = None
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._abort_error: Callable[[], TeacherServiceError] | None = None
        self.admission = Admission(limits.admission)
        """The queue and its budget."""
        self.answer_cache = AnswerCache(
            max_bytes=limits.answer_cache_bytes,
            max_age_s=limits.answer_cache_s,
            room_bytes=lambda: self.admission.spare_bytes,
        )
        """Answers kept for repeated requests."""
        self._deduplicator = Deduplicator(self.answer_cache)

    @property
    def joined_requests(self) -> int:
        """Requests that wait for the computation of an equal one; they are in no queue."""
        return self._deduplicator.num_joined

    @property
    def phase(self) -> Phase:
        """Where the service stands in its life."""
        return self.admission.phase

    @property
    def limits(self) -> ScoringLimits:
        """The operator's bounds."""
        return self._limits

    def manifest(self) -> Manifest:
        """What this teacher is; also while draining, so that clients can still name it.

        Raises:
            NotReadyError: the model is still loading.
            EngineDeadError: the engine died before it was loaded.
        """
        if self._manifest is None:
            self.admission.check_open()
            raise AssertionError("a serving teacher has a manifest")
        return self._manifest

    def open(self, info: EngineInfo) -> None:
        """Take work from now on: the engine is loaded.

        Raises:
            EngineStartError: the memory left does not allow a sequence of the length that the manifest announces.
        """
        manifest = build_manifest(info, self._limits)
        main_bytes = self._limits.memory_budget_bytes or int(FREE_MEMORY_SHARE * memory.free_bytes())
        budget = MemoryBudget(main_bytes=main_bytes, device_bytes=info.device_free_bytes)
        self._check_room(budget, manifest.max_request_tokens)
        self._manifest = manifest
        self.admission.bound_memory(budget)
        if self.phase is Phase.LOADING:
            self.admission.phase = Phase.SERVING

    def _check_room(self, budget: MemoryBudget, num_tokens: int) -> None:
        job = ScoreJob(
            request_id="longest",
            token_ids=np.zeros(num_tokens, dtype=np.int32),
            score_start=num_tokens - 1,
            num_logprobs=0,
        )
        over = budget.excess(self._engine.price(job))
        if over is not None:
            needed, limit = over
            raise EngineStartError(
                f"the teacher would announce sequences of {num_tokens} tokens, and scoring one needs "
                f"{needed / 1e6:.1f} MB of memory where {limit / 1e6:.1f} MB are left; lower --max-model-len or "
                "--max-num-batched-tokens, leave more beside the model (--gpu-memory-utilization, --kv-cache-bytes), "
                "or raise --memory-budget-bytes",
                metadata={"field": "max_model_len", "value": f"{needed}", "limit": f"{limit}"},
            )

    def begin_drain(self) -> None:
        """Refuse new work from now on; work already taken goes on."""
        if self.phase is not Phase.DEAD:
            self.admission.phase = Phase.DRAINING

    async def wait_idle(self) -> None:
        """Return once no work is left."""
        await self._idle.wait()

    def abort_work(self) -> None:
        """End all work with DrainingError: the time for draining is over."""
        self._abort(
            lambda: DrainingError("the service shut down before this sequence was finished; send it to another replica")
        )

    def fail(self, cause: BaseException) -> None:
        """The engine is dead: refuse new work and end all work, with EngineDeadError."""
        self.admission.phase = Phase.DEAD
        message = f"the engine died ({cause}); send the work to another replica"
        self._abort(lambda: EngineDeadError(message))

    async def score(self, request: ScoreRequest, *, timeout_s: float | None, record: RequestRecord) -> ScoreResult:
        """Score one sequence. Cancelling the call drops the work.

        Args:
            request: what to score.
            timeout_s: seconds the caller allows; None: the service's own maximum.
            record: told of sizes and times.

        Raises:
            TeacherServiceError: refused or failed; the subclass says how.
        """
        self.admission.check_open()
        job = validate(request, self.manifest(), request_id=record.request_id)
        self._check_response_size(job)
        record.num_tokens, record.num_scored, record.num_logprobs = job.num_tokens, job.num_scored, job.num_logprobs
        async with self._bounded(timeout_s):
            scores = await self._answer(job, request.idempotency_key, record)
        return ScoreResult(
            scores=scores,
            manifest_digest=self.manifest().digest,
            timings=Timings(queue_s=record.queue_s, engine_s=record.engine_s),
        )

    async def _answer(self, job: ScoreJob, key: str | None, record: RequestRecord) -> ScoreArrays:
        client, account = record.client, record.account
        if key is not None:
            num_ids = job.num_tokens + job.num_scored * job.num_candidates
            digest = await off_loop(num_ids, lambda: content_digest(job))
            return await self._deduplicator.answer(
                key, digest, lambda progress: self._compute(job, client, account, progress), record
            )
        progress, began_s = Progress(), time.perf_counter()
        try:
            return await self._compute(job, client, account, progress)
        finally:
            progress.tell(record, since_s=began_s)

    async def _compute(self, job: ScoreJob, client: str, account: str, progress: Progress) -> ScoreArrays:
        demand = Demand(num_tokens=job.num_tokens, price=self._engine.price(job), client=client, account=account)
        async with self.admission.admit(demand):
            # what is kept for repeated requests makes way for it
            self.answer_cache.trim()
            progress.admitted_s = time.perf_counter()
            try:
                scores = await self._engine.score(job)
            finally:
                progress.finished_s = time.perf_counter()
        vocab_rows = self.manifest().vocab_rows
        return await off_loop(scores.size, lambda: checked(scores, job, vocab_rows=vocab_rows))

    def _check_response_size(self, job: ScoreJob) -> None:
        num_bytes, limit = response_bytes(job), self._limits.max_response_bytes
        if num_bytes > limit:
            raise AnswerTooLargeError(
                f"the answer to {job.num_scored} positions with {job.num_logprobs} logprobs has {num_bytes} bytes, "
                f"limit {limit}; ask for fewer logprobs, split the sequence, or serve with a larger "
                "--max-response-bytes",
                metadata={"field": "num_logprobs", "value": f"{num_bytes}", "limit": f"{limit}"},
            )

    @asynccontextmanager
    async def _bounded(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Bound the work inside by its deadline, and let `_abort` end it before."""
        limit_s = self._limits.max_timeout_s if timeout_s is None else min(timeout_s, self._limits.max_timeout_s)
        if limit_s <= 0:
            raise _deadline_error(limit_s)
        scope = asyncio.timeout(limit_s)
        self._running.add(scope)
        self._idle.clear()
        try:
            async with scope:
                yield
        except TimeoutError as exc:
            if not scope.expired():
                raise
            raise (self._abort_error() if self._abort_error is not None else _deadline_error(limit_s)) from exc
        finally:
            self._running.discard(scope)
            if not self._running:
                self._idle.set()

    def _abort(self, error: Callable[[], TeacherServiceError]) -> None:
        if self._abort_error is None:
            self._abort_error = error
        for scope in self._running:
            if not scope.expired():
                scope.reschedule(asyncio.get_running_loop().time())


def response_bytes(job: ScoreJob) -> int:
    """Size of an answer's arrays as a message with float32."""
    topk = 4 + 8 * job.num_logprobs if job.num_logprobs else 0
    return job.num_scored * (4 + topk + 4 * job.return_entropy + 4 * job.num_candidates)


def build_manifest(info: EngineInfo, limits: ScoringLimits) -> Manifest:
    """The manifest of an engine as this service offers it."""
    return Manifest(
        model_name=info.model_name,
        weights_digest=info.weights_digest,
        tokenizer=info.tokenizer,
        vocab_rows=info.vocab_rows,
        dtype=info.dtype,
        max_model_len=info.max_model_len,
        max_num_logprobs=min(info.max_num_logprobs, limits.max_num_logprobs),
        # a sequence above the budget would wait for ever
        max_request_tokens=min(info.max_request_tokens, limits.admission.max_inflight_tokens),
        max_request_bytes=limits.max_request_bytes,
        capabilities=info.capabilities | SERVICE_CAPABILITIES,
        engine=info.name,
        engine_version=info.version,
        service_version=service_version(),
        route=info.route,
        route_reason=info.route_reason,
    )


def service_version() -> str:
    """Version of the installed distribution, or `UNKNOWN_VERSION`."""
    try:
        return importlib.metadata.version("gkd")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN_VERSION


def _deadline_error(limit_s: float) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the request was not answered within {limit_s:.3f} s, and its work was dropped; allow more time, or send less "
        "at once",
        metadata={"field": "timeout_s", "limit": f"{limit_s:.3f}"},
    )
