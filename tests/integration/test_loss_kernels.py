"""The Triton kernels against the torch form: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support import kernel_check
from tests.support.ranks import ISOLATED, ROOT


def test_interpreted_kernels_equal_the_torch_form() -> None:
    """Value, gradient and statistics of every form, by Triton's interpreter in a process of its own."""
    command = [sys.executable, "-m", kernel_check.__name__, "cpu"]
    interpreted = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ISOLATED}", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        command, env=os.environ | interpreted, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{kernel_check.NUM_CASES} cases agree"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_equal_the_torch_form() -> None:
    """The same on a GPU."""
    command = [sys.executable, "-m", kernel_check.__name__, "cuda"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": f"{ROOT}"}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
