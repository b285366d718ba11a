"""The HTTP interface against its own OpenAPI description."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START_S = 60.0
EXPECTED = ["2xx", "3xx", "4xx", "503", "504"]
"""A teacher that loads or is full, and a deadline of the caller's own; never 500."""


@pytest.fixture(scope="module")
def schema_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The OpenAPI page of a service of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "teacher_service", "serve", "--engine", "fake", "--grpc-port", "0", "--http-port"]
    with (tmp_path_factory.mktemp("service") / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"{port}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
        try:
            deadline_s = time.monotonic() + START_S
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
                    break
                except OSError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline_s
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/openapi.json"
        finally:
            process.terminate()
            process.wait(START_S)


def test_every_operation_keeps_its_description(schema_url: str, tmp_path: Path) -> None:
    """By the tool's command line: no 5xx but a documented one, no status, header or body that is not described."""
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(f"[checks.not_a_server_error]\nexpected-statuses = {EXPECTED}\n")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", f"{configuration}", "run", schema_url),
            *("--checks", checks, "--max-examples", "200", "--seed", "1"),
        ],
        cwd=tmp_path,  # it keeps what it found there
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert int(re.findall(r"(\d+) generated", finished.stdout)[-1]) >= 200
