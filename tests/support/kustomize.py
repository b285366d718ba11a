"""Real builds of deploy/, and the tools that check them, or the reason why there are none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.manifests import Manifest, parse_manifests

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv-deploy" / "bin"
OVERLAYS = ("cpu", "gpu", "ray")
TIMEOUT_S = 120.0


def kustomize_command() -> list[str]:
    """A command that builds the folder named after it; skips the test where there is none.

    With REQUIRE_KUSTOMIZE=1 the test fails instead.
    """
    path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    if (kubectl := shutil.which("kubectl", path=path)) is not None:
        return [kubectl, "kustomize"]
    if (kustomize := shutil.which("kustomize", path=path)) is not None:
        return [kustomize, "build"]
    reason = "neither kubectl nor kustomize is on PATH or in .venv-deploy (`make lint-deploy` makes it)"
    return _give_up("REQUIRE_KUSTOMIZE", reason)


def deploy_tool(name: str) -> str:
    """A program of .venv-deploy; skips the test where there is none, or fails it with REQUIRE_DEPLOY_TOOLS=1."""
    if not (TOOLS / name).exists():
        _give_up("REQUIRE_DEPLOY_TOOLS", f".venv-deploy has no {name}; `make lint-deploy` makes it")
    return str(TOOLS / name)


def _give_up(variable: str, reason: str) -> NoReturn:
    if os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1, but {reason}")
    pytest.skip(reason)


def built(folder: Path) -> list[Manifest]:
    """What kustomize makes of a folder."""
    done = subprocess.run(
        [*kustomize_command(), str(folder)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return parse_manifests(done.stdout)


def overlay_with_tls(folder: Path, overlay: str) -> Path:
    """A user's own kustomization, as docs/deploy.md has it: an overlay with the TLS component."""
    shutil.copytree(DEPLOY, folder / "deploy")
    own = folder / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [../deploy/overlays/{overlay}]\ncomponents: [../deploy/components/tls]\n"
    )
    return own
