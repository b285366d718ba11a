"""`compose.yaml` for real: both CPU images, the demo, grpcurl from the host, a killed teacher, more teachers.

The tests stand in the order of a run's life and share it. They work on a copy of the tracked files, as on a fresh
clone: nothing is written into this one.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.docker.conftest import BUILD_TIMEOUT_S, ROOT, Docker, show
from tests.support.certificates import Authority

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2 * BUILD_TIMEOUT_S)]

PROJECT = "gkd-test"
SERVICE = "teacher.v1.TeacherService"
MODELS_TIMEOUT_S = 900
RUN_TIMEOUT_S = 1800
TEACHER_TIMEOUT_S = 300
STEPS = 32
REQUEST = {
    "token_ids": [26, 22, 0, 6, 3, 5, 2, 4, 11, 24, 0, 26, 23, 0, 2, 3, 4, 5, 6, 24],
    "score_start": 14,
    "num_logprobs": 4,
}
"""The README's: the answer 12345 to 52413."""
TOKEN = "a1" * 16
ASK_EVERY_TEACHER = """
import asyncio, json, socket
from trainer.teacher import TeacherClient

async def main():
    found = socket.getaddrinfo("teachers", 15555, socket.AF_INET, socket.SOCK_STREAM)
    addresses = sorted({one[4][0] for one in found})
    answers = []
    for address in addresses:
        async with TeacherClient(endpoints=[f"{address}:15555"]) as teacher:
            scores = await teacher.score(REQUEST["token_ids"], score_start=14, num_logprobs=4)
            answers.append(scores.topk_token_ids[:, 0].tolist())
    print(json.dumps(answers))

asyncio.run(main())
"""
"""Run inside the private network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """The project as compose runs it."""

    docker: Docker
    grpc_port: int

    @property
    def results(self) -> Path:
        """Where the run's files land on the host."""
        return self.docker.folder / "runs" / "compose"

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        """What a command of compose prints."""
        return self.docker("compose", *arguments, timeout_s=timeout_s)

    def container(self, service: str) -> dict[str, Any]:
        """What Docker knows of a service's container, running or not."""
        name = self.compose("ps", "--all", "--quiet", service).splitlines()[0]
        found: dict[str, Any] = json.loads(self.docker("inspect", name))[0]
        return found

    def steps(self) -> int:
        """How many the trainer has reported."""
        metrics = self.results / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.is_file() else 0

    def grpcurl(self, *arguments: str) -> str:
        """Typed on the host."""
        words = [f"{ROOT}/.venv/bin/grpcurl", "-plaintext", *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout

    def call(self, method: str, request: object = None) -> dict[str, Any]:
        """The answer of one call to the teacher, by grpcurl."""
        where = f"127.0.0.1:{self.grpc_port}"
        answer: dict[str, Any] = json.loads(self.grpcurl("-d", json.dumps(request or {}), where, method))
        return answer

    def await_healthy(self, service: str) -> None:
        """Wait until Docker's own check says so."""
        wait_until(lambda: self.container(service)["State"]["Health"]["Status"] == "healthy",
                   TEACHER_TIMEOUT_S, f"{service} is healthy")  # fmt: skip


def wait_until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def stack(engine: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Built images, and a project of which nothing is left afterwards."""
    folder = tmp_path_factory.mktemp("clone")
    copy_tracked_files(folder)
    grpc_port = free_port()
    environment = {
        **engine.environment,
        "COMPOSE_PROJECT_NAME": PROJECT,
        "TEACHER_GRPC_PORT_ON_HOST": f"{grpc_port}",
        "TEACHER_HTTP_PORT_ON_HOST": f"{free_port()}",
        "DOCKER_BUILDKIT": "1",
        **pip_configuration(folder),
    }
    if os.getuid() != 0:  # root may remove what others own
        environment["GKD_USER"] = f"{os.getuid()}:{os.getgid()}"
    stack = Stack(docker=replace(engine, environment=environment, folder=folder), grpc_port=grpc_port)
    try:
        for service in ("teacher", "trainer"):
            with engine.timed(f"gkd-{service}:cpu is built"):
                stack.compose("build", service, timeout_s=BUILD_TIMEOUT_S)
        yield stack
    finally:
        with engine.timed("down"):
            stack.compose("--profile", "replicas", "down", "--volumes", "--remove-orphans", timeout_s=300)
    label = f"label=com.docker.compose.project={PROJECT}"
    for kind in (("ps", "--all"), ("network", "ls"), ("volume", "ls")):
        assert stack.docker(*kind, "--quiet", "--filter", label) == ""


def copy_tracked_files(folder: Path) -> None:
    """What git knows, and what is new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)


def pip_configuration(folder: Path) -> dict[str, str]:
    """Hand this machine's configuration of pip to the builds, as far as a container can use it."""
    wheels = Path(os.environ.get("PIP_FIND_LINKS", ""))
    if wheels.is_absolute() and wheels.is_dir():
        for wheel in wheels.glob("*.whl"):
            shutil.copy2(wheel, folder / "docker" / "wheels" / wheel.name)
    return {"GKD_CA_FILE": os.environ["PIP_CERT"]} if "PIP_CERT" in os.environ else {}


@pytest.mark.parametrize("service", ["teacher", "trainer"])
def test_an_image_holds_what_it_needs_and_no_more(stack: Stack, service: str) -> None:
    """Not root, labelled, without compiler, pip, its cache or what the build was told in secret."""
    image = json.loads(stack.docker("image", "inspect", f"gkd-{service}:cpu"))[0]
    show(f"gkd-{service}:cpu: {image['Size'] / 1e9:.2f} GB")
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.title"] == f"gkd-{service}"
    assert config["Healthcheck"]["Test"][0] == ("CMD" if service == "teacher" else "NONE")
    code = (
        "import glob, importlib.util, os, shutil; print([os.getuid(), importlib.util.find_spec('pip'), "
        "[shutil.which(one) for one in ('gcc', 'cc', 'make', 'git')], "
        "glob.glob('/root/.cache/*') + glob.glob('/src/*') + glob.glob('/run/secrets/*')])"
    )
    inside = stack.docker("run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--tmpfs=/tmp",
                          "--entrypoint=python", f"gkd-{service}:cpu", "-c", code)  # fmt: skip
    assert inside == "[10001, None, [None, None, None, None], []]"


def test_both_commands_answer_on_a_read_only_root(stack: Stack) -> None:
    """Each image's own entry point, with nothing but its arguments."""
    hardened = ("run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--tmpfs=/tmp")
    assert "--grpc-port" in stack.docker(*hardened, "gkd-teacher:cpu", "serve", "--help")
    assert "actor_rollout_ref" in stack.docker(*hardened, "gkd-trainer:cpu", "--cfg", "job")


def test_up_brings_a_healthy_teacher_and_a_trainer(stack: Stack) -> None:
    """`up` returns once models are made and the teacher is healthy: the trainer waits for that."""
    with stack.docker.timed("up: models are made, the teacher is healthy, the trainer starts"):
        stack.compose("up", "--detach", timeout_s=MODELS_TIMEOUT_S)
    for service in ("folders", "models"):
        assert stack.container(service)["State"]["ExitCode"] == 0
    assert stack.container("teacher")["State"]["Health"]["Status"] == "healthy"


@pytest.mark.parametrize("service", ["teacher", "trainer"])
def test_containers_are_hardened(stack: Stack, service: str) -> None:
    """As compose.yaml asks: Docker's own word for it."""
    container = stack.container(service)
    host = container["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0
    assert container["Config"]["User"] == stack.docker.environment.get("GKD_USER", "10001:10001")


def test_the_trainer_has_no_way_out(stack: Stack) -> None:
    """Its one network is internal, and ports are published on the host's loopback address alone."""
    [network] = stack.container("trainer")["NetworkSettings"]["Networks"]
    assert json.loads(stack.docker("network", "inspect", network))[0]["Internal"]
    published = stack.container("teacher")["NetworkSettings"]["Ports"].values()
    assert {port["HostIp"] for ports in published for port in ports} == {"127.0.0.1"}


def test_grpcurl_works_from_the_host(stack: Stack) -> None:
    """Reflection, health, manifest, and an answer of the right shape."""
    assert SERVICE in stack.grpcurl(f"127.0.0.1:{stack.grpc_port}", "list").split()
    assert stack.call("grpc.health.v1.Health/Check", {"service": SERVICE}) == {"status": "SERVING"}
    manifest = stack.call(f"{SERVICE}/GetManifest")
    assert "vllm" in json.dumps(manifest)
    answer = stack.call(f"{SERVICE}/Score", REQUEST)
    raw = base64.b64decode(find(answer, "sampled_logprobs"))
    sampled = struct.unpack(f"<{len(raw) // 4}f", raw)
    assert len(sampled) == 6
    assert all(-2.0 < one <= 0.0 for one in sampled)  # the teacher knows how to sort


def test_grpcurl_works_with_tls_and_a_token(stack: Stack, tmp_path: Path) -> None:
    """A teacher of its own, with a certificate and a token file mounted; without them nobody is let in."""
    authority = Authority(tmp_path, "ca")
    pair, tokens = authority.sign("teacher"), tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    for path in (tmp_path, pair.cert, pair.key, tokens):
        path.chmod(0o755)  # the container's user is another
    port, name = free_port(), f"{PROJECT}-tls"
    settings = {
        "TEACHER_MODEL": "/models/teacher",
        "TEACHER_MAX_MODEL_LEN": "64",
        "TEACHER_KV_CACHE_BYTES": "67108864",
        "TEACHER_TLS_CERT": "/gkd/teacher.pem",
        "TEACHER_TLS_KEY": "/gkd/teacher.key",
        "TEACHER_TOKEN_FILE": "/gkd/tokens",
    }
    variables = [word for key, value in settings.items() for word in ("--env", f"{key}={value}")]
    mounts = ["--volume", f"{tmp_path}:/gkd:ro", "--volume", f"{PROJECT}_models:/models:ro"]
    hardened = ["--read-only", "--cap-drop=ALL", "--tmpfs=/tmp", "--shm-size=256m", "--init"]
    published = ["--publish", f"127.0.0.1:{port}:15555"]
    stack.docker("run", "--detach", "--name", name, *hardened, *variables, *mounts, *published, "gkd-teacher:cpu")
    try:
        with stack.docker.timed("a teacher with TLS and a token is healthy"):
            wait_until(lambda: stack.docker("inspect", "--format={{.State.Health.Status}}", name) == "healthy",
                       TEACHER_TIMEOUT_S, "the teacher with TLS is healthy")  # fmt: skip

        def score(*credentials: str) -> subprocess.CompletedProcess[str]:
            words = [f"{ROOT}/.venv/bin/grpcurl", "-d", json.dumps(REQUEST), *credentials]
            where = [f"127.0.0.1:{port}", f"{SERVICE}/Score"]
            return subprocess.run([*words, *where], capture_output=True, text=True, timeout=60, check=False)

        tls, secret = ("-cacert", f"{authority.cert}"), ("-H", f"authorization: Bearer {TOKEN}")
        answered = score(*tls, *secret)
        assert answered.returncode == 0, answered.stderr
        assert find(json.loads(answered.stdout), "sampled_logprobs")
        for without, said in ((("-plaintext", *secret), ""), (tls, "Unauthenticated"), (secret, "certificate")):
            refused = score(*without)
            assert refused.returncode != 0
            assert said in refused.stderr
    finally:
        stack.docker("rm", "--force", name)


def find(message: Any, name: str) -> str:
    """A field's value, wherever it stands in a message."""
    if isinstance(message, dict):
        for key, value in message.items():
            if key == name:
                return str(value)
            if (found := find(value, name)) != "":
                return found
    return ""


def test_a_run_goes_on_when_the_teacher_is_killed(stack: Stack) -> None:
    """Docker starts it again, and no step is lost."""
    wait_until(lambda: stack.steps() >= 2, RUN_TIMEOUT_S, "two steps")
    before = stack.container("teacher")["RestartCount"]
    # under docker-init, which is process 1, whoever serves is its child
    kill = "import os; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), 9)"
    stack.compose("exec", "-T", "teacher", "python", "-c", kill)
    killed_at = stack.steps()
    wait_until(lambda: stack.container("teacher")["RestartCount"] > before, 60, "the teacher was started again")
    with stack.docker.timed("a killed teacher is healthy again"):
        stack.await_healthy("teacher")
    assert stack.container("trainer")["State"]["Running"]
    wait_until(lambda: stack.steps() > killed_at + 1, RUN_TIMEOUT_S, "further steps")
    show(f"killed after step {killed_at}, the run is at step {stack.steps()}")


def test_further_teachers_join_under_one_name(stack: Stack) -> None:
    """The name resolves to all of them, and each gives the same answer."""
    with stack.docker.timed("two replicas join"):
        stack.compose("--profile", "replicas", "up", "--detach", "--no-recreate", "--scale", "teacher-replica=2",
                      "--wait", "teacher-replica", timeout_s=600)  # fmt: skip
    code = f"REQUEST = {REQUEST}\n{ASK_EVERY_TEACHER}"
    said = stack.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "python", "trainer", "-c", code)
    answers = json.loads(said.splitlines()[-1])
    assert len(answers) == 3
    assert answers == [answers[0]] * 3


def test_the_student_has_learnt_and_results_are_on_the_host(stack: Stack) -> None:
    """The demo's own measure, in the mounted folder, and a log that says how it went."""
    with stack.docker.timed("the rest of the run"):
        wait_until(lambda: not stack.container("trainer")["State"]["Running"], RUN_TIMEOUT_S, "the end of the run")
    log = stack.compose("logs", "--no-log-prefix", "trainer")
    assert stack.container("trainer")["State"]["ExitCode"] == 0, log
    summary = json.loads((stack.results / "summary.json").read_text())
    show(f"summary: {summary}")
    assert summary["steps"] == STEPS
    assert summary["student_accuracy_after"] > summary["student_accuracy_before"] + 0.4
    assert (stack.results / "curves.png").is_file()
    assert any((stack.results / "student").glob("*.safetensors"))
    assert f"step {STEPS} of {STEPS}: divergence" in log


def test_a_stopped_teacher_drains_and_ends_in_order(stack: Stack) -> None:
    """Exit code 0: SIGTERM reached it, and Docker had no need to kill it."""
    with stack.docker.timed("stop"):
        stack.compose("--profile", "replicas", "stop", "teacher", "teacher-replica", timeout_s=180)
    assert stack.container("teacher")["State"]["ExitCode"] == 0
