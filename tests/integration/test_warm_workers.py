"""Workers that are forks of one warm process: like cold ones in all that a program can see, and cold when in doubt."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.support.waiting import until
from trainer.verl_adapter.cpu.warm_workers import PY_EXECUTABLE, warm_workers

PROBE = """
import sys
found = sorted({"ray", "torch"} & set(sys.modules))
import json, multiprocessing, os, random, signal, tempfile
import numpy
print(json.dumps({
    "found": found, "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "name": __name__, "file": __file__,
    "setting": os.environ.get("A_SETTING"), "temporary": tempfile.gettempdir(), "leads": os.getpgrp() == os.getpid(),
    "random": [random.random(), float(numpy.random.rand())],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "child": multiprocessing.get_context("spawn").Pool(1).apply(len, ([1, 2],)),
}))
if len(sys.argv) > 1:
    sys.exit(int(sys.argv[1]))
"""
DRIVER = """
import sys, time
from omegaconf import OmegaConf
from trainer.verl_adapter.cpu.warm_workers import PY_EXECUTABLE, warm_workers
config = OmegaConf.create({"trainer": {"device": "cpu"}})
with warm_workers(config, frozenset()):
    print(OmegaConf.select(config, PY_EXECUTABLE), flush=True)
    time.sleep(600)
"""


def _config(device: str = "cpu") -> DictConfig:
    return OmegaConf.create({"trainer": {"device": device}})


@pytest.fixture(scope="module")
def executable() -> Iterator[str]:
    """What Ray is told to start for Python."""
    config = _config()
    with warm_workers(config, frozenset()):
        yield OmegaConf.select(config, PY_EXECUTABLE)


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """The program that tells what it finds."""
    path = tmp_path / "probe.py"
    path.write_text(f'if __name__ == "__main__":\n{"".join(f"    {one}" for one in PROBE.splitlines(keepends=True))}')
    return path


def _start(executable: str, probe: Path, *arguments: str, **environ: str) -> dict[str, Any]:
    """What the probe says; it may outlive the process that Ray would have started."""
    command = f"exec {executable} {shlex.quote(str(probe))} {' '.join(arguments)}"
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | environ,
        cwd=probe.parent,
        capture_output=True,
        check=True,
        timeout=120,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_warm_worker_is_like_a_cold_one_but_for_its_imports(executable: str, probe: Path) -> None:
    """Arguments, folder, environment, signals, temporary folder and the processes that it spawns itself."""
    environ = {"A_SETTING": "kept", "TMPDIR": str(probe.parent)}
    warm = _start(executable, probe, "0", **environ)
    cold = _start(sys.executable, probe, "0", **environ)
    assert (warm.pop("found"), cold.pop("found")) == (["torch"], [])
    assert warm.pop("random") != cold.pop("random")
    assert warm == cold
    assert warm["setting"] == "kept"


def test_no_two_workers_draw_the_same_numbers(executable: str, probe: Path) -> None:
    """Neither Python's generator nor numpy's goes on where the warm process left it."""
    first, second = (_start(executable, probe)["random"] for _ in range(2))
    assert not set(first) & set(second)


def test_a_setting_that_was_read_at_import_makes_a_worker_cold(executable: str, probe: Path) -> None:
    """What the warm process has imported with another setting is of no use."""
    found = _start(executable, probe, OMP_NUM_THREADS="3")
    assert found["found"] == []


def test_without_the_warm_process_workers_start_cold(probe: Path) -> None:
    """And when the driver is killed, the warm process goes, and its folder with it."""
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        executable = driver.stdout.readline().strip()
        folder = Path(shlex.split(executable)[-1]).parent
        assert _start(executable, probe)["found"] == ["torch"]
        driver.send_signal(signal.SIGKILL)
    asyncio.run(until(lambda: not folder.exists()))
    assert _start(executable, probe)["found"] == []


@pytest.mark.parametrize(
    ("device", "key"), [("cuda", ""), ("cpu", PY_EXECUTABLE), ("cpu", "ray_kwargs.ray_init.address")]
)
def test_nothing_is_changed_where_it_is_not_ours_to_choose(device: str, key: str) -> None:
    """With an accelerator, an executable of the user's own, or a cluster that is there already."""
    config = _config(device)
    with warm_workers(config, {key}):
        assert config == _config(device)
