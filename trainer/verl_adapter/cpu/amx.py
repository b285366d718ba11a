"""Permission to use the processor's matrix unit (AMX).

Linux gives a process AMX only on request, and kills one that uses it without asking with SIGILL. vLLM takes its
AMX attention for bfloat16 wherever the processor has AMX, and does not ask: it works only where another library of the
process happened to ask before.

Source: Linux, Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import torch


class AmxRefusedError(RuntimeError):
    """The processor has AMX, and the kernel does not let this process use it."""


def request_amx() -> None:
    """Ask for AMX where there is one. Idempotent; holds for every thread of the process, not for its children.

    Raises:
        AmxRefusedError: the kernel refuses.
    """
    # torch has no public form of either; vLLM asks the same way
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise AmxRefusedError(
            "this processor has AMX, which vLLM uses for bfloat16, but the kernel does not let this process use it; "
            "is arch_prctl filtered, as by a container's seccomp profile? Allow it, or train on another machine"
        )
