"""The service as a process: ready line, port file, signals, exit codes, and one clear line for each way to fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.teacher.v1.teacher_pb2_grpc import TeacherServiceStub
from tests.integration.faulty_teacher import DEADLY_TOKEN_ID
from tests.support.service import outcome_of_rpc_error, score_request

TIMEOUT_S = 60.0
ROOT = Path(__file__).parents[2]
GOOD = score_request(range(8), 5, 1)
FREE_PORTS = ("--grpc-port", "0", "--http-port", "0")


@asynccontextmanager
async def process(*arguments: str, environment: dict[str, str] | None = None) -> AsyncIterator[Process]:
    """A Python process in a session of its own; killed at the end if it still runs."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TEACHER_")}
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=PIPE,
        stderr=PIPE,
        cwd=ROOT,
        env=clean | (environment or {}),
        start_new_session=True,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            os.killpg(started.pid, signal.SIGKILL)
        await started.communicate()


def serve(*flags: str) -> tuple[str, ...]:
    return ("-m", "teacher_service", "serve", *flags)


def held(gate: Path, *settings: str) -> tuple[str, ...]:
    return ("-m", "tests.integration.faulty_teacher", str(gate), *settings)


async def ready_addresses(service: Process) -> tuple[str, str]:
    """The gRPC and HTTP addresses of the ready line; fails with the log if the process ends instead."""
    assert service.stdout is not None
    assert service.stderr is not None
    line = (await asyncio.wait_for(service.stdout.readline(), TIMEOUT_S)).decode()
    if not line:
        pytest.fail(f"the service ended before it was ready: {(await service.stderr.read()).decode()}")
    word, _, grpc_address, _, http_address = line.split()
    assert word == "ready:"
    return grpc_address, http_address


async def ended(service: Process) -> tuple[int | None, str]:
    """Exit code and stderr."""
    _, stderr = await asyncio.wait_for(service.communicate(), TIMEOUT_S)
    return service.returncode, stderr.decode()


async def refused(*flags: str, environment: dict[str, str] | None = None) -> tuple[int | None, str]:
    """Exit code and last line of stderr of a service that does not start; no traceback, nothing else of ours."""
    async with process(*serve(*flags), environment=environment) as service:
        code, stderr = await ended(service)
    assert "Traceback" not in stderr
    return code, stderr.strip().splitlines()[-1]


def taken(address: str) -> bool:
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_answers_until_a_signal_and_exits_with_zero(number: signal.Signals, tmp_path: Path) -> None:
    """The command line as typed: port file while it listens, answers over both ports, nothing left behind."""
    port_file = tmp_path / "ports.json"
    async with process(*serve("--engine", "fake", *FREE_PORTS, "--port-file", str(port_file))) as service:
        grpc_address, http_address = await ready_addresses(service)
        assert json.loads(port_file.read_text()) == {"grpc": grpc_address, "http": http_address.removeprefix("http://")}
        async with grpc.aio.insecure_channel(grpc_address) as channel:
            answer = await TeacherServiceStub(channel).Score(GOOD, timeout=TIMEOUT_S)
        assert answer.scored_count == 3
        async with httpx.AsyncClient(base_url=http_address) as http:
            assert (await http.get("/readyz")).status_code == 200
        service.send_signal(number)
        code, stderr = await ended(service)
    assert (code, "Traceback" in stderr) == (0, False)
    assert os.listdir(tmp_path) == []
    assert not taken(grpc_address)
    assert not taken(http_address)


async def test_drain_finishes_what_is_in_flight_and_refuses_new_work(tmp_path: Path) -> None:
    """After SIGTERM the call in flight is answered, new ones are UNAVAILABLE, and the process exits with 0."""
    gate = tmp_path / "gate"
    async with process(*held(gate)) as service:
        grpc_address, http_address = await ready_addresses(service)
        async with grpc.aio.insecure_channel(grpc_address) as channel:
            stub = TeacherServiceStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            in_flight = stub.Score(GOOD, timeout=TIMEOUT_S)
            await until_in_flight(http_address)
            service.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Score(GOOD, timeout=TIMEOUT_S)
            outcome = outcome_of_rpc_error(caught.value)
            assert (outcome.reason, outcome.code) == ("DRAINING", "UNAVAILABLE")
            gate.touch()
            assert (await in_flight).scored_count == 3
            watch.cancel()
        code, stderr = await ended(service)
    assert (code, "Traceback" in stderr) == (0, False)


async def until_in_flight(http_address: str) -> None:
    """Ask the metrics until the engine holds a sequence."""
    async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(base_url=http_address) as http:
        while "teacher_inflight_requests 1.0" not in (await http.get("/metrics")).text:
            pass


async def test_a_second_signal_ends_the_process_without_waiting(tmp_path: Path) -> None:
    """The call in flight is dropped with DRAINING; the exit code names the signal."""
    async with process(*held(tmp_path / "never", "drain_timeout_s=1000")) as service:
        grpc_address, http_address = await ready_addresses(service)
        async with grpc.aio.insecure_channel(grpc_address) as channel:
            stub = TeacherServiceStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            await watch.read()
            in_flight = stub.Score(GOOD, timeout=TIMEOUT_S)
            await until_in_flight(http_address)
            service.send_signal(signal.SIGTERM)
            # two equal signals at once would be one: wait until the first was heard
            await watch.read()
            service.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await in_flight
            assert outcome_of_rpc_error(caught.value).reason == "DRAINING"
            watch.cancel()
        code, _ = await ended(service)
    assert code == 128 + signal.SIGTERM


async def test_a_dead_engine_ends_the_process_with_the_cause(tmp_path: Path) -> None:
    """Health turns to NOT_SERVING, the caller is told, and the process fails with the cause on stderr."""
    gate = tmp_path / "gate"
    gate.touch()
    async with process(*held(gate)) as service:
        grpc_address, _ = await ready_addresses(service)
        async with grpc.aio.insecure_channel(grpc_address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await TeacherServiceStub(channel).Score(score_request([1, DEADLY_TOKEN_ID], 1), timeout=TIMEOUT_S)
            assert outcome_of_rpc_error(caught.value).reason == "ENGINE_DEAD"
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
        code, stderr = await ended(service)
    assert code == 1
    assert "error: the engine died: RuntimeError: token 13 is deadly" in stderr
    assert "Traceback" not in stderr


async def test_a_taken_port_is_one_clear_line() -> None:
    """Which address, why, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        code, line = await refused("--engine", "fake", "--grpc-port", f"{port}", "--http-port", "0")
    assert code == 1
    assert line.startswith(f"error: can't listen on 127.0.0.1:{port}: Address already in use")
    assert "--grpc-port" in line


@pytest.mark.parametrize(
    ("flags", "environment", "parts"),
    [
        (("--engine", "fake", "--grpc-prot", "1"), {}, ("--grpc-prot", "--grpc-port")),
        (("--engine", "fake"), {"TEACHER_GRPC_PROT": "1"}, ("TEACHER_GRPC_PROT", "TEACHER_GRPC_PORT")),
    ],
)
async def test_a_bad_setting_is_one_clear_line(
    flags: tuple[str, ...], environment: dict[str, str], parts: tuple[str, ...]
) -> None:
    """The flag or variable, its value, and the rule or the nearest name; the exit code is that of wrong usage."""
    code, line = await refused(*flags, environment=environment)
    assert code == 2
    for part in parts:
        assert part in line


async def test_a_model_path_that_does_not_exist_is_one_clear_line(tmp_path: Path) -> None:
    """The engine's own error ends the process; both ports are freed."""
    missing = tmp_path / "nothing-here"
    code, line = await refused("--engine", "transformers", "--model", str(missing), *FREE_PORTS)
    assert code == 1
    assert line.startswith("error: ")
    assert str(missing) in line


async def test_an_unwritable_port_file_is_one_clear_line(tmp_path: Path) -> None:
    """A port file that can't be written would leave its reader waiting, so the service does not start."""
    path = tmp_path / "no-folder" / "ports.json"
    code, line = await refused("--engine", "fake", *FREE_PORTS, "--port-file", str(path))
    assert code == 1
    assert str(path) in line
