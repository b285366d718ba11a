"""A Docker engine for the tests: the one that runs, or one of their own, of which nothing is left afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim-bookworm"
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
INTERFACES = Path("/sys/class/net")
START_TIMEOUT_S = 60
PULL_TIMEOUT_S = 120
BUILD_TIMEOUT_S = 3600
EMPTY_TABLES = {
    "filter": "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n",
    "nat": "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\nCOMMIT\n",
}
"""What a table holds that nobody has used."""


def refuse(reason: str) -> NoReturn:
    """Skip, or fail where Docker is required."""
    if os.environ.get("REQUIRE_DOCKER") == "1":
        pytest.fail(f"REQUIRE_DOCKER=1, but {reason}")
    pytest.skip(reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Docker:
    """Runs `docker` against one engine."""

    environment: Mapping[str, str]
    folder: Path
    """Where commands run."""

    def __call__(self, *arguments: str, timeout_s: float = 120, check: bool = True) -> str:
        """The command's stdout."""
        done = self.attempt(*arguments, timeout_s=timeout_s)
        if check and done.returncode != 0:
            pytest.fail(f"docker {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def attempt(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """The command, however it ends."""
        return subprocess.run(
            ["docker", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Print how long it took."""
        began_s = time.monotonic()
        yield
        show(f"{what}: {time.monotonic() - began_s:.0f} s")


def show(line: str) -> None:
    """For people who watch; pytest runs with -s here."""
    print(f"\n  {line}", end="", flush=True)  # noqa: T201


@pytest.fixture(scope="session")
def engine() -> Iterator[Docker]:
    """A Docker engine in which a trial container has run, and in which the base image lies."""
    if shutil.which("docker") is None:
        refuse("there is no docker command; apt-get install docker.io")
    outside = Docker(environment={}, folder=ROOT)
    for plugin in ("compose", "buildx"):
        if (done := outside.attempt(plugin, "version")).returncode != 0:
            refuse(f"`docker {plugin} version` fails ({last_line(done.stderr)}); install the {plugin} plugin")
    if outside.attempt("info").returncode == 0:
        yield tried(outside)
        return
    if os.getuid() != 0 or shutil.which("dockerd") is None:
        refuse("no Docker engine answers, and only root can start one, where dockerd is installed")
    with own_engine() as docker:
        yield tried(docker)


def tried(docker: Docker) -> Docker:
    """The engine, once the base image is there and a container has run."""
    if docker.attempt("image", "inspect", BASE).returncode != 0:
        provide_base(docker)
    trial = docker.attempt("run", "--rm", "--network", "none", BASE, "python3", "-c", "print('ran')")
    if trial.stdout.strip() != "ran":
        refuse(f"a trial `docker run` fails: {last_line(trial.stderr)}")
    return docker


def provide_base(docker: Docker) -> None:
    """Pull the base image, or make a stand-in where the registry can't be reached."""
    pull = docker.attempt("pull", BASE, timeout_s=PULL_TIMEOUT_S)
    if pull.returncode == 0:
        return
    with docker.timed("stand-in base image"):
        status, errors = make_base(docker)
    if status != 0:
        refuse(f"{BASE} can't be pulled ({last_line(pull.stderr)}), nor made ({last_line(errors)})")


def make_base(docker: Docker) -> tuple[int, str]:
    """Exit code and stderr of the script; where this is interrupted, so is all that the script started."""
    made = subprocess.Popen(
        [ROOT / "docker" / "make-base-image.sh", BASE],
        env={**os.environ, **docker.environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = made.communicate(timeout=BUILD_TIMEOUT_S)
    except BaseException:
        os.killpg(made.pid, signal.SIGTERM)
        made.wait(START_TIMEOUT_S)
        raise
    return made.returncode, errors


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"


@contextmanager
def own_engine() -> Iterator[Docker]:
    """Start dockerd; afterwards it, its data and what it changed in the kernel are gone."""
    before = KernelState.now()
    # not below pytest's folder: a socket's path has at most 107 bytes; not named as .ci/run looks for leftovers, which
    # may run other tests meanwhile
    with TemporaryDirectory(prefix="docker-gkd-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        socket = f"unix://{folder}/docker.sock"
        command = ["dockerd", "-H", socket, "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
        with (folder / "log").open("wb") as log:
            daemon = subprocess.Popen(
                [*command, "--pidfile", f"{folder}/pid"], stdout=log, stderr=log, start_new_session=True
            )
        try:
            docker = Docker(environment={"DOCKER_HOST": socket}, folder=ROOT)
            await_engine(docker, daemon, folder / "log")
            yield docker
            assert docker("ps", "--all", "--quiet") == ""
        finally:
            daemon.terminate()
            daemon.wait(START_TIMEOUT_S)
            before.restore()
    assert not folder.exists()
    assert KernelState.now() == before


def await_engine(docker: Docker, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while docker.attempt("info").returncode != 0:
        if daemon.poll() is not None or time.monotonic() > deadline:
            refuse(f"dockerd does not start: {last_line(log.read_text(errors='replace'))}")
        time.sleep(0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelState:
    """What dockerd changes and leaves changed."""

    ip_forward: str
    tables: Mapping[str, str]
    """Rules by table, in the form of iptables-save, without counters and comments."""
    bridge: bool
    """Whether there is a docker0."""

    @classmethod
    def now(cls) -> KernelState:
        """Read it."""
        tables = {name: saved_table(name) for name in EMPTY_TABLES}
        return cls(ip_forward=IP_FORWARD.read_text(), tables=tables, bridge=(INTERFACES / "docker0").exists())

    def restore(self) -> None:
        """Make it so again; iptables-restore drops every chain that it is not told of."""
        for table in self.tables.values():
            command(["iptables-restore"], stdin=table)
        IP_FORWARD.write_text(self.ip_forward)
        if not self.bridge and (INTERFACES / "docker0").exists():
            command(["ip", "link", "delete", "docker0"])


def saved_table(name: str) -> str:
    saved = command(["iptables-save", "--table", name])
    lines = [line.split(" [")[0] for line in saved.splitlines() if line and not line.startswith("#")]
    return "\n".join(lines) + "\n" if lines else EMPTY_TABLES[name]


def command(words: Sequence[str], *, stdin: str = "") -> str:
    return subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=30, check=True).stdout
