"""The scoring core: what it refuses, what it asks of the engine, and how work ends early."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from teacher_service.admission import Phase
from teacher_service.engine.fake import FakeEngine
from teacher_service.errors import (
    AnswerTooLargeError,
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    IdempotencyKeyReusedError,
    InvalidCandidatesError,
    MissingCapabilityError,
    NotReadyError,
    OverMemoryBudgetError,
    TokenIdOutOfRangeError,
)
from teacher_service.scoring import UNKNOWN_VERSION, Scorer, ScoringLimits, build_manifest, service_version
from teacher_service.telemetry import RequestRecord
from teacher_service.types import Capability, EngineInfo, ScoreArrays, ScoreJob, ScoreResult
from teacher_service.validation import ScoreRequest, validate
from tests.support.engines import LIMITS


class BareEngine(FakeEngine):
    """Has no capability beyond what every engine has."""

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        return dataclasses.replace(await super().start(), capabilities=frozenset())


class ForgedEngine(FakeEngine):
    """Answers what a test forges from an honest answer."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self._changes = changes

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        return dataclasses.replace(await super().score(job), **self._changes)


async def open_scorer(engine: FakeEngine, limits: ScoringLimits = LIMITS) -> Scorer:
    scorer = Scorer(engine, limits)
    scorer.open(await engine.start())
    return scorer


async def score(scorer: Scorer, timeout_s: float | None = 10.0, **request: Any) -> ScoreResult:
    given = {"token_ids": [3, 1, 4, 1, 5], "score_start": 2, "num_logprobs": 2} | request
    return await scorer.score(ScoreRequest(**given), timeout_s=timeout_s, record=RequestRecord(method="test"))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_result_carries_scores_digest_and_times() -> None:
    """The analytic teacher's favourites after prefixes of 2, 3 and 4 tokens, under the digest of the manifest."""
    scorer = await open_scorer(FakeEngine())
    result = await score(scorer)
    assert result.scores.topk_token_ids is not None
    assert result.scores.topk_token_ids.tolist() == [[2, 3], [3, 4], [4, 5]]
    assert result.manifest_digest == scorer.manifest().digest
    assert result.timings.engine_s > 0


async def test_nothing_is_scored_or_told_before_the_engine_is_open() -> None:
    """Even a request that could be refused by itself is told NOT_READY."""
    scorer = Scorer(FakeEngine(), LIMITS)
    with pytest.raises(NotReadyError):
        await score(scorer, token_ids=[])
    with pytest.raises(NotReadyError):
        scorer.manifest()


@pytest.mark.parametrize(
    ("request_fields", "capability"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"return_entropy": True}, "entropy"),
        ({"candidate_token_ids": [[1], [1], [1]]}, "candidates"),
    ],
)
async def test_what_the_engine_cannot_do_is_refused_by_name(request_fields: dict[str, Any], capability: str) -> None:
    """A missing capability is named, and so is what there is instead."""
    scorer = await open_scorer(BareEngine())
    with pytest.raises(MissingCapabilityError, match=f"capability {capability}, which engine fake lacks") as caught:
        await score(scorer, **request_fields)
    assert caught.value.metadata["value"] == capability
    assert caught.value.metadata["limit"] == "idempotency, wire_bfloat16, wire_float16"
    assert (await score(scorer)).scores.num_scored == 3


async def test_the_first_bad_token_is_named_by_index_and_value() -> None:
    """The caller finds it without bisecting."""
    scorer = await open_scorer(FakeEngine())
    with pytest.raises(TokenIdOutOfRangeError, match=r"index 3 is 99, outside \[0, 32\)") as caught:
        await score(scorer, token_ids=[0, 31, 5, 99, -1])
    assert caught.value.metadata == {"field": "token_ids", "index": "3", "value": "99", "limit": "[0, 32)"}


@pytest.mark.parametrize("rows", [[], [[]], [[1], [1]], [[1], [1], []], [[1], [1, 2], [1]], [[1]] * 4])
async def test_candidates_need_one_full_row_for_each_scored_position(rows: list[list[int]]) -> None:
    """Three positions are scored; ragged, empty, missing and surplus rows are refused."""
    scorer = await open_scorer(FakeEngine())
    with pytest.raises(InvalidCandidatesError):
        await score(scorer, candidate_token_ids=rows)


def test_a_job_holds_int32_arrays_of_the_shapes_asked_for() -> None:
    """What the engine gets is of the types and shapes that `ScoreJob` promises."""
    info = asyncio.run(FakeEngine().start())
    request = ScoreRequest(token_ids=[1, 2, 3], score_start=1, candidate_token_ids=[[1, 2], [3, 4]])
    job = validate(request, build_manifest(info, LIMITS), request_id="r")
    assert (job.token_ids.dtype, job.token_ids.tolist()) == (np.int32, [1, 2, 3])
    assert job.candidate_token_ids is not None
    assert (job.candidate_token_ids.dtype, job.candidate_token_ids.tolist()) == (np.int32, [[1, 2], [3, 4]])
    assert (job.num_tokens, job.num_scored) == (3, 2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sampled_logprobs": np.array([-1.0, np.nan, -1.0], np.float32)}, "NaN"),
        ({"sampled_logprobs": np.array([-1.0, -1.0], np.float32)}, "shape"),
        ({"sampled_logprobs": np.array([-1.0, 0.5, -1.0], np.float32)}, "<= 0"),
        ({"topk_token_ids": np.full((3, 2), 32, np.int32)}, "outside"),
        ({"topk_token_ids": None}, "absent"),
        ({"topk_logprobs": np.zeros((3, 2), np.float32)}, "above 1"),
        ({"log_tail_mass": np.full(3, np.nan, np.float32)}, "NaN"),
        ({"candidate_logprobs": np.full((3, 1), -1.0, np.float32)}, "candidates"),
        ({"entropy": np.ones(3, np.float32)}, "entropy True, asked False"),
    ],
)
async def test_an_engine_that_breaks_the_contract_is_an_engine_error(changes: dict[str, Any], complaint: str) -> None:
    """NaN, wrong shapes, impossible probabilities and unasked arrays never leave the service."""
    scorer = await open_scorer(ForgedEngine(**changes))
    with pytest.raises(EngineError, match=complaint):
        await score(scorer)


async def test_an_answer_over_the_limit_is_refused_before_the_engine_works() -> None:
    """Its size is known from the request, to the byte."""
    request = {"candidate_token_ids": [[1, 2], [3, 4], [5, 6]], "return_entropy": True}
    answer = (await score(await open_scorer(FakeEngine()), **request)).scores
    arrays = (getattr(answer, field.name) for field in dataclasses.fields(answer))
    num_bytes = sum(one.nbytes for one in arrays)
    engine = FakeEngine()
    scorer = await open_scorer(engine, dataclasses.replace(LIMITS, max_response_bytes=num_bytes - 1))
    with pytest.raises(AnswerTooLargeError, match=f"has {num_bytes} bytes, limit {num_bytes - 1};"):
        await score(scorer, **request)
    assert engine.finished == []
    await score(await open_scorer(engine, dataclasses.replace(LIMITS, max_response_bytes=num_bytes)), **request)


async def test_a_sequence_over_the_memory_budget_is_refused() -> None:
    """The engine prices it at more than there is."""
    scorer = await open_scorer(FakeEngine(), dataclasses.replace(LIMITS, memory_budget_bytes=500_000))
    with pytest.raises(OverMemoryBudgetError, match=r"limit 0\.5 MB; ask for fewer"):
        await score(scorer, token_ids=[1] * 900, score_start=1, num_logprobs=16)


async def test_a_teacher_that_can_not_score_its_announced_length_does_not_open() -> None:
    """1,000 tokens take 400 kB; the message has need and limit, in bytes too."""
    scorer = Scorer(FakeEngine(), dataclasses.replace(LIMITS, memory_budget_bytes=400_191))
    info = await FakeEngine().start()
    with pytest.raises(EngineStartError, match=r"sequences of 1000 tokens, .* lower --max-model-len") as caught:
        scorer.open(info)
    assert caught.value.metadata == {"field": "max_model_len", "value": "400192", "limit": "400191"}
    assert scorer.phase is Phase.LOADING
    Scorer(FakeEngine(), dataclasses.replace(LIMITS, memory_budget_bytes=400_192)).open(info)


async def test_time_that_is_already_up_costs_the_engine_nothing() -> None:
    """A deadline of 0 is refused before the queue."""
    engine = FakeEngine()
    scorer = await open_scorer(engine)
    with pytest.raises(DeadlineExceededError):
        await score(scorer, timeout_s=0.0)
    assert engine.finished == []


async def test_a_timeout_inside_the_engine_is_not_taken_for_the_callers_deadline() -> None:
    """An engine's own TimeoutError is a defect of the engine, not the caller's lack of patience."""

    class TimingOutEngine(FakeEngine):
        async def score(self, job: ScoreJob) -> ScoreArrays:
            raise TimeoutError("the engine's own")

    scorer = await open_scorer(TimingOutEngine())
    with pytest.raises(TimeoutError, match="the engine's own"):
        await score(scorer)


async def test_drain_waits_for_work_and_abort_ends_it() -> None:
    """wait_idle returns when the last sequence is through; abort_work makes that now."""
    engine = FakeEngine()
    engine.scoring_gate.clear()
    scorer = await open_scorer(engine)
    work = asyncio.create_task(score(scorer))
    await settle()
    scorer.begin_drain()
    idle = asyncio.create_task(scorer.wait_idle())
    await settle()
    assert not idle.done()
    with pytest.raises(DrainingError, match="takes no new work"):
        await score(scorer)
    scorer.abort_work()
    with pytest.raises(DrainingError, match="before this sequence was finished"):
        await work
    await asyncio.wait_for(idle, 5)
    assert len(engine.cancelled) == 1


async def test_death_ends_work_in_the_engine_and_in_the_queue() -> None:
    """Both are told the cause; what comes later is refused."""
    engine = FakeEngine()
    engine.scoring_gate.clear()
    scorer = await open_scorer(engine)
    work = [asyncio.create_task(score(scorer)) for _ in range(6)]
    await settle()
    assert scorer.admission.queued_requests == 2
    scorer.fail(RuntimeError("CUDA error 700"))
    for one in work:
        with pytest.raises(EngineDeadError, match="CUDA error 700"):
            await one
    with pytest.raises(EngineDeadError):
        await score(scorer)


async def test_a_repeated_request_costs_the_engine_nothing() -> None:
    """Its answer is the same, and no time of it was spent in queue or engine."""
    engine = FakeEngine()
    scorer = await open_scorer(engine)
    first = await score(scorer, idempotency_key="k")
    again = await score(scorer, idempotency_key="k")
    assert len(engine.finished) == 1
    assert again.scores.sampled_logprobs.tolist() == first.scores.sampled_logprobs.tolist()
    assert first.timings.engine_s > 0
    assert (again.timings.queue_s, again.timings.engine_s) == (0.0, 0.0)
    await score(scorer)
    await score(scorer)
    assert len(engine.finished) == 3


async def test_a_repeated_request_is_held_to_the_rules_all_the_same() -> None:
    """What is kept under its key does not spare it the checks, nor lets other content pass."""
    scorer = await open_scorer(FakeEngine())
    await score(scorer, idempotency_key="k")
    with pytest.raises(TokenIdOutOfRangeError):
        await score(scorer, token_ids=[3, 1, 99], idempotency_key="k")
    with pytest.raises(IdempotencyKeyReusedError):
        await score(scorer, num_logprobs=1, idempotency_key="k")


async def test_a_joined_request_takes_no_place_of_its_own() -> None:
    """Neither in the engine nor in the queue, whose bounds would not hold all of these."""
    engine = FakeEngine()
    engine.scoring_gate.clear()
    scorer = await open_scorer(engine)
    work = [asyncio.create_task(score(scorer, idempotency_key="k")) for _ in range(12)]
    await settle()
    admission = scorer.admission
    assert (admission.inflight_requests, admission.queued_requests, scorer.joined_requests) == (1, 0, 11)
    engine.scoring_gate.set()
    assert len(await asyncio.gather(*work)) == 12
    assert len(engine.finished) == 1


async def test_each_who_waits_has_a_deadline_of_its_own() -> None:
    """The hasty one is told, and the patient one answered."""
    engine = FakeEngine()
    engine.scoring_gate.clear()
    scorer = await open_scorer(engine)
    hasty = asyncio.create_task(score(scorer, timeout_s=0.01, idempotency_key="k"))
    patient = asyncio.create_task(score(scorer, idempotency_key="k"))
    with pytest.raises(DeadlineExceededError):
        await hasty
    engine.scoring_gate.set()
    assert (await patient).scores.num_scored == 3
    assert engine.cancelled == []


async def test_an_end_of_all_work_ends_what_was_joined() -> None:
    """All who wait are told, and the engine is rid of it once no work is left."""
    engine = FakeEngine()
    engine.scoring_gate.clear()
    scorer = await open_scorer(engine)
    work = [asyncio.create_task(score(scorer, idempotency_key="k")) for _ in range(2)]
    await settle()
    scorer.begin_drain()
    scorer.abort_work()
    await asyncio.wait_for(scorer.wait_idle(), 5)
    assert (engine.running, len(engine.cancelled)) == (set(), 1)
    for one in work:
        with pytest.raises(DrainingError):
            await one


async def test_kept_answers_make_way_for_work() -> None:
    """They are within the memory budget, and the engine comes first."""
    engine = FakeEngine()
    large = {"token_ids": [1] * 1000, "score_start": 1, "num_logprobs": 7}
    request = validate(ScoreRequest(**large), build_manifest(await engine.start(), LIMITS), request_id="r")
    budget_bytes = engine.price(request).held_bytes
    scorer = await open_scorer(engine, dataclasses.replace(LIMITS, memory_budget_bytes=budget_bytes))
    await score(scorer, idempotency_key="k")
    assert 0 < scorer.answer_cache.num_bytes < budget_bytes
    await score(scorer, **large)
    assert scorer.answer_cache.num_bytes == 0


async def test_an_engine_that_loads_too_late_does_not_end_a_drain() -> None:
    """A stop while loading is final."""
    engine = FakeEngine()
    scorer = Scorer(engine, LIMITS)
    scorer.begin_drain()
    scorer.open(await engine.start())
    with pytest.raises(DrainingError):
        await score(scorer)


async def test_the_manifest_takes_the_tighter_bound_and_adds_what_the_service_can_do() -> None:
    """The operator's and the engine's bounds meet in the manifest; wire types and idempotency come with any engine."""
    info = await FakeEngine(vocab_rows=10, max_model_len=5000).start()
    manifest = build_manifest(info, LIMITS)
    assert (manifest.max_num_logprobs, manifest.max_request_tokens, manifest.max_model_len) == (10, 1000, 5000)
    assert manifest.capabilities == {
        Capability.TEMPERATURE,
        Capability.CANDIDATES,
        Capability.ENTROPY,
        Capability.EXACT_TAIL_MASS,
        Capability.WIRE_FLOAT16,
        Capability.WIRE_BFLOAT16,
        Capability.IDEMPOTENCY,
    }
    assert manifest.service_version == service_version() != UNKNOWN_VERSION
