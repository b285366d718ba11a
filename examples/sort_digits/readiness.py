"""Waiting for the teacher: first for its address, then for the standard gRPC health check."""

from __future__ import annotations

import json
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples.sort_digits.errors import DemoError
from examples.sort_digits.processes import ManagedProcess, ProcessSupervisor

TEACHER_SERVICE = "teacher.v1.TeacherService"
POLL_S = 0.2
CHECK_TIMEOUT_S = 2.0
"""Bound on one health check: the event loop of a service that loads a model may be busy."""


def wait_for_own_teacher(
    process: ManagedProcess, port_file: Path, supervisor: ProcessSupervisor, *, timeout_s: float
) -> str:
    """Wait until the service that `process` runs is SERVING; returns its `host:port`.

    Raises:
        DemoError: it ended before, or was not ready within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        check_running(process)
        if port_file.is_file():
            endpoint = str(json.loads(port_file.read_text())["grpc"])
            if health_of(endpoint) == "SERVING":
                return endpoint
        supervisor.pause(POLL_S)
    raise DemoError(f"the teacher was not ready within {timeout_s:.0f} s; {process.last_words()}")


def require_serving(endpoint: str) -> None:
    """Check that a teacher that somebody else runs is SERVING.

    Raises:
        DemoError: it isn't, or nothing answers at `endpoint`.
    """
    health = health_of(endpoint)
    if health != "SERVING":
        raise DemoError(f"the teacher at {endpoint} is {health}, it must be SERVING; start it, or leave out --endpoint")


def health_of(endpoint: str) -> str:
    """SERVING, NOT_SERVING, UNKNOWN, or the name of the gRPC status that came instead of an answer."""
    request = health_pb2.HealthCheckRequest(service=TEACHER_SERVICE)
    with grpc.insecure_channel(endpoint) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=CHECK_TIMEOUT_S)
        except grpc.RpcError as exc:
            return str(exc.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def check_running(process: ManagedProcess) -> None:
    """Raise DemoError if the process has ended, whatever its exit code."""
    exit_code = process.exit_code()
    if exit_code is not None:
        raise DemoError(f"the {process.name} ended with exit code {exit_code}; {process.last_words()}")
