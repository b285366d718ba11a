"""Replicas that die, hang, lie, come back, are replaced, or change their addresses under a client."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from protos.teacher.v1 import teacher_pb2 as pb
from tests.support.teacher_stub import Context, TeacherStub, fails, running_stub, stub_manifest, uniform_answer
from tests.support.waiting import until
from trainer.errors import TeacherMismatchError, TeacherUnavailableError
from trainer.teacher import ReplicaState, RetryPolicy, TeacherClient
from trainer.types import TeacherScores

QUICK = RetryPolicy(max_attempts=1000, initial_delay_s=0.01, max_delay_s=0.05)
PERIOD_S = 0.4
"""Health period: long enough for a loaded machine, short enough for a test."""


def client(endpoints: Sequence[str] | str, **settings: object) -> TeacherClient:
    usual: dict[str, object] = {"retry": QUICK, "health_period_s": PERIOD_S}
    return TeacherClient(endpoints=endpoints, **(usual | settings))  # type: ignore[arg-type]


async def score(teacher: TeacherClient, number: int = 0) -> TeacherScores:
    """Score a sequence that differs by its number."""
    return await teacher.score([5, 6, number % 32, number // 32], score_start=1, num_logprobs=3)


async def scores(teacher: TeacherClient, number: int) -> Counter[str]:
    """Who answered so many different calls at once."""
    return Counter(one.endpoint for one in await asyncio.gather(*(score(teacher, i) for i in range(number))))


def state(teacher: TeacherClient, stub: TeacherStub) -> ReplicaState:
    return next(one.state for one in teacher.replicas if one.name == stub.endpoint)


async def becomes(teacher: TeacherClient, stub: TeacherStub, wanted: ReplicaState) -> None:
    await until(lambda: state(teacher, stub) is wanted)


async def test_a_replica_that_is_killed_is_left_and_used_again_once_it_is_back() -> None:
    """Its calls are made elsewhere; after the restart it is checked and gets its share again."""
    async with (
        running_stub() as first,
        running_stub() as second,
        client([first.endpoint, second.endpoint]) as teacher,
    ):
        first.gate.clear()
        second.gate.clear()
        calls = [asyncio.create_task(score(teacher, i)) for i in range(4)]
        await until(lambda: first.num_running == second.num_running == 2)
        await first.stop()
        second.gate.set()
        assert {one.endpoint for one in await asyncio.gather(*calls)} == {second.endpoint}
        await becomes(teacher, first, ReplicaState.CONNECTING)
        assert await scores(teacher, 8) == {second.endpoint: 8}
        first.gate.set()
        num_canaries = first.num_canaries
        await first.start()
        await becomes(teacher, first, ReplicaState.SERVING)
        assert first.num_canaries == num_canaries + 1
        assert (await scores(teacher, 8))[first.endpoint] > 0


async def test_calls_wait_for_the_only_replica_to_come_back() -> None:
    """Those under way and those that come meanwhile; nothing is lost, and the replica is not stormed."""
    async with running_stub() as stub, client([stub.endpoint]) as teacher:
        stub.gate.clear()
        calls = [asyncio.create_task(score(teacher, i)) for i in range(4)]
        await until(lambda: stub.num_running == 4)
        await stub.stop()
        await until(lambda: not teacher.is_serving)
        calls += [asyncio.create_task(score(teacher, i)) for i in range(4, 8)]
        stub.gate.set()
        await asyncio.sleep(0.1)
        num_requests = len(stub.requests)
        await stub.start()
        answers = await asyncio.gather(*calls)
    assert len(answers) == 8
    assert len(stub.requests) == num_requests + 8
    assert all(one.timings.waited_s > 0 for one in answers)


async def test_a_replica_that_says_not_serving_is_out_at_once() -> None:
    """What it had under way is made elsewhere, long before the next health check; SERVING brings it back."""
    async with (
        running_stub() as first,
        running_stub() as second,
        client([first.endpoint, second.endpoint], health_period_s=60.0) as teacher,
    ):
        first.gate.clear()
        second.gate.clear()
        calls = [asyncio.create_task(score(teacher, i)) for i in range(2)]
        await until(lambda: first.num_running == second.num_running == 1)
        await first.set_serving(False)
        await until(lambda: first.num_cancelled == 1)
        second.gate.set()
        assert {one.endpoint for one in await asyncio.gather(*calls)} == {second.endpoint}
        assert "NOT_SERVING" in str(next(one.last_error for one in teacher.replicas if one.name == first.endpoint))
        first.gate.set()
        await first.set_serving(True)
        await becomes(teacher, first, ReplicaState.SERVING)


async def test_a_replica_that_hangs_is_out_after_two_silent_checks() -> None:
    """As one that was stopped or black-holed: its attempts end and are made elsewhere, far below their deadline."""
    async with (
        running_stub() as first,
        running_stub() as second,
        client([first.endpoint, second.endpoint]) as teacher,
    ):
        first.thawed.clear()
        second.gate.clear()
        calls = [asyncio.create_task(score(teacher, i)) for i in range(2)]
        await until(lambda: first.num_running == second.num_running == 1)
        second.gate.set()
        assert {one.endpoint for one in await asyncio.gather(*calls)} == {second.endpoint}
        await becomes(teacher, first, ReplicaState.CONNECTING)
        first.thawed.set()
        await becomes(teacher, first, ReplicaState.SERVING)


async def test_one_silent_check_is_no_death() -> None:
    """A teacher whose processor is busy for a moment stays in rotation, and is never connected anew."""
    async with running_stub() as stub, client([stub.endpoint], health_period_s=1.0) as teacher:
        num_manifests, num_checks = stub.num_manifests, stub.num_checks
        stub.num_silent_checks = 1
        await until(lambda: stub.num_checks >= num_checks + 3)
        assert teacher.is_serving
        assert stub.num_manifests == num_manifests


async def test_a_teacher_without_a_health_service_is_watched_all_the_same() -> None:
    """An answer is an answer, and a connection that breaks is seen."""
    async with running_stub(has_health=False) as stub, client([stub.endpoint]) as teacher:
        await asyncio.sleep(2 * PERIOD_S)
        assert teacher.is_serving
        await stub.stop()
        await becomes(teacher, stub, ReplicaState.CONNECTING)


async def test_another_teacher_on_a_replicas_address_is_quarantined() -> None:
    """After a restart with another model no call reaches it, the log names the fields once; the right one is let in."""
    async with running_stub() as first, running_stub() as second:
        with capture_logs() as logs:
            async with client([first.endpoint, second.endpoint], canary_period_s=0.2) as teacher:
                await first.stop()
                right, first.manifest = first.manifest, stub_manifest(model_name="another")
                await first.start()
                await becomes(teacher, first, ReplicaState.QUARANTINED)
                num_manifests = first.num_manifests
                assert await scores(teacher, 8) == {second.endpoint: 8}
                await until(lambda: first.num_manifests >= num_manifests + 3)
                assert first.requests == []
                first.manifest = right
                await becomes(teacher, first, ReplicaState.SERVING)
    errors = [log["error"] for log in logs if log["event"] == "teacher replica quarantined"]
    assert len(errors) == 1
    assert "model_name: stub / another" in errors[0]


async def test_an_answer_of_another_teacher_is_made_elsewhere() -> None:
    """A teacher replaced behind one connection, as behind a proxy, is found by its first answer."""
    async with (
        running_stub() as first,
        running_stub() as second,
        client([first.endpoint, second.endpoint]) as teacher,
    ):
        first.manifest = stub_manifest(model_name="another")
        assert await scores(teacher, 8) == {second.endpoint: 8}
        await becomes(teacher, first, ReplicaState.QUARANTINED)
        error = next(one.last_error for one in teacher.replicas if one.name == first.endpoint)
        assert error is not None
        assert "model_name: stub / another" in error


async def test_a_damaged_digest_is_no_other_teacher() -> None:
    """The teacher itself still names the right manifest: it is connected anew and used, not kept out for minutes."""

    async def damaged(request: pb.ScoreRequest, _context: Context) -> pb.ScoreResponse:
        answer = uniform_answer(request, stub_manifest())
        answer.manifest_digest = answer.manifest_digest[:-1] + "?"
        return answer

    async with running_stub() as stub, client([stub.endpoint], canary_period_s=300.0) as teacher:
        stub.script.append(damaged)
        with capture_logs() as logs:
            answer = await score(teacher)
        assert answer.endpoint == stub.endpoint
        assert state(teacher, stub) is ReplicaState.SERVING
    assert "DAMAGED_ANSWER" in [line.get("reason") for line in logs]


async def drifted(request: pb.ScoreRequest, _context: Context) -> pb.ScoreResponse:
    answer = uniform_answer(request, stub_manifest())
    logprobs = np.full(len(request.token_ids) - 1, -np.log(32) - 0.5, dtype="<f4")
    answer.sampled_logprobs = logprobs.tobytes()
    answer.ClearField("payload_crc32")
    return answer


async def test_a_replica_whose_canary_drifts_is_quarantined_until_it_answers_as_before() -> None:
    """The manifest says the same, the numbers do not."""
    async with running_stub() as first, running_stub() as second:
        with capture_logs() as logs:
            async with client([first.endpoint, second.endpoint], canary_period_s=0.2) as teacher:
                first.canary_script.extend([drifted] * 3)
                await becomes(teacher, first, ReplicaState.QUARANTINED)
                assert await scores(teacher, 4) == {second.endpoint: 4}
                await becomes(teacher, first, ReplicaState.SERVING)
                assert not first.canary_script
    errors = [log["error"] for log in logs if log["event"] == "teacher replica quarantined"]
    assert len(errors) == 1
    assert "0.5 nats per token off the reference" in errors[0]


async def test_a_reference_of_another_client_is_kept_to() -> None:
    """Two clients of a run compare with one answer; entering refuses a teacher that gives another."""
    async with running_stub() as stub:
        async with client([stub.endpoint]) as teacher:
            reference = teacher.canary_reference
        async with client([stub.endpoint], canary_reference=reference):
            pass
        with pytest.raises(TeacherMismatchError, match=r"0\.5 nats per token off"):
            await client([stub.endpoint], canary_reference=reference - np.float32(0.5)).__aenter__()


async def test_a_replica_that_fails_fast_is_ejected() -> None:
    """Always idle, it draws no traffic: forty calls cost a handful of failures."""
    async with (
        running_stub() as first,
        running_stub() as second,
        client([first.endpoint, second.endpoint]) as teacher,
    ):
        first.script.extend([fails(grpc.StatusCode.INTERNAL, "ENGINE_ERROR")] * 1000)
        for _ in range(5):
            assert await scores(teacher, 8) == {second.endpoint: 8}
        await becomes(teacher, first, ReplicaState.EJECTED)
        assert len(first.requests) < 15
        first.script.clear()
        for i in range(1000):
            if state(teacher, first) is ReplicaState.SERVING:
                break
            await score(teacher, i)
            await asyncio.sleep(0.02)
        assert state(teacher, first) is ReplicaState.SERVING


async def test_the_only_replica_may_be_ejected_too() -> None:
    """Calls wait for its probe then."""
    async with running_stub() as stub, client([stub.endpoint], health_period_s=60.0) as teacher:
        stub.script.extend([fails(grpc.StatusCode.UNAVAILABLE, "DRAINING")] * 5)
        call = asyncio.create_task(score(teacher))
        await becomes(teacher, stub, ReplicaState.EJECTED)
        assert not teacher.is_serving
        assert (await call).timings.num_attempts == 6
        assert teacher.is_serving


async def test_a_replica_that_is_overloaded_is_never_ejected() -> None:
    """Twenty refusals in a row."""
    async with running_stub() as stub, client([stub.endpoint], health_period_s=60.0) as teacher:
        stub.script.extend([fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_delay_s=0.001)] * 20)
        call = asyncio.create_task(score(teacher))
        states = set()
        while not call.done():
            states.add(state(teacher, stub))
            await asyncio.sleep(0.005)
        assert states == {ReplicaState.SERVING}
        assert (await call).timings.num_attempts == 21


class Names:
    """A name server of which the test says what it answers."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] | TeacherUnavailableError = addresses
        self.num_lookups = 0

    async def __call__(self, name: str) -> Sequence[str]:
        """Look up."""
        assert name == "teachers:1"
        self.num_lookups += 1
        if isinstance(self.addresses, TeacherUnavailableError):
            raise self.addresses
        return self.addresses


async def test_replicas_follow_their_name() -> None:
    """A new address is admitted; one that is gone ends what it has, and gets nothing more."""
    async with running_stub() as first, running_stub() as second:
        names = Names(first.endpoint)
        async with client("teachers:1", resolve=names, resolve_period_s=0.05) as teacher:
            first.gate.clear()
            call = asyncio.create_task(score(teacher, 99))
            await first.arrived.wait()
            names.addresses = (second.endpoint,)
            await until(lambda: second.endpoint in {one.name for one in teacher.replicas})
            await becomes(teacher, second, ReplicaState.SERVING)
            assert state(teacher, first) is ReplicaState.DRAINING
            assert await scores(teacher, 4) == {second.endpoint: 4}
            first.gate.set()
            assert (await call).endpoint == first.endpoint
            await until(lambda: {one.name for one in teacher.replicas} == {second.endpoint})


async def test_a_failed_lookup_keeps_the_replicas() -> None:
    """A name server that is down is no reason to stop; nor is one that answers with nothing."""
    failure = TeacherUnavailableError("does not resolve", endpoint="teachers:1", reason="UNRESOLVED")
    async with running_stub() as stub:
        names = Names(stub.endpoint)
        async with client("teachers:1", resolve=names, resolve_period_s=0.02) as teacher:
            for nothing in (failure, ()):
                names.addresses = nothing
                num_lookups = names.num_lookups
                await until(lambda least=num_lookups + 2: names.num_lookups >= least)  # type: ignore[misc]
                assert (await score(teacher)).endpoint == stub.endpoint


async def test_a_replica_that_goes_down_is_looked_up_at_once() -> None:
    """A teacher that moved is found long before the next lookup is due."""
    async with running_stub() as first, running_stub() as second:
        names = Names(first.endpoint)
        async with client("teachers:1", resolve=names, resolve_period_s=3600.0) as teacher:
            names.addresses = (second.endpoint,)
            await first.stop()
            assert (await score(teacher)).endpoint == second.endpoint


async def test_a_name_that_does_not_resolve_is_an_error_at_the_start() -> None:
    """It says what to do."""
    names = Names()
    with pytest.raises(TeacherUnavailableError, match=r"teachers:1 has no address after .* check the name") as caught:
        await client("teachers:1", resolve=names, connect_timeout_s=0.1).__aenter__()
    assert caught.value.reason == "UNRESOLVED"
    assert names.num_lookups > 1
