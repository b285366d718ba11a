"""`bench` and its caller against the real service, with the analytic teacher behind it, and against faulty ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.arrays import ScoreArrays
from protos.codec import WireDtype
from protos.manifest import Manifest
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.bench.measure import Measurement, measure
from teacher_service.bench.settings import BenchSettings
from teacher_service.bench.tally import Tally
from teacher_service.engine.fake import FakeEngine, expected_logprobs
from teacher_service.errors import SettingsError
from teacher_service.transports.caller import CallError, ScoreCall, calling
from teacher_service.types import ScoreJob
from tests.support.service import Service, gated_engine, running_service
from tests.support.teacher_stub import black_hole, fails, running_stub, uniform_answer
from tests.support.waiting import TIMEOUT_S

ROOT = Path(__file__).parents[2]
V = 32
CALL = ScoreCall(token_ids=np.arange(12, dtype=np.int32), score_start=5, num_logprobs=4)
LIMITED = {"max_inflight_requests": 1, "max_queued_requests": 0}


class Silent:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.levels: list[tuple[str, int]] = []
        self.num_advanced = 0

    def began(self, manifest: Manifest, settings: BenchSettings, asked: BenchSettings) -> None:
        """See `Watcher.began`."""

    def began_level(self, name: str, num_sequences: int) -> None:
        """See `Watcher.began_level`."""
        self.levels.append((name, num_sequences))

    def advanced(self, tally: Tally) -> None:
        """See `Watcher.advanced`."""
        self.num_advanced += 1

    def ended_level(self, tally: Tally) -> None:
        """See `Watcher.ended_level`."""


async def measured(endpoint: str, watcher: Silent | None = None, **changes: Any) -> Measurement:
    given = {
        "endpoint": endpoint,
        "sequences": 12,
        "prompt_tokens": 20,
        "response_tokens": 10,
        "num_logprobs": 8,
        "concurrency": (1, 4),
        "siblings": 1,
        "wire_dtype": WireDtype.FLOAT32,
        "temperature": 1.0,
        "timeout_s": TIMEOUT_S,
        "warm_up": 0,
        "seed": 1,
        "json": None,
    }
    found = Measurement(settings=BenchSettings(**given | changes))
    await measure(found, watcher or Silent())
    return found


async def refusal(endpoint: str, *, timeout_s: float = TIMEOUT_S) -> CallError:
    """What a caller is told who asks for a score, of a teacher whose manifest is known."""
    async with calling(endpoint, client_name="test") as caller:
        manifest = await caller.get_manifest(timeout_s=TIMEOUT_S)
        with pytest.raises(CallError) as caught:
            await caller.score(CALL, manifest=manifest, timeout_s=timeout_s)
    return caught.value


async def manifest_refusal(endpoint: str, *, timeout_s: float = TIMEOUT_S) -> CallError:
    async with calling(endpoint, client_name="test") as caller:
        with pytest.raises(CallError) as caught:
            await caller.get_manifest(timeout_s=timeout_s)
    return caught.value


@pytest.mark.parametrize("wire_dtype", list(WireDtype))
async def test_an_answer_holds_the_teachers_scores_and_what_they_cost(wire_dtype: WireDtype) -> None:
    """Row i is of the prefix that predicted token score_start + i; times and bytes are of this answer."""
    call = ScoreCall(token_ids=CALL.token_ids, score_start=5, num_logprobs=4, temperature=0.5, wire_dtype=wire_dtype)
    async with (
        running_service(FakeEngine(latency_s=0.05)) as service,
        calling(service.addresses.grpc, client_name="test") as caller,
    ):
        manifest = await caller.get_manifest()
        answer = await caller.score(call, manifest=manifest, timeout_s=TIMEOUT_S)
    logprobs_SV = expected_logprobs(range(5, 12), vocab_rows=V, temperature=0.5)
    sampled_S = logprobs_SV[np.arange(7), np.arange(5, 12)]
    np.testing.assert_allclose(answer.scores.sampled_logprobs, sampled_S, atol=1e-5)
    assert answer.scores.topk_token_ids is not None
    assert answer.scores.topk_token_ids[:, 0].tolist() == list(range(5, 12))
    assert 7 * 4 * (4 + wire_dtype.itemsize) < answer.payload_bytes < 7 * 4 * (4 + wire_dtype.itemsize) + 7 * 8 + 200
    assert answer.latency_s >= answer.timings.engine_s >= 0.05
    assert answer.decode_s > 0


async def test_the_caller_names_itself() -> None:
    """So that its share of the engine is its own, and not a trainer's on the same host."""
    async with running_service(FakeEngine()) as service:
        await measured(service.addresses.grpc, concurrency=(1,))
        lines = [json.loads(line) for line in service.log.getvalue().splitlines()]
    clients = [line["client"].rpartition("/")[2] for line in lines if line.get("method") == "Score"]
    assert clients == ["bench"] * 12


async def test_an_error_carries_the_services_reason_and_words() -> None:
    """Whatever the service refuses."""
    async with running_service(FakeEngine(failing_token_id=7)) as service:
        error = await refusal(service.addresses.grpc)
    assert error.reason == "ENGINE_ERROR"
    assert "token 7 makes this engine fail" in error.message
    assert error.retry_delay_s is None


async def test_a_loading_teacher_says_so() -> None:
    """With a delay, as its manifest is asked for."""
    engine = FakeEngine()
    engine.loading_gate.clear()
    async with running_service(engine, ready=False) as service:
        error = await manifest_refusal(service.addresses.grpc)
    assert (error.reason, error.retry_delay_s) == ("NOT_READY", 1.0)
    assert "still loading" in error.message


async def test_a_teacher_that_takes_too_long_is_told_from_one_that_is_not_there() -> None:
    """The deadline ends both; the remedy differs."""
    async with running_stub() as stub:
        stub.gate.clear()
        error = await refusal(stub.endpoint, timeout_s=0.2)
    assert error.reason == "DEADLINE_EXCEEDED"
    assert "did not answer within 0.2 s; raise --timeout-s" in error.message
    async with black_hole() as endpoint:
        error = await manifest_refusal(endpoint, timeout_s=0.2)
    assert error.reason == "UNREACHABLE"
    assert "no connection within 0.2 s" in error.message


async def test_the_http_port_is_recognised() -> None:
    """The two ports are easily mixed up."""
    async with running_service(FakeEngine()) as service:
        error = await manifest_refusal(service.addresses.http)
    assert error.reason == "UNREACHABLE"
    assert "(it speaks HTTP, not gRPC)" in error.message


async def test_another_teachers_answer_is_no_answer() -> None:
    """A replica with another model would otherwise pass as the one that was introduced."""
    async with running_stub() as stub:

        async def replaced(request: pb.ScoreRequest, _context: object) -> pb.ScoreResponse:
            answer = uniform_answer(request, stub.manifest)
            answer.manifest_digest = "other"
            return answer

        stub.script.append(replaced)
        error = await refusal(stub.endpoint)
    assert error.reason == "MANIFEST_CHANGED"


@pytest.mark.parametrize("fault", ["positive", "short", "wire_dtype"])
async def test_an_answer_that_breaks_the_contract_is_no_answer(fault: str) -> None:
    """Every array is checked, and that it is of the type asked for."""
    async with running_stub() as stub:

        async def broken(request: pb.ScoreRequest, _context: object) -> pb.ScoreResponse:
            answer = uniform_answer(request, stub.manifest)
            if fault == "positive":
                answer.sampled_logprobs = np.ones(7, dtype="<f4").tobytes()
            elif fault == "short":
                answer.scored_count = 6
            else:
                answer.wire_dtype = pb.WIRE_DTYPE_FLOAT16
                answer.topk_logprobs = answer.topk_logprobs[: 7 * 4 * 2]
            return answer

        stub.script.append(broken)
        error = await refusal(stub.endpoint)
    assert error.reason == "INVALID_ANSWER"
    assert "breaks the contract" in error.message


async def test_each_concurrency_gets_its_row() -> None:
    """All sequences answered, after a warm-up that is in no row, and every number of its right size."""
    engine, watcher = FakeEngine(latency_s=0.02), Silent()
    async with running_service(engine) as service:
        found = await measured(service.addresses.grpc, watcher, warm_up=3, wire_dtype=WireDtype.BFLOAT16)
    assert watcher.levels == [("warm-up", 3), ("concurrency 1", 12), ("concurrency 4", 12)]
    assert watcher.num_advanced == len(engine.finished) == 27
    one, four = found.rows()
    assert (one.concurrency, one.num_sequences, one.retries, one.errors) == (1, 12, 0, {})
    assert (four.concurrency, four.num_sequences, four.retries, four.errors) == (4, 12, 0, {})
    assert one.mean_engine_ms is not None
    assert one.mean_engine_ms >= 20
    assert one.latency_p50_ms is not None
    assert one.latency_p50_ms >= 20
    assert one.sequences_per_s <= 50
    assert one.tokens_per_s == pytest.approx(30 * one.sequences_per_s)
    assert one.scored_tokens_per_s == pytest.approx(10 * one.sequences_per_s)
    assert one.payload_bytes_per_token is not None
    assert 8 * (4 + 2) + 8 < one.payload_bytes_per_token < 8 * (4 + 2) + 8 + 20


async def test_as_many_sequences_are_in_flight_as_were_asked_for() -> None:
    """No fewer, though none is answered; and no more, until the last."""
    engine = MostRunning()
    engine.scoring_gate.clear()
    async with running_service(engine) as service:
        measuring = asyncio.create_task(measured(service.addresses.grpc, concurrency=(5,)))
        await asyncio.wait_for(engine.wait_running(5), TIMEOUT_S)
        engine.scoring_gate.set()
        found = await measuring
    assert engine.most_running == 5
    assert found.levels[0].num_answered == 12


class MostRunning(FakeEngine):
    """Remembers how many jobs it had at a time."""

    most_running = 0

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        self.most_running = max(self.most_running, len(self.running) + 1)
        return await super().score(job)


async def test_an_overloaded_service_is_asked_again_after_its_delay() -> None:
    """Every sequence is answered in the end, and the refusals are counted as retries, not as errors."""
    async with running_service(FakeEngine(latency_s=0.02), **LIMITED) as service:
        found = await measured(service.addresses.grpc, concurrency=(4,), warm_up=1)
    (row,) = found.rows()
    assert (row.num_sequences, row.errors) == (12, {})
    assert row.retries > 0
    assert row.latency_max_ms is not None
    assert row.latency_max_ms >= 50  # the shortest delay that the service names


async def test_patience_with_an_overloaded_service_ends() -> None:
    """After the time that a call may take, the refusal counts as an error."""
    engine = gated_engine()
    async with running_service(engine, **LIMITED) as service:
        holding = asyncio.create_task(_hold(service))
        await engine.wait_running(1)
        found = await measured(service.addresses.grpc, concurrency=(1,), sequences=1, timeout_s=0.1)
        engine.scoring_gate.set()
        await holding
    (row,) = found.rows()
    assert (row.num_sequences, row.errors) == (0, {"OVERLOADED": 1})
    assert row.retries > 0


async def _hold(service: Service) -> None:
    async with calling(service.addresses.grpc, client_name="other") as caller:
        await caller.score(CALL, manifest=await caller.get_manifest(), timeout_s=TIMEOUT_S)


async def test_a_refusal_without_a_delay_is_an_error() -> None:
    """The service names no time at which to come again."""
    async with running_stub() as stub:
        stub.script.append(fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"))
        found = await measured(stub.endpoint, concurrency=(1,))
    (row,) = found.rows()
    assert (row.num_sequences, row.errors, row.retries) == (11, {"OVERLOADED": 1}, 0)


async def test_errors_are_counted_by_reason_beside_the_answers() -> None:
    """A sequence fails alone."""
    async with running_service(FakeEngine(failing_token_id=7)) as service:
        found = await measured(service.addresses.grpc, sequences=40, concurrency=(4,))
    (row,) = found.rows()
    assert set(row.errors) == {"ENGINE_ERROR"}
    assert 0 < row.num_sequences < 40
    assert row.num_sequences + row.errors["ENGINE_ERROR"] == 40
    assert found.failure() is None


async def test_nothing_follows_a_level_without_an_answer() -> None:
    """Every further sequence might cost a whole timeout."""
    async with running_stub() as stub:
        stub.script.extend(fails(grpc.StatusCode.INTERNAL, "ENGINE_ERROR") for _ in range(12))
        found = await measured(stub.endpoint)
    assert [row.errors for row in found.rows()] == [{"ENGINE_ERROR": 12}]
    assert found.failure() is not None
    async with running_stub() as stub:
        stub.script.extend(fails(grpc.StatusCode.INTERNAL, "ENGINE_ERROR") for _ in range(2))
        found = await measured(stub.endpoint, warm_up=2)
    assert found.rows() == []
    assert found.failure() is not None


async def test_more_logprobs_than_the_teacher_gives_are_refused_before_the_first_sequence() -> None:
    """With the limit of this teacher."""
    engine = FakeEngine()
    async with running_service(engine) as service:
        with pytest.raises(SettingsError, match="--num-logprobs is 33; it must be at most 32"):
            await measured(service.addresses.grpc, num_logprobs=33)
    assert engine.finished == []


class Command:
    """The command as a process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, endpoint: str, *arguments: str) -> Command:
        """Run it with these arguments and small sequences."""
        sizes = ("--prompt-tokens", "20", "--response-tokens", "10", "--num-logprobs", "8")
        program = (sys.executable, "-m", "teacher_service", "bench", "--endpoint", endpoint, *sizes, *arguments)
        pipe = asyncio.subprocess.PIPE
        environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
        return cls(await asyncio.create_subprocess_exec(*program, stdout=pipe, stderr=pipe, cwd=ROOT, env=environment))

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    async def end(self) -> tuple[int | None, str, str]:
        """Exit code, stdout, stderr."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                out, err = await self._process.communicate()
        except TimeoutError:
            self._process.kill()
            raise
        return self._process.returncode, out.decode(), err.decode()


async def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    """The teacher and the table on stdout, progress on stderr, the same numbers in the file, colours nowhere."""
    path = tmp_path / "results.json"
    levels = ("--concurrency", "2", "--concurrency", "5", "--sequences", "10")
    async with running_service(FakeEngine(model_name="analytic")) as service:
        command = await Command.start(service.addresses.grpc, *levels, "--json", f"{path}")
        code, out, err = await command.end()
    assert (code, "\x1b" in out + err) == (0, False)
    assert out.startswith(f"teacher at {service.addresses.grpc}: analytic, float32, by fake 1; 32 vocabulary rows")
    table = {line[:33].strip(): line[33:].split() for line in out.splitlines()}
    assert table["concurrency"] == ["2", "5"]
    assert table["sequences answered"] == ["10", "10"]
    assert [line.split(":")[0] for line in err.splitlines()] == ["warm-up", "concurrency 2", "concurrency 5"]
    document = json.loads(path.read_text())
    assert document["manifest"]["model_name"] == "analytic"
    assert [row["concurrency"] for row in document["rows"]] == [2, 5]
    assert set(document["rows"][0]) == {
        *("concurrency", "num_sequences", "num_logprobs", "sequences_per_s", "tokens_per_s", "scored_tokens_per_s"),
        *("latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "latency_max_ms", "mean_queue_ms", "mean_engine_ms"),
        *("payload_bytes_per_token", "decode_us_per_token", "retries", "errors"),
    }


async def test_json_on_stdout_stands_there_alone() -> None:
    """What a program reads; the rest goes to stderr."""
    async with running_service(FakeEngine()) as service:
        command = await Command.start(service.addresses.grpc, "--sequences", "4", "--concurrency", "1", "--json", "-")
        code, out, err = await command.end()
    assert code == 0
    assert [row["num_sequences"] for row in json.loads(out)["rows"]] == [4]
    assert "sequences answered" in err


async def test_ctrl_c_ends_at_once_and_shows_what_was_measured() -> None:
    """The sequence in flight is dropped, and the five before it stand in the table."""

    class FiveThenNoMore(FakeEngine):
        async def _hold(self) -> None:
            if len(self.finished) == 5:
                self.scoring_gate.clear()
                stuck.set()
            await super()._hold()

    stuck = asyncio.Event()
    async with running_service(FiveThenNoMore()) as service:
        command = await Command.start(service.addresses.grpc, "--concurrency", "1", "--warm-up", "0", "--json", "-")
        await asyncio.wait_for(stuck.wait(), TIMEOUT_S)
        began_s = time.monotonic()
        command.interrupt()
        code, out, err = await command.end()
    assert code == 130
    assert time.monotonic() - began_s < TIMEOUT_S / 2
    assert [row["num_sequences"] for row in json.loads(out)["rows"]] == [5]
    assert "interrupted" in err
    assert "Traceback" not in err


async def test_a_dead_endpoint_is_told_in_one_line() -> None:
    """With the remedy, soon, and with the code of a failure."""
    began_s = time.monotonic()
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # held, and nobody listens
        command = await Command.start(f"127.0.0.1:{unheard.getsockname()[1]}")
        code, out, err = await command.end()
    assert (code, out) == (1, "")
    assert err.startswith("error: no teacher answers at 127.0.0.1:")
    assert "(connection refused); start one with `python -m teacher_service serve" in err
    assert err.count("\n") == 1
    assert time.monotonic() - began_s < TIMEOUT_S / 2


async def test_a_run_in_which_everything_failed_ends_with_its_first_error() -> None:
    """And with the code of a failure, without a table."""
    async with running_stub() as stub:
        stub.script.extend(fails(grpc.StatusCode.INTERNAL, "ENGINE_ERROR", message="no luck") for _ in range(8))
        command = await Command.start(stub.endpoint)
        code, out, err = await command.end()
    assert code == 1
    assert "sequences answered" not in out
    assert "no sequence was answered; the first error: the teacher at" in err
    assert "says: no luck" in err
