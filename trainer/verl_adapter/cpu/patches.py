"""Every place where verl 0.9.1 has to be changed in memory to run without an accelerator. Nothing else patches it.

A test compares the signatures and lines relied on with the installed verl, so that an upgrade fails loudly.
"""

from __future__ import annotations

import importlib.metadata
import os
from datetime import timedelta

import torch.distributed
import torch.distributed.fsdp
import verl.utils.distributed

SUPPORTED_VERL_VERSION = "0.9.1"


class UnsupportedVerlError(RuntimeError):
    """The installed verl is not the one that these patches were written for."""


def apply_patches() -> None:
    """Apply all patches to this process. Idempotent.

    Raises:
        UnsupportedVerlError: another verl than 0.9.1 is installed.
    """
    installed = importlib.metadata.version("verl")
    if installed != SUPPORTED_VERL_VERSION:
        raise UnsupportedVerlError(
            f"verl {installed} is installed; running it on a CPU is supported for {SUPPORTED_VERL_VERSION} only. "
            f"Install verl=={SUPPORTED_VERL_VERSION}, or run on an accelerator."
        )
    # verl asks for the backend "cpu:gloo,cpu:gloo", which torch rejects as naming a device twice
    verl.utils.distributed.initialize_global_process_group_ray = initialize_gloo_process_group
    # verl's reference model always pins its offloaded memory, which needs an accelerator
    torch.distributed.fsdp.CPUOffloadPolicy = UnpinnedCPUOffloadPolicy  # type: ignore[misc]


def initialize_gloo_process_group(timeout_second: float | None = None, backend: str | None = None) -> None:
    """Stands in for `verl.utils.distributed.initialize_global_process_group_ray`, with gloo alone."""
    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend=backend or "gloo",
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        timeout=None if timeout_second is None else timedelta(seconds=timeout_second),
        init_method=os.environ.get("DIST_INIT_METHOD"),
    )


_PinnedCPUOffloadPolicy = torch.distributed.fsdp.CPUOffloadPolicy


class UnpinnedCPUOffloadPolicy(_PinnedCPUOffloadPolicy):
    """An offload policy that never pins memory, whatever is asked for."""

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(pin_memory=False)
