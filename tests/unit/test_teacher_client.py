"""The client against scripted teachers on real gRPC servers: retries, deadlines, refusals, closing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from protos.arrays import ScoreArrays
from protos.manifest import Capability, TokenizerManifest
from protos.teacher.v1 import teacher_pb2 as pb
from tests.support.teacher_stub import (
    Context,
    TeacherStub,
    abort,
    answers,
    black_hole,
    fails,
    hangs,
    running_stub,
    stub_manifest,
    uniform_answer,
)
from tests.support.waiting import until
from trainer.errors import (
    ConfigError,
    GKDError,
    TeacherAnswerError,
    TeacherDeadlineError,
    TeacherError,
    TeacherFailedError,
    TeacherMismatchError,
    TeacherOverloadedError,
    TeacherRefusedError,
    TeacherRequestError,
    TeacherUnavailableError,
)
from trainer.teacher import ReplicaState, RetryPolicy, ScoringPlan, StudentInfo, TeacherClient
from trainer.types import TeacherScores

TOKENS = [5, 6, 7, 8, 9]
CODE = grpc.StatusCode
QUICK = RetryPolicy(max_attempts=4, initial_delay_s=0.01, max_delay_s=0.05)


@pytest.fixture
async def stub() -> AsyncIterator[TeacherStub]:
    async with running_stub() as one:
        yield one


@pytest.fixture
def client() -> Callable[..., TeacherClient]:
    """Makes clients that try again at once."""

    def make(*endpoints: str, **settings: object) -> TeacherClient:
        return TeacherClient(endpoints=endpoints, **({"retry": QUICK} | settings))  # type: ignore[arg-type]

    return make


async def score(teacher: TeacherClient, num_logprobs: int = 3) -> TeacherScores:
    return await teacher.score(TOKENS, score_start=2, num_logprobs=num_logprobs)


async def test_a_score_has_the_arrays_that_were_asked_for(stub: TeacherStub) -> None:
    """S positions, K ids and logprobs each, and who answered."""
    async with TeacherClient(endpoints=[stub.endpoint]) as teacher:
        scores = await score(teacher)
    assert scores.topk_token_ids is not None
    assert scores.topk_token_ids.tolist() == [[0, 1, 2]] * 3
    np.testing.assert_allclose(scores.sampled_logprobs, [-np.log(32)] * 3, rtol=1e-6)
    np.testing.assert_allclose(scores.log_tail_mass, [np.log(29 / 32)] * 3, rtol=1e-5)
    assert (scores.endpoint, scores.manifest_digest) == (stub.endpoint, stub.manifest.digest)
    sent = stub.requests[0]
    assert (list(sent.token_ids), sent.score_start, sent.num_logprobs) == (TOKENS, 2, 3)
    assert not sent.HasField("temperature")
    assert not sent.HasField("idempotency_key")


async def test_zero_logprobs_gives_the_sampled_token_alone(stub: TeacherStub) -> None:
    """What was not asked for is absent, not zero."""
    async with TeacherClient(endpoints=[stub.endpoint]) as teacher:
        scores = await score(teacher, num_logprobs=0)
    assert scores.sampled_logprobs.shape == (3,)
    assert (scores.topk_token_ids, scores.topk_logprobs, scores.log_tail_mass, scores.entropy) == (None,) * 4


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (CODE.UNAVAILABLE, "DRAINING"),
        (CODE.UNAVAILABLE, None),
        (CODE.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    ],
)
async def test_a_passing_failure_is_retried(
    stub: TeacherStub,
    client: Callable[..., TeacherClient],
    code: grpc.StatusCode,
    reason: str | None,
) -> None:
    """Two failures and an answer are an answer."""
    async with client(stub.endpoint) as teacher:
        stub.script.extend([fails(code, reason)] * 2)
        scores = await score(teacher)
    assert len(stub.requests) == 3
    assert scores.timings.num_attempts == 3


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (CODE.INVALID_ARGUMENT, "SEQUENCE_TOO_LONG", TeacherRefusedError),
        (CODE.FAILED_PRECONDITION, "MISSING_CAPABILITY", TeacherRefusedError),
        (CODE.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", TeacherRefusedError),
        (CODE.RESOURCE_EXHAUSTED, None, TeacherRefusedError),
        (CODE.UNIMPLEMENTED, None, TeacherRefusedError),
    ],
)
async def test_a_lasting_failure_is_not_retried(
    stub: TeacherStub,
    client: Callable[..., TeacherClient],
    code: grpc.StatusCode,
    reason: str | None,
    error: type[TeacherError],
) -> None:
    """It is raised at once, with the service's words, reason and metadata, and the client lives on."""
    async with client(stub.endpoint) as teacher:
        stub.script.append(fails(code, reason, message="the value is 9"))
        with pytest.raises(error, match="the value is 9") as caught:
            await score(teacher)
        assert caught.value.reason == (reason or code.name)
        assert caught.value.metadata == ({"limit": "7"} if reason else {})
        assert len(stub.requests) == 1
        await score(teacher)


async def test_a_teacher_that_fails_on_a_sequence_is_asked_three_times(
    stub: TeacherStub, client: Callable[..., TeacherClient]
) -> None:
    """A fault may pass; a sequence that it follows everywhere fails, and the client lives on."""
    async with client(stub.endpoint, retry=RetryPolicy(initial_delay_s=0.01)) as teacher:
        stub.script.extend([fails(CODE.INTERNAL, "ENGINE_ERROR", message="broke on it")] * 3)
        with pytest.raises(TeacherFailedError, match=r"broke on it after 3 attempts in .* s; see the teacher's log"):
            await score(teacher)
        assert len(stub.requests) == 3
        stub.script.append(fails(CODE.INTERNAL, "ENGINE_ERROR"))
        await score(teacher)


async def test_the_delay_that_the_service_names_is_kept(
    stub: TeacherStub, client: Callable[..., TeacherClient]
) -> None:
    """RetryInfo's 0.3 s are waited for, by other calls too."""
    async with client(stub.endpoint) as teacher:
        stub.script.append(fails(CODE.RESOURCE_EXHAUSTED, "OVERLOADED", retry_delay_s=0.3))
        first = asyncio.ensure_future(score(teacher))
        await stub.arrived.wait()
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(score(teacher, num_logprobs=2))
        assert (await first).timings.total_s >= 0.3
        assert (await second).timings.waited_s >= 0.1
        assert len(stub.requests) == 3
        assert teacher.replicas[0].state is ReplicaState.SERVING


async def test_a_delay_beyond_the_deadline_is_not_waited_for(
    stub: TeacherStub, client: Callable[..., TeacherClient]
) -> None:
    """A service that wants an hour gets its error raised now."""
    async with client(stub.endpoint, total_timeout_s=30.0) as teacher:
        stub.script.append(fails(CODE.RESOURCE_EXHAUSTED, "OVERLOADED", retry_delay_s=3600))
        started_s = time.monotonic()
        with pytest.raises(TeacherOverloadedError, match="after 1 attempt in"):
            await score(teacher)
    assert time.monotonic() - started_s < 20


async def test_retries_end_after_the_attempts_allowed(stub: TeacherStub, client: Callable[..., TeacherClient]) -> None:
    """Four attempts, and an error that says so and what to do."""
    async with client(stub.endpoint) as teacher:
        stub.script.extend([fails(CODE.RESOURCE_EXHAUSTED, "OVERLOADED", message="queue is full")] * 9)
        with pytest.raises(TeacherOverloadedError, match=r"queue is full after 4 attempts in .* s; lower max_inflight"):
            await score(teacher)
    assert len(stub.requests) == 4


async def test_a_slow_attempt_is_repeated_while_time_remains(
    stub: TeacherStub, client: Callable[..., TeacherClient]
) -> None:
    """The attempt's deadline is shorter than the call's."""
    async with client(stub.endpoint, timeout_s=1.0) as teacher:
        stub.script.append(hangs)
        scores = await score(teacher)
    assert len(stub.requests) == 2
    assert scores.timings.total_s >= 1.0


async def test_the_total_deadline_bounds_attempts_and_waits(stub: TeacherStub) -> None:
    """A teacher that never answers costs total_timeout_s and no more, whatever the retries allow."""
    async with TeacherClient(endpoints=[stub.endpoint], timeout_s=0.2, total_timeout_s=0.5) as teacher:
        stub.script.extend([hangs] * 99)
        started_s = time.monotonic()
        with pytest.raises(TeacherDeadlineError, match=stub.endpoint):
            await score(teacher)
        elapsed_s = time.monotonic() - started_s
    assert 0.3 < elapsed_s < 10  # the 99 attempts would take 20 s
    assert len(stub.requests) >= 2


async def test_a_black_hole_ends_at_the_deadline() -> None:
    """A server that accepts and stays silent fails the start within connect_timeout_s, and is named."""
    async with black_hole() as endpoint:
        started_s = time.monotonic()
        # the call's deadline and the handshake's end at the same instant: either may be first
        with pytest.raises((TeacherDeadlineError, TeacherUnavailableError), match=rf"{endpoint}.* after 1 attempt in"):
            await TeacherClient(endpoints=[endpoint], connect_timeout_s=0.5).__aenter__()
        assert 0.4 < time.monotonic() - started_s < 10


async def test_a_teacher_that_is_gone_is_named_with_the_remedy(unused_tcp_port: int) -> None:
    """The error says where, why, how often, how long, and both ways out."""
    with pytest.raises(TeacherUnavailableError) as caught:
        await TeacherClient(endpoints=[f"127.0.0.1:{unused_tcp_port}"], connect_timeout_s=0.5).__aenter__()
    message = str(caught.value)
    assert f"no teacher answers at 127.0.0.1:{unused_tcp_port} (connection refused) after " in message
    assert "python -m teacher_service serve --model PATH --grpc-port 15555" in message
    assert "actor_rollout_ref.teacher.server_ip/server_port" in message
    assert caught.value.reason == "UNREACHABLE"


async def test_a_loading_teacher_is_waited_for(stub: TeacherStub, client: Callable[..., TeacherClient]) -> None:
    """NOT_READY is waited out beyond connect_timeout_s, with a log line per attempt."""

    async def loading(context: Context) -> None:
        await abort(context, CODE.UNAVAILABLE, "NOT_READY", "loading", None)

    stub.manifest_script.extend([loading] * 3)
    with capture_logs() as logs:
        async with client(stub.endpoint, wait_ready_s=60.0) as teacher:
            assert teacher.manifest == stub.manifest
    assert [log["event"] for log in logs].count("teacher is still loading") == 3


async def test_a_teacher_that_loads_too_long_is_given_up(
    stub: TeacherStub, client: Callable[..., TeacherClient]
) -> None:
    """The wait would pass wait_ready_s, though not connect_timeout_s."""

    async def loading(context: Context) -> None:
        await abort(context, CODE.UNAVAILABLE, "NOT_READY", "loading", None)

    stub.manifest_script.extend([loading] * 9)
    patient = RetryPolicy(initial_delay_s=1.0, jitter=0.0)
    with pytest.raises(TeacherUnavailableError, match=r"loading after 1 attempt in .*; raise wait_ready_s"):
        await client(stub.endpoint, wait_ready_s=0.5, connect_timeout_s=60.0, retry=patient).__aenter__()


async def test_a_wrong_answer_is_asked_for_again(stub: TeacherStub, client: Callable[..., TeacherClient]) -> None:
    """NaN on the wire never arrives; a teacher that insists on it fails the call with its name."""
    answer = uniform_answer(pb.ScoreRequest(token_ids=TOKENS, score_start=2, num_logprobs=3), stub.manifest)
    answer.sampled_logprobs = np.full(3, np.nan, dtype="<f4").tobytes()
    answer.ClearField("payload_crc32")
    async with client(stub.endpoint) as teacher:
        stub.script.extend([answers(answer)] * 2)
        scores = await score(teacher)
        assert np.isfinite(scores.sampled_logprobs).all()
        assert len(stub.requests) == 3
        stub.script.extend([answers(answer)] * 3)
        with pytest.raises(TeacherAnswerError, match=f"{stub.endpoint} is invalid: sampled_logprobs holds NaN"):
            await score(teacher)
        assert len(stub.requests) == 6


async def test_an_argument_out_of_range_is_refused_before_sending(
    stub: TeacherStub, client: Callable[..., TeacherClient]
) -> None:
    """The service hears nothing of a call that can't succeed."""
    async with client(stub.endpoint) as teacher:
        with pytest.raises(TeacherRequestError, match=r"score_start is 0, must be in \[1, 5\)"):
            await teacher.score(TOKENS, score_start=0, num_logprobs=3)
    assert stub.requests == []


async def test_a_teacher_replaced_before_the_first_call_is_refused(stub: TeacherStub) -> None:
    """A client told of the manifest that another one checked takes that teacher alone; nothing is scored."""
    async with TeacherClient(endpoints=[stub.endpoint], expected_digest=stub.manifest.digest) as teacher:
        await score(teacher)
    other = stub_manifest(model_name="other").digest
    with pytest.raises(TeacherMismatchError, match="replaced during the run") as caught:
        await TeacherClient(endpoints=[stub.endpoint], expected_digest=other).__aenter__()
    assert caught.value.reason == "MANIFEST_CHANGED"
    assert caught.value.metadata == {"digest": stub.manifest.digest, "checked": other}
    assert len(stub.requests) == 1


async def test_a_replaced_teacher_is_refused(stub: TeacherStub, client: Callable[..., TeacherClient]) -> None:
    """An answer with another digest than the checked one is another teacher's: it is out, and the fields are named."""
    async with client(stub.endpoint, total_timeout_s=1.5) as teacher:
        stub.manifest = stub_manifest(model_name="another")
        with pytest.raises(TeacherMismatchError, match=r"\(model_name: stub / another\): it was replaced"):
            await score(teacher)
        assert teacher.replicas[0].state is ReplicaState.QUARANTINED
        assert not teacher.is_serving


async def test_an_answer_larger_than_the_manifest_allows_is_not_read(
    stub: TeacherStub, client: Callable[..., TeacherClient]
) -> None:
    """The channel takes what the teacher can owe, not what it cares to send."""
    async with client(stub.endpoint) as teacher:
        stub.script.append(answers(pb.ScoreResponse(sampled_logprobs=bytes(1 << 21))))
        with pytest.raises(TeacherRefusedError, match="RESOURCE_EXHAUSTED"):
            await score(teacher)


async def test_the_largest_answer_fits_the_channel() -> None:
    """All tokens but one scored with the largest K pass."""
    manifest = stub_manifest(vocab_rows=1000, max_num_logprobs=900, max_request_tokens=2000)
    async with running_stub(manifest) as stub, TeacherClient(endpoints=[stub.endpoint]) as teacher:
        scores = await teacher.score([1] * 2000, score_start=1, num_logprobs=900)
    assert scores.topk_logprobs is not None
    assert scores.topk_logprobs.shape == (1999, 900)


async def test_a_teacher_id_beyond_the_students_rows_is_refused(
    stub: TeacherStub, client: Callable[..., TeacherClient]
) -> None:
    """A teacher's padding row in the top-k would index past the student's logits."""
    student = StudentInfo(vocabulary={"a": 0, "b": 1}, vocab_rows=2)
    async with client(stub.endpoint, student=student) as teacher:
        await score(teacher, num_logprobs=2)
        with pytest.raises(TeacherAnswerError, match="token id 2, the student's LM head has 2 rows"):
            await score(teacher, num_logprobs=3)


async def test_retries_carry_one_idempotency_key(client: Callable[..., TeacherClient]) -> None:
    """A teacher that deduplicates sees the same key again for a retry, and another for another call."""
    manifest = stub_manifest(capabilities=frozenset({Capability.IDEMPOTENCY}))
    async with running_stub(manifest) as stub, client(stub.endpoint) as teacher:
        stub.script.append(fails(CODE.UNAVAILABLE, "DRAINING"))
        await score(teacher)
        await score(teacher, num_logprobs=2)
    keys = [request.idempotency_key for request in stub.requests]
    assert keys[0] == keys[1] != keys[2]
    assert len(keys[0]) == 64


async def test_a_retry_goes_to_another_endpoint(client: Callable[..., TeacherClient]) -> None:
    """With a second endpoint there is no need to wait as long as the first one asked."""
    async with running_stub() as first, running_stub() as second, client(first.endpoint, second.endpoint) as teacher:
        first.script.append(fails(CODE.RESOURCE_EXHAUSTED, "OVERLOADED", retry_delay_s=3600))
        scores = [await score(teacher) for _ in range(4)]
        assert {one.endpoint for one in scores} == {second.endpoint}
        assert [one.timings.num_attempts for one in scores] == [2, 1, 1, 1]
        assert len(first.requests) == 1
        assert [one.state for one in teacher.replicas] == [ReplicaState.SERVING] * 2


async def test_an_endpoint_that_dies_in_a_call_is_left(client: Callable[..., TeacherClient]) -> None:
    """The connection breaks under a call; the call is answered by the other endpoint."""
    async with running_stub() as first, running_stub() as second, client(first.endpoint, second.endpoint) as teacher:
        first.gate.clear()
        second.gate.clear()
        calls = [asyncio.ensure_future(score(teacher, num_logprobs)) for num_logprobs in (1, 2)]
        await until(lambda: first.num_running == second.num_running == 1)
        await first.stop()
        second.gate.set()
        assert {scores.endpoint for scores in await asyncio.gather(*calls)} == {second.endpoint}
        assert {(await score(teacher)).endpoint for _ in range(4)} == {second.endpoint}


async def test_endpoints_of_different_teachers_are_refused() -> None:
    """The fields that differ are named with both values."""
    async with running_stub() as first, running_stub(stub_manifest(model_name="other", vocab_rows=64)) as second:
        with pytest.raises(TeacherMismatchError) as caught:
            await TeacherClient(endpoints=[first.endpoint, second.endpoint]).__aenter__()
    message = str(caught.value)
    assert f"the teachers at {first.endpoint} and {second.endpoint} differ in" in message
    assert "model_name: stub / other; vocab_rows: 32 / 64;" in message
    assert "dtype" not in message


async def test_one_reachable_endpoint_is_enough_to_start(unused_tcp_port: int) -> None:
    """The other one is named in the log, and tried on and on behind it."""
    missing = f"127.0.0.1:{unused_tcp_port}"
    async with running_stub() as stub:
        with capture_logs() as logs:
            async with TeacherClient(endpoints=[missing, stub.endpoint]) as teacher:
                assert (await score(teacher)).endpoint == stub.endpoint
                assert [one.state for one in teacher.replicas] == [ReplicaState.CONNECTING, ReplicaState.SERVING]
        assert missing in {log["endpoint"] for log in logs if "tried in the background" in log["event"]}


async def test_an_endpoint_that_is_silent_holds_the_start_no_longer_than_allowed() -> None:
    """Entering waits connect_timeout_s for it, and goes on with the one that answers."""
    async with running_stub() as stub, black_hole() as silent:
        started_s = time.monotonic()
        async with TeacherClient(endpoints=[silent, stub.endpoint], connect_timeout_s=0.5) as teacher:
            assert time.monotonic() - started_s < 10
            assert (await score(teacher)).endpoint == stub.endpoint


async def test_a_teacher_that_does_not_fit_is_refused_before_use() -> None:
    """Student and plan are checked on entering; nothing is scored."""
    manifest = stub_manifest(tokenizer=TokenizerManifest.from_vocabulary({"a": 0, "b": 1}, {}))
    student = StudentInfo(vocabulary={"a": 0, "c": 1}, vocab_rows=2)
    async with running_stub(manifest) as stub:
        with pytest.raises(TeacherMismatchError, match="token maps differ"):
            await TeacherClient(endpoints=[stub.endpoint], student=student).__aenter__()
        with pytest.raises(TeacherMismatchError, match="num_logprobs is 17"):
            await TeacherClient(endpoints=[stub.endpoint], plan=ScoringPlan(num_logprobs=17)).__aenter__()
        assert stub.requests == []


async def test_a_client_is_entered_before_use_and_once(stub: TeacherStub) -> None:
    """Misuse is named instead of failing somewhere inside."""
    teacher = TeacherClient(endpoints=[stub.endpoint])
    with pytest.raises(GKDError, match="use `async with"):
        await score(teacher)
    async with teacher:
        with pytest.raises(GKDError, match="entered before"):
            await teacher.__aenter__()
    with pytest.raises(GKDError, match="entered before"):
        await teacher.__aenter__()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"endpoints": []}, "at least one"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"total_timeout_s": float("inf")}, "total_timeout_s is inf"),
        ({"connect_timeout_s": float("nan")}, "connect_timeout_s is nan"),
        ({"wait_ready_s": -1.0}, "wait_ready_s is -1.0"),
        ({"max_inflight": 0}, "max_inflight is 0"),
        ({"health_period_s": 0.0}, "health_period_s is 0.0"),
        ({"canary_tolerance": 0.0}, "canary_tolerance is 0.0"),
        ({"hedge_percentile": 0.5}, "hedge_percentile is 0.5"),
        ({"hedge_percentile": 1.0}, "hedge_percentile is 1.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, object], words: str) -> None:
    """It fails when the client is made, with the value."""
    with pytest.raises(ConfigError, match=words):
        TeacherClient(**({"endpoints": ["host:1"]} | settings))  # type: ignore[arg-type]


def test_a_client_works_in_any_event_loop() -> None:
    """It is made outside of a loop, and two loops in a row have a client each."""

    async def one_call(make: Callable[[str], TeacherClient]) -> TeacherScores:
        async with running_stub() as stub, make(stub.endpoint) as teacher:
            return await score(teacher)

    for _ in range(2):
        scores = asyncio.run(one_call(lambda endpoint: TeacherClient(endpoints=[endpoint])))
        assert isinstance(scores, ScoreArrays)
