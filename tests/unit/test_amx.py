"""The permission without which Linux kills a process for its first AMX instruction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.verl_adapter.cpu.amx import AmxRefusedError, request_amx

ROOT = Path(__file__).parents[2]

# The kernel's own account of what the process may use: arch_prctl(ARCH_GET_XCOMP_PERM), bit 18 is AMX's tiles.
_PERMITTED = """
import ctypes
import torch
from trainer.verl_adapter.cpu.amx import request_amx

def is_permitted():
    features = ctypes.c_uint64()
    assert ctypes.CDLL(None, use_errno=True).syscall(158, 0x1022, ctypes.byref(features)) == 0
    return bool(features.value >> 18 & 1)

before = is_permitted()
request_amx()
request_amx()
print(before, is_permitted())
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX to ask for")
def test_the_kernel_permits_amx_once_it_was_asked() -> None:
    """A fresh process may not use AMX; after the request it may, and asking twice is fine."""
    done = subprocess.run([sys.executable, "-c", _PERMITTED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_processor_without_amx_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most machines have none."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: pytest.fail("asked"))
    request_amx()


def test_a_refusal_is_an_error_before_the_kernel_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what usually refuses."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    with pytest.raises(AmxRefusedError, match="seccomp"):
        request_amx()
