"""The README's commands and its client snippet, typed against a running service.

Only the two port numbers differ from what a reader types, so that the test can run beside a real service.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.models import write_checkpoint
from tests.support.processes import kill_tree

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GRPC_PORT, HTTP_PORT = "15555", "15556"
MODEL = "runs/models/teacher"
READY_TIMEOUT_S = 120
COMMAND_TIMEOUT_S = 60


def section(title: str) -> str:
    """Text below one heading of the README."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code_blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """One entry per command: a quoted argument may span lines."""
    lines = re.split(r"\n(?=[a-z.])", block.strip())
    return [line for line in lines if not line.startswith(". ")]  # activation: the test sets PATH instead


BY_HAND = [command for block in code_blocks(section("Try the service by hand"), "bash") for command in commands(block)]
ASKING = [command for command in BY_HAND if command.startswith(("grpcurl", "curl"))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shell:
    """Where a reader's terminal would stand: a folder with the demo's models, the environment on PATH."""

    folder: Path
    ports: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the programs of the virtual environment first."""
        return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_PROXY": "localhost"}

    def run(self, command: str) -> str:
        """What a command prints, once it has succeeded."""
        finished = subprocess.run(
            ["bash", "-c", self.with_ports(command)],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            cwd=self.folder,
            env=self.environment,
        )
        assert finished.returncode == 0, finished.stderr + finished.stdout
        return finished.stdout

    def with_ports(self, text: str) -> str:
        """A text of the README with the ports that this service has."""
        for written, real in self.ports.items():
            text = text.replace(f"localhost:{written}", f"localhost:{real}")
        return text


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A terminal beside the service that the README's own command started; PyTorch scores, which starts faster."""
    folder = tmp_path_factory.mktemp("readme")
    write_checkpoint(folder / MODEL, vocab_rows=32)
    (serve,) = (command for command in BY_HAND if "teacher_service serve" in command)
    port_file = folder / "ports.json"
    variables = {
        "TEACHER_ENGINE": "transformers",
        "TEACHER_GRPC_PORT": "0",
        "TEACHER_HTTP_PORT": "0",
        "TEACHER_PORT_FILE": str(port_file),
    }
    offline = Shell(folder=folder, ports={})
    log = folder / "service.log"
    with log.open("w") as stream:
        service = subprocess.Popen(
            ["bash", "-c", f"exec {serve}"],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=offline.environment | variables,
        )
    try:
        wait_until_ready(service, log)
        addresses = json.loads(port_file.read_text())
        yield Shell(
            folder=folder,
            ports={
                GRPC_PORT: addresses["grpc"].rpartition(":")[2],
                HTTP_PORT: addresses["http"].rpartition(":")[2],
            },
        )
        service.terminate()
        assert service.wait(timeout=60) == 0, log.read_text()
    finally:
        end(service)


def wait_until_ready(service: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the line that the README speaks of."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not re.search(r"^ready", log.read_text(), re.MULTILINE):
        assert service.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def end(service: subprocess.Popen[bytes]) -> None:
    """End the service and what it started, whatever state a failed test left it in."""
    if service.poll() is None:
        kill_tree(service.pid)
        service.wait(timeout=10)


def asking(*parts: str) -> str:
    """The one command of the README that holds all the parts."""
    (found,) = (command for command in ASKING if all(part in command for part in parts))
    return found


def test_readme_shows_every_way_to_ask() -> None:
    """List, describe, health, manifest and a score by grpcurl; a score and the metrics by curl; on the real ports."""
    assert [command.split()[0] for command in ASKING] == ["grpcurl"] * 5 + ["curl"] * 2
    assert all(f"localhost:{GRPC_PORT}" in one for one in ASKING if one.startswith("grpcurl"))
    assert all(f"localhost:{HTTP_PORT}" in one for one in ASKING if one.startswith("curl"))


def test_listing_names_the_services(shell: Shell) -> None:
    """Reflection names the teacher and the health service without a proto file."""
    services = shell.run(asking(" list")).split()
    assert {"teacher.v1.TeacherService", "grpc.health.v1.Health"} <= set(services)


def test_describing_shows_the_methods(shell: Shell) -> None:
    """Reflection shows all three methods, the stream as a stream."""
    text = shell.run(asking(" describe "))
    assert re.findall(r"rpc (\w+)", text) == ["GetManifest", "Score", "ScoreStream"]
    assert "stream .teacher.v1.ScoreStreamRequest" in text


def test_health_check_says_serving(shell: Shell) -> None:
    """A loaded teacher is SERVING under its own service name."""
    assert json.loads(shell.run(asking("Health/Check"))) == {"status": "SERVING"}


def test_manifest_tells_of_the_served_model(shell: Shell) -> None:
    """The manifest names the folder, its LM-head rows and its tokens."""
    manifest = json.loads(shell.run(asking("GetManifest")))["manifest"]
    assert (manifest["model_name"], manifest["vocab_rows"], manifest["tokenizer"]["token_count"]) == ("teacher", 32, 27)


def test_score_by_grpcurl_answers_six_positions(shell: Shell) -> None:
    """Six response tokens are scored, each with four alternatives."""
    answer = json.loads(shell.run(asking("grpcurl", "/Score")))
    assert (answer["scored_count"], answer["num_logprobs"]) == (6, 4)


def test_score_by_curl_answers_lists(shell: Shell) -> None:
    """Over HTTP the arrays are lists: [6][4] ids, and 6 sampled logprobs, none positive."""
    answer = json.loads(shell.run(asking("curl", "/v1/score")))
    assert [len(row) for row in answer["topk_token_ids"]] == [4] * 6
    assert len(answer["sampled_logprobs"]) == 6
    assert max(answer["sampled_logprobs"]) <= 0


def test_metrics_count_what_was_answered(shell: Shell) -> None:
    """Prometheus finds a counter that one more score moves by its six positions."""

    def scored() -> float:
        (value,) = re.findall(r"^teacher_tokens_scored_total (\S+)$", shell.run(asking("/metrics")), re.MULTILINE)
        return float(value)

    before = scored()
    shell.run(asking("curl", "/v1/score"))
    assert scored() - before == 6


def test_client_snippet_prints_the_scores(shell: Shell, tmp_path: Path) -> None:
    """The Python of the README runs as it stands, and what it prints are the same six positions."""
    (snippet,) = code_blocks(section("Use the client"), "python")
    program = tmp_path / "snippet.py"
    program.write_text(shell.with_ports(snippet))
    printed = shell.run(f"{sys.executable} -W error {program}")
    over_http = json.loads(shell.run(asking("curl", "/v1/score")))
    assert str(over_http["topk_token_ids"][0][0]) in printed
    assert f"{over_http['sampled_logprobs'][0]:.4f}" in printed
