"""The real service as a process that can be killed, paused and started again where it was.

Plain functions that wait, so that tests without an event loop can use them; others call `start` in a thread.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.sort_digits.readiness import health_of

ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.05
_PORTS = range(20_000, 32_000)
"""Below those that kernels give to outgoing connections: nobody takes one while the service is down."""


class ServiceProcess:
    """`python -m teacher_service serve --engine fake …` on a port that it keeps over restarts. Made by `services`."""

    def __init__(self, port: int, log_path: Path, flags: tuple[str, ...]) -> None:
        self.endpoint = f"127.0.0.1:{port}"
        """`host:port` of gRPC."""
        self.log_path = log_path
        """Stderr of every process that ran here, in order."""
        self._port = port
        self._flags = flags
        self._popen: subprocess.Popen[bytes] | None = None

    def launch(self, *more_flags: str) -> None:
        """Start the process; `wait_serving` says when it serves.

        Args:
            more_flags: beside those of every process here, and stronger than these.
        """
        if self._popen is not None:
            raise RuntimeError(f"the service at {self.endpoint} runs already; kill it first")
        given = ("--engine", "fake", "--grpc-port", f"{self._port}", "--http-port", "0")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TEACHER_")}
        with self.log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "teacher_service", "serve", *given, *self._flags, *more_flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

    def wait_serving(self) -> None:
        """Return once the health check says SERVING; fails with the log's end if it never does."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while health_of(self.endpoint) != "SERVING":
            assert self._process.poll() is None, f"the service ended: {self.log_path.read_text()[-2000:]}"
            assert time.monotonic() < deadline_s, f"not serving: {self.log_path.read_text()[-2000:]}"
            time.sleep(_POLL_S)

    def start(self, *more_flags: str) -> None:
        """Launch, and wait until it serves."""
        self.launch(*more_flags)
        self.wait_serving()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone: its connections are closed by then."""
        self._process.kill()
        self._process.wait(_STOP_TIMEOUT_S)
        self._popen = None

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    @property
    def is_running(self) -> bool:
        """Whether there is a process, paused or not."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        if self._popen is None:
            raise RuntimeError(f"no service runs at {self.endpoint}; start it first")
        return self._popen


@contextmanager
def services(folder: Path, count: int, *flags: str) -> Iterator[list[ServiceProcess]]:
    """Services that serve, each on a port of its own; at the end all of them are gone.

    Args:
        folder: for their logs.
        count: how many.
        flags: of all of them, after `serve --engine fake` and the ports.
    """
    made = [ServiceProcess(port, folder / f"service-{port}.log", flags) for port in _free_ports(count)]
    try:
        for one in made:
            one.launch()
        for one in made:
            one.wait_serving()
        yield made
    finally:
        for one in made:
            if one.is_running:
                one.kill()


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free ports in {_PORTS}")
