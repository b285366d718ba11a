"""The client and the service over a real connection, with the analytic teacher behind it.

Its distribution encodes the prefix length, so an answer that is shifted by one position fails here.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from protos.arrays import ScoreArrays
from protos.codec import WireDtype
from protos.manifest import TokenizerManifest
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.config import ServiceSettings
from teacher_service.engine.fake import FakeEngine, expected_logprobs
from teacher_service.errors import TeacherServiceError, all_error_classes
from teacher_service.server import TeacherServer
from teacher_service.telemetry import Telemetry, build_logger
from teacher_service.types import ScoreJob
from tests.support.waiting import until
from trainer.errors import (
    TeacherDeadlineError,
    TeacherError,
    TeacherFailedError,
    TeacherMismatchError,
    TeacherRefusedError,
    TeacherUnavailableError,
)
from trainer.teacher import ReplicaState, RetryPolicy, StudentInfo, TeacherClient
from trainer.teacher.canary import canary_token_ids
from trainer.teacher.channel import Endpoint
from trainer.teacher.retry import error_class, is_retryable

V = 32
PROMPT, RESPONSE = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]
TOKENS = PROMPT + RESPONSE
QUICK = RetryPolicy(max_attempts=5, initial_delay_s=0.01, max_delay_s=0.05)


class WatchedEngine(FakeEngine):
    """The analytic teacher, with events for what a test waits for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(vocab_rows=V, **settings)
        self.arrived = asyncio.Event()
        """Set once a job was admitted."""
        self.dropped = asyncio.Event()
        """Set once a job was cancelled."""

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        self.arrived.set()
        try:
            return await super().score(job)
        except asyncio.CancelledError:
            self.dropped.set()
            raise


@dataclass
class Service:
    """A running service and what a test reaches into."""

    engine: WatchedEngine
    server: TeacherServer
    endpoint: str
    stop: asyncio.Event
    running: asyncio.Task[None]


@asynccontextmanager
async def serving(
    engine: WatchedEngine | None = None, *, loading: bool = False, **limits: int
) -> AsyncIterator[Service]:
    """A service on free ports; ready on entering, unless `loading`."""
    engine = engine or WatchedEngine()
    settings = ServiceSettings(engine="fake", grpc_port=0, http_port=0, drain_timeout_s=5, **limits)
    telemetry = Telemetry(build_logger(level="error", log_format="json", file=io.StringIO()))
    server = TeacherServer(settings, engine, telemetry)
    stop, abort = asyncio.Event(), asyncio.Event()
    if loading:
        engine.loading_gate.clear()
    async with server.listening() as addresses:
        running = asyncio.create_task(server.run(stop=stop, abort=abort))
        try:
            if not loading:
                async with asyncio.timeout(10):
                    await server.ready.wait()
            yield Service(engine, server, addresses.grpc, stop, running)
        finally:
            stop.set()
            abort.set()
            engine.scoring_gate.set()
            await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving() as one:
        yield one


def expected(score_start: int, num_tokens: int = len(TOKENS), temperature: float = 1.0) -> np.ndarray:
    return expected_logprobs(range(score_start, num_tokens), vocab_rows=V, temperature=temperature)


@pytest.mark.parametrize("score_start", [1, len(PROMPT), len(TOKENS) - 1])
async def test_row_i_describes_the_token_at_score_start_plus_i(service: Service, score_start: int) -> None:
    """Ids, logprobs, sampled logprobs and tail mass are those of the prefix that predicted each token."""
    async with TeacherClient(endpoints=[service.endpoint]) as teacher:
        scores = await teacher.score(TOKENS, score_start=score_start, num_logprobs=4)
    logprobs_SV = expected(score_start)
    S = len(TOKENS) - score_start
    ids_SK = np.argsort(-logprobs_SV, axis=1)[:, :4]
    assert scores.topk_token_ids is not None
    assert scores.topk_token_ids[:, 0].tolist() == [n % V for n in range(score_start, len(TOKENS))]
    np.testing.assert_array_equal(scores.topk_token_ids, ids_SK)
    np.testing.assert_allclose(scores.topk_logprobs, np.take_along_axis(logprobs_SV, ids_SK, axis=1), atol=1e-5)
    np.testing.assert_allclose(scores.sampled_logprobs, logprobs_SV[np.arange(S), TOKENS[score_start:]], atol=1e-5)
    outside_S = 1 - np.exp(np.take_along_axis(logprobs_SV, ids_SK, axis=1)).sum(axis=1)
    np.testing.assert_allclose(scores.log_tail_mass, np.log(outside_S), atol=1e-5)


async def test_temperature_entropy_and_candidates_arrive(service: Service) -> None:
    """Everything optional is of the distribution at the asked temperature."""
    candidates_SC = np.array([[i, V - 1 - i] for i in range(len(RESPONSE))], dtype=np.int32)
    async with TeacherClient(endpoints=[service.endpoint]) as teacher:
        scores = await teacher.score(
            TOKENS,
            score_start=len(PROMPT),
            num_logprobs=0,
            temperature=0.5,
            candidate_token_ids=candidates_SC,
            return_entropy=True,
        )
    logprobs_SV = expected(len(PROMPT), temperature=0.5)
    assert scores.topk_token_ids is None
    np.testing.assert_allclose(
        scores.candidate_logprobs, np.take_along_axis(logprobs_SV, candidates_SC.astype(int), axis=1), atol=1e-5
    )
    np.testing.assert_allclose(scores.entropy, -(np.exp(logprobs_SV) * logprobs_SV).sum(axis=1), atol=1e-5)


@pytest.mark.parametrize(("wire_dtype", "atol"), [(WireDtype.FLOAT16, 0.01), (WireDtype.BFLOAT16, 0.06)])
async def test_smaller_wire_types_arrive_within_their_error(
    service: Service, wire_dtype: WireDtype, atol: float
) -> None:
    """The arrays are float32 again, off by no more than the wire's rounding."""
    async with TeacherClient(endpoints=[service.endpoint]) as teacher:
        exact = await teacher.score(TOKENS, score_start=2, num_logprobs=V)
        rounded = await teacher.score(TOKENS, score_start=2, num_logprobs=V, wire_dtype=wire_dtype)
    assert exact.topk_logprobs is not None
    assert rounded.topk_logprobs is not None
    assert rounded.topk_logprobs.dtype == np.float32
    np.testing.assert_allclose(rounded.topk_logprobs, exact.topk_logprobs, atol=atol)
    assert not np.array_equal(rounded.topk_logprobs, exact.topk_logprobs)


async def test_concurrent_calls_get_their_own_answers(service: Service) -> None:
    """Sixty sequences of different lengths at once, each answered by its own length."""
    async with TeacherClient(endpoints=[service.endpoint], max_inflight=16) as teacher:
        answers = await asyncio.gather(
            *(teacher.score([1] * (5 + i), score_start=3 + i, num_logprobs=1) for i in range(60))
        )
    for i, scores in enumerate(answers):
        assert scores.topk_token_ids is not None
        assert scores.topk_token_ids[:, 0].tolist() == [(3 + i) % V, (4 + i) % V]


async def test_the_manifest_is_the_services(service: Service) -> None:
    """The client shows what the service says, and answers repeat its digest."""
    async with TeacherClient(endpoints=[service.endpoint]) as teacher:
        scores = await teacher.score(TOKENS, score_start=2, num_logprobs=1)
        assert (teacher.manifest.model_name, teacher.manifest.vocab_rows) == ("fake", V)
        assert scores.manifest_digest == teacher.manifest.digest


async def test_an_overloaded_teacher_is_asked_again() -> None:
    """A call that the full queue refused is answered once there is room, and nobody was ejected for it."""
    async with serving(max_inflight_requests=1, max_queued_requests=0) as service:
        async with TeacherClient(endpoints=[service.endpoint], retry=QUICK) as teacher:
            service.engine.arrived.clear()
            service.engine.scoring_gate.clear()
            first = asyncio.ensure_future(teacher.score(TOKENS, score_start=2, num_logprobs=1))
            await service.engine.arrived.wait()
            with capture_logs() as logs:
                second = asyncio.ensure_future(teacher.score(TOKENS, score_start=3, num_logprobs=1))
                await until(lambda: "OVERLOADED" in {log.get("reason") for log in logs})
            service.engine.scoring_gate.set()
            assert (await first).timings.num_attempts == 1
            scores = await second
            assert teacher.replicas[0].state is ReplicaState.SERVING
        assert scores.timings.num_attempts >= 2
        assert scores.timings.total_s >= 0.05, "the service names at least 50 ms"


async def test_a_draining_teacher_hands_over_to_the_other() -> None:
    """Work under way on the draining replica is made on the other at once, and new work goes there."""
    async with serving() as first, serving() as second:
        async with TeacherClient(endpoints=[first.endpoint, second.endpoint], retry=QUICK) as teacher:
            first.engine.arrived.clear()
            first.engine.scoring_gate.clear()
            inflight = asyncio.ensure_future(teacher.score(TOKENS, score_start=2, num_logprobs=1))
            await first.engine.arrived.wait()
            first.stop.set()
            others = await asyncio.gather(*(teacher.score(TOKENS, score_start=3 + i, num_logprobs=1) for i in range(8)))
            scores = await inflight
            first.engine.scoring_gate.set()
        assert {one.endpoint for one in (*others, scores)} == {second.endpoint}


async def test_a_draining_teacher_ends_its_work_where_there_is_no_other(service: Service) -> None:
    """Nothing could be made elsewhere: what is under way is answered, and what comes later waits."""
    async with TeacherClient(endpoints=[service.endpoint], retry=QUICK) as teacher:
        service.engine.arrived.clear()
        service.engine.scoring_gate.clear()
        inflight = asyncio.ensure_future(teacher.score(TOKENS, score_start=2, num_logprobs=1))
        await service.engine.arrived.wait()
        service.stop.set()
        await until(lambda: not teacher.is_serving)
        service.engine.scoring_gate.set()
        scores = await inflight
        assert (scores.endpoint, scores.timings.num_attempts) == (service.endpoint, 1)


async def test_a_loading_teacher_is_waited_for() -> None:
    """A client that starts before the model is loaded enters once it is."""
    async with serving(loading=True) as service:
        with capture_logs() as logs:
            teacher = TeacherClient(endpoints=[service.endpoint])
            entering = asyncio.ensure_future(teacher.__aenter__())
            await until(lambda: "teacher is still loading" in {log["event"] for log in logs})
        service.engine.loading_gate.set()
        await entering
        assert teacher.manifest.engine == "fake"
        await teacher.close()


async def test_a_teacher_that_stays_loading_is_named() -> None:
    """The error carries the service's reason and the setting to raise."""
    async with serving(loading=True) as service:
        with pytest.raises(TeacherUnavailableError, match=r"still loading.*raise wait_ready_s") as caught:
            await TeacherClient(endpoints=[service.endpoint], wait_ready_s=0).__aenter__()
    assert caught.value.reason == "NOT_READY"


async def test_a_deadline_drops_the_work_in_the_engine(service: Service) -> None:
    """The service learns the client's deadline and takes the sequence out of the engine."""
    async with TeacherClient(endpoints=[service.endpoint], total_timeout_s=1.0) as teacher:
        service.engine.scoring_gate.clear()
        with pytest.raises(TeacherDeadlineError):
            await teacher.score(TOKENS, score_start=2, num_logprobs=1)
    async with asyncio.timeout(10):
        await service.engine.dropped.wait()
    assert service.engine.running == set()


@pytest.fixture
async def spare_token_id() -> int:
    """A token that the canary of these services does not hold."""
    async with serving() as service, TeacherClient(endpoints=[service.endpoint]) as teacher:
        return min(set(range(V)) - set(canary_token_ids(teacher.manifest)))


@pytest.mark.parametrize("fault", ["failing_token_id", "nan_token_id"])
async def test_an_engine_that_fails_on_one_sequence_fails_it_alone(fault: str, spare_token_id: int) -> None:
    """The error is the service's, no NaN arrives, and the next sequence is answered."""
    engine = WatchedEngine(**{fault: spare_token_id})
    async with serving(engine) as service, TeacherClient(endpoints=[service.endpoint], retry=QUICK) as teacher:
        others = [i for i in range(V) if i != spare_token_id]
        with pytest.raises(TeacherFailedError, match="after 3 attempts") as caught:
            await teacher.score([others[0], spare_token_id, others[1]], score_start=1, num_logprobs=1)
        assert caught.value.reason == "ENGINE_ERROR"
        await teacher.score(others[:5], score_start=2, num_logprobs=1)
        assert teacher.is_serving


async def test_an_engine_that_fails_on_the_canary_is_not_entered() -> None:
    """A teacher of which no answer can be checked is no teacher."""
    async with serving() as service, TeacherClient(endpoints=[service.endpoint]) as teacher:
        token_id = canary_token_ids(teacher.manifest)[0]
    async with serving(WatchedEngine(nan_token_id=token_id)) as service:
        with pytest.raises(TeacherFailedError, match="NaN"):
            await TeacherClient(endpoints=[service.endpoint]).__aenter__()


async def test_a_dead_engine_is_retried_elsewhere(spare_token_id: int) -> None:
    """The sequence that met a dying engine is answered by the other replica."""
    async with (
        serving(WatchedEngine(deadly_token_id=spare_token_id)) as first,
        serving() as second,
        TeacherClient(endpoints=[first.endpoint, second.endpoint], retry=QUICK) as teacher,
    ):
        scores = await teacher.score([1, spare_token_id, 2], score_start=1, num_logprobs=1)
        assert scores.timings.num_attempts == 2
        assert scores.endpoint == second.endpoint
        await until(lambda: teacher.replicas[0].state is ReplicaState.CONNECTING)


async def test_a_student_with_another_token_map_is_refused() -> None:
    """The difference is named before anything is scored."""
    vocabulary = {chr(97 + i): i for i in range(20)}
    engine = WatchedEngine(tokenizer=TokenizerManifest.from_vocabulary(vocabulary, {"eos": 0}))
    fits = StudentInfo(vocabulary=vocabulary, vocab_rows=24)
    swapped = StudentInfo(vocabulary=vocabulary | {"c": 3, "d": 2}, vocab_rows=24)
    async with serving(engine) as service:
        async with TeacherClient(endpoints=[service.endpoint], student=fits) as teacher:
            await teacher.score(TOKENS, score_start=2, num_logprobs=1)
        with pytest.raises(TeacherMismatchError, match="among the ids 0 to 1023"):
            await TeacherClient(endpoints=[service.endpoint], student=swapped).__aenter__()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.ScoreRequest(score_start=1), "EMPTY_SEQUENCE"),
        (pb.ScoreRequest(token_ids=TOKENS), "SCORE_START_OUT_OF_RANGE"),
        (pb.ScoreRequest(token_ids=TOKENS, score_start=-1), "SCORE_START_OUT_OF_RANGE"),
        (pb.ScoreRequest(token_ids=TOKENS, score_start=len(TOKENS)), "SCORE_START_OUT_OF_RANGE"),
        (pb.ScoreRequest(token_ids=[1, V], score_start=1), "TOKEN_ID_OUT_OF_RANGE"),
        (pb.ScoreRequest(token_ids=[1] * 5000, score_start=1), "SEQUENCE_TOO_LONG"),
        (pb.ScoreRequest(token_ids=TOKENS, score_start=1, num_logprobs=V + 1), "NUM_LOGPROBS_OUT_OF_RANGE"),
        (pb.ScoreRequest(token_ids=TOKENS, score_start=1, temperature=0.0), "INVALID_TEMPERATURE"),
    ],
)
async def test_a_refusal_keeps_the_services_reason(service: Service, request_: pb.ScoreRequest, reason: str) -> None:
    """What slips past the client's own checks, as with an older client, arrives as the service's refusal."""
    endpoint = Endpoint(service.endpoint, connect_timeout_s=5.0, max_receive_bytes=1 << 20, max_send_bytes=1 << 20)
    try:
        with pytest.raises(TeacherRefusedError) as caught:
            await endpoint.score(request_, timeout_s=10.0)
    finally:
        await endpoint.close()
    assert caught.value.reason == reason
    assert caught.value.metadata


@pytest.mark.parametrize("cls", all_error_classes())
def test_both_sides_agree_on_what_may_be_retried(cls: type[TeacherServiceError]) -> None:
    """The client's policy follows the service's table for every error in it."""
    error: TeacherError = error_class(cls.grpc_code, cls.reason)("x", endpoint="e:1", reason=cls.reason)
    assert is_retryable(error) is cls.retryable
