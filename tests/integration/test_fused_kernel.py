"""The fused scoring kernel against the torch form: interpreted on a CPU, run on a GPU, and compiled without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teacher_service.engine.vllm.fast import forms, kernel
from tests.support import fused_check
from tests.support.ranks import ISOLATED, ROOT

PTXAS = ISOLATED / "triton" / "backends" / "nvidia" / "bin" / "ptxas"
WITH_TRITON = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ISOLATED}", "OMP_NUM_THREADS": "2"}


def _check(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", fused_check.__name__, *arguments]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_interpreted_kernel_equals_the_torch_form() -> None:
    """For every K, type and temperature, with ties, ruled-out tokens, padded rows and tails of 1e-12."""
    assert _check("run", "cpu", TRITON_INTERPRET="1", **WITH_TRITON) == f"{fused_check.NUM_CASES} cases agree"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_compiled_kernel_equals_the_torch_form() -> None:
    """The same on a GPU."""
    assert _check("run", "cuda", PYTHONPATH=f"{ROOT}") == f"{fused_check.NUM_CASES} cases agree"


@pytest.mark.skipif(not PTXAS.is_file(), reason="this Triton has no ptxas, NVIDIA's assembler")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_each_kernel_compiles_for_a_gpu(tmp_path: Path, capability: str) -> None:
    """Down to machine code, for the types and flags that are used, each form of a kernel once."""
    counts = _check("compile", capability, TRITON_CACHE_DIR=f"{tmp_path}", **WITH_TRITON)
    assert counts == f"{fused_check.NUM_KERNELS}"


def test_the_scratch_memory_has_a_bound() -> None:
    """For every V, K and type what is allocated stays within it; it is small beside the torch form's."""
    assert _check("price", "cuda", **WITH_TRITON).endswith(" prices hold")


def test_on_a_cpu_torch_is_the_form() -> None:
    """There it is no second choice."""
    assert forms.choose("cpu", widths={32}, dtype=torch.float32, num_logprobs=4) == (kernel.score_rows, None)


def test_without_triton_torch_is_the_form_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised."""
    monkeypatch.setitem(sys.modules, "triton", None)
    form, reason = forms.choose("cuda", widths={32}, dtype=torch.bfloat16, num_logprobs=4)
    assert form is kernel.score_rows
    assert reason is not None
    assert "Triton can't be imported (ModuleNotFoundError" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a device that can't be used gives")
def test_without_the_device_torch_is_the_form_and_says_why() -> None:
    """In a process that has Triton: nothing is raised there either."""
    program = (
        "import torch; from teacher_service.engine.vllm.fast import forms; "
        "form, reason = forms.choose('cuda', widths={32}, dtype=torch.bfloat16, num_logprobs=4); "
        "print(form.__module__, reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | WITH_TRITON, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{kernel.__name__} the Triton kernel can't run on cuda (")
