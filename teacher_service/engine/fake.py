"""An analytic teacher: no model, instant, and wrong by inspection when anything above it shifts by one.

Its distribution depends on nothing but the prefix length and the temperature. The most likely token after a prefix
of n tokens is `n % V`, so an answer that belongs to another position names another token.

Legend: S scored positions, K top-k entries, C candidates per position, V vocabulary rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence

import numpy as np
from numpy.typing import NDArray

from protos.arrays import Float32Array, Int32Array, ScoreArrays
from protos.manifest import TokenizerManifest
from teacher_service.engine import pricing
from teacher_service.engine.death import Death
from teacher_service.errors import EngineDeadError, EngineError, EngineStartError
from teacher_service.types import Capability, EngineInfo, Price, ScoreJob

ENGINE_VERSION = "1"

_FALL = 4.0
_NUM_FALLS = 7


def expected_logprobs(
    prefix_lengths: Sequence[int] | NDArray[np.integer], *, vocab_rows: int, temperature: float = 1.0
) -> NDArray[np.float64]:
    """What the analytic teacher predicts after prefixes of the given lengths, `[len(prefix_lengths), V]`, nats.

    Logits fall linearly from token `n % V` upwards, cyclically, and by a slope that itself depends on n: positions
    that share their most likely token (n and n + V) still differ, unless they are 7V apart.
    """
    lengths_S1 = np.asarray(prefix_lengths, dtype=np.int64)[:, None]
    rank_SV = (np.arange(vocab_rows) - lengths_S1) % vocab_rows
    slope_S1 = _FALL * (1 + lengths_S1 % _NUM_FALLS) / vocab_rows
    logits_SV = -slope_S1 * rank_SV / temperature
    log_normalizer_S1 = np.log(np.exp(logits_SV).sum(axis=1, keepdims=True))  # the largest logit is 0
    return np.asarray(logits_SV - log_normalizer_S1)


class FakeEngine:
    """The analytic teacher as an engine, with the faults that tests of the layers above need.

    All capabilities. `loading_gate` and `scoring_gate` are set; a test clears one to hold `start` or jobs there.
    """

    DEFAULT_MAX_MODEL_LEN = 4096
    DEFAULT_MODEL_NAME = "fake"

    def __init__(
        self,
        *,
        vocab_rows: int = 32,
        max_model_len: int = DEFAULT_MAX_MODEL_LEN,
        max_num_logprobs: int | None = None,
        model_name: str = DEFAULT_MODEL_NAME,
        tokenizer: TokenizerManifest | None = None,
        start_error: EngineStartError | None = None,
        latency_s: float = 0.0,
        failing_token_id: int | None = None,
        nan_token_id: int | None = None,
        deadly_token_id: int | None = None,
    ) -> None:
        """An engine that behaves, unless told otherwise.

        Args:
            vocab_rows: V.
            max_model_len: longest sequence in tokens.
            max_num_logprobs: largest K; None: V.
            model_name: name in the manifest.
            tokenizer: token map in the manifest; None: ids are taken as they are.
            start_error: raised by `start`.
            latency_s: seconds that each job takes.
            failing_token_id: a sequence that holds this token fails with `EngineError`.
            nan_token_id: a sequence that holds this token is answered with NaN in every array.
            deadly_token_id: a sequence that holds this token kills the engine.
        """
        self._info = EngineInfo(
            name="fake",
            version=ENGINE_VERSION,
            model_name=model_name,
            weights_digest=None,
            tokenizer=tokenizer,
            vocab_rows=vocab_rows,
            dtype="float32",
            max_model_len=max_model_len,
            max_request_tokens=max_model_len,
            max_num_logprobs=vocab_rows if max_num_logprobs is None else min(max_num_logprobs, vocab_rows),
            capabilities=frozenset(
                {Capability.TEMPERATURE, Capability.CANDIDATES, Capability.ENTROPY, Capability.EXACT_TAIL_MASS}
            ),
        )
        self._start_error = start_error
        self._latency_s = latency_s
        self._failing_token_id = failing_token_id
        self._nan_token_id = nan_token_id
        self._deadly_token_id = deadly_token_id
        self._death = Death()
        self._arrived = asyncio.Event()
        self.loading_gate = asyncio.Event()
        """Cleared: `start` waits."""
        self.loading_gate.set()
        self.scoring_gate = asyncio.Event()
        """Cleared: jobs wait in the engine."""
        self.scoring_gate.set()
        self.running: set[str] = set()
        """Ids of the jobs in the engine now."""
        self.finished: list[str] = []
        """Ids of the jobs that were answered, in order."""
        self.cancelled: list[str] = []
        """Ids of the jobs that were cancelled, in order."""
        self.is_closed = False
        """Whether `close` was called."""

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        await self.loading_gate.wait()
        if self._start_error is not None:
            raise self._start_error
        return self._info

    def price(self, job: ScoreJob) -> Price:
        """See `Engine.price`."""
        return Price(held_bytes=pricing.answer_bytes(job))

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        self.running.add(job.request_id)
        self._arrived.set()
        try:
            await self._unless_dead(self._hold())
            scores = self._answer(job)
        except asyncio.CancelledError:
            self.cancelled.append(job.request_id)
            raise
        finally:
            self.running.discard(job.request_id)
        self.finished.append(job.request_id)
        return scores

    async def wait_dead(self) -> BaseException:
        """See `Engine.wait_dead`."""
        return await self._death.wait()

    async def close(self) -> None:
        """See `Engine.close`."""
        self.is_closed = True

    async def wait_running(self, num_jobs: int) -> None:
        """Return once that many jobs are in the engine."""
        while len(self.running) < num_jobs:
            self._arrived.clear()
            await self._arrived.wait()

    def die(self, cause: BaseException) -> None:
        """Be dead from now on: running jobs fail, `wait_dead` returns `cause`."""
        self._death.declare(cause)

    async def _hold(self) -> None:
        await self.scoring_gate.wait()
        await asyncio.sleep(self._latency_s)

    async def _unless_dead(self, hold: Coroutine[None, None, None]) -> None:
        holding, dying = asyncio.ensure_future(hold), asyncio.ensure_future(self._death.wait())
        try:
            await asyncio.wait({holding, dying}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            holding.cancel()
            dying.cancel()
        self._raise_if_dead()

    def _raise_if_dead(self) -> None:
        if self._death.cause is not None:
            raise EngineDeadError(f"the engine is dead: {self._death.cause}") from self._death.cause

    def _answer(self, job: ScoreJob) -> ScoreArrays:
        token_ids = set(job.token_ids.tolist())
        if self._deadly_token_id in token_ids:
            self.die(RuntimeError(f"token {self._deadly_token_id} is deadly"))
            self._raise_if_dead()
        if self._failing_token_id in token_ids:
            raise EngineError(f"token {self._failing_token_id} makes this engine fail; leave it out")
        logprobs_SV = expected_logprobs(
            range(job.score_start, job.num_tokens), vocab_rows=self._info.vocab_rows, temperature=job.temperature
        )
        scores = _score_arrays(job, logprobs_SV)
        return _with_nan(scores) if self._nan_token_id in token_ids else scores


def _score_arrays(job: ScoreJob, logprobs_SV: NDArray[np.float64]) -> ScoreArrays:
    sampled_ids_S1 = job.token_ids[job.score_start :, None]
    topk_ids_SK: Int32Array | None = None
    topk_logprobs_SK: Float32Array | None = None
    log_tail_S: Float32Array | None = None
    if job.num_logprobs:
        order_SV = np.argsort(-logprobs_SV, axis=1, kind="stable")
        topk_ids_SK = np.ascontiguousarray(order_SV[:, : job.num_logprobs], dtype=np.int32)
        topk_logprobs_SK = _take(logprobs_SV, topk_ids_SK)
        rest_SR = np.take_along_axis(logprobs_SV, order_SV[:, job.num_logprobs :], axis=1)
        log_tail_S = np.logaddexp.reduce(rest_SR, axis=1, initial=-np.inf).astype(np.float32)
    entropy_S = -(np.exp(logprobs_SV) * logprobs_SV).sum(axis=1)
    candidates = job.candidate_token_ids
    return ScoreArrays(
        sampled_logprobs=_take(logprobs_SV, sampled_ids_S1)[:, 0],
        topk_token_ids=topk_ids_SK,
        topk_logprobs=topk_logprobs_SK,
        log_tail_mass=log_tail_S,
        entropy=entropy_S.astype(np.float32) if job.return_entropy else None,
        candidate_logprobs=None if candidates is None else _take(logprobs_SV, candidates),
    )


def _with_nan(scores: ScoreArrays) -> ScoreArrays:
    def nan(values: Float32Array | None) -> Float32Array | None:
        return None if values is None else np.full_like(values, np.nan)

    return ScoreArrays(
        sampled_logprobs=np.full_like(scores.sampled_logprobs, np.nan),
        topk_token_ids=scores.topk_token_ids,
        topk_logprobs=nan(scores.topk_logprobs),
        log_tail_mass=nan(scores.log_tail_mass),
        entropy=nan(scores.entropy),
        candidate_logprobs=nan(scores.candidate_logprobs),
    )


def _take(logprobs_SV: NDArray[np.float64], token_ids: Int32Array) -> Float32Array:
    return np.take_along_axis(logprobs_SV, token_ids.astype(np.int64), axis=1).astype(np.float32)
