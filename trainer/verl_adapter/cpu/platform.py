"""A verl platform for machines without an accelerator."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _build_device_module() -> types.ModuleType:
    """What verl calls as it would `torch.cuda`: torch.cpu, with memory figures of the process and the machine."""
    module = types.ModuleType("trainer.verl_adapter.cpu.device")
    for name in dir(torch.cpu):
        if not name.startswith("_"):
            setattr(module, name, getattr(torch.cpu, name))
    vars(module).update(
        # verl's guarded branches then take their no-accelerator path
        is_available=lambda: False,
        current_device=lambda: torch.device("cpu"),
        device_count=lambda: 1,
        set_device=_ignore,
        synchronize=_ignore,
        empty_cache=_ignore,
        ipc_collect=_ignore,
        reset_peak_memory_stats=_ignore,
        memory_allocated=_resident_bytes,
        memory_reserved=_resident_bytes,
        max_memory_allocated=_resident_bytes,
        max_memory_reserved=_resident_bytes,
        mem_get_info=_machine_memory,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_device_name=lambda *_: "CPU",
    )
    return module


def _ignore(*_args: object) -> None:
    return None


def _resident_bytes(*_args: object) -> int:
    return int(psutil.Process().memory_info().rss)


def _machine_memory(*_args: object) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


_DEVICE_MODULE = _build_device_module()


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):  # type: ignore[misc]  # verl carries no types
    """Gloo for collectives, shared memory for weights, and Ray's GPU resource as a plain counter of workers."""

    @property
    def device_name(self) -> str:
        """Torch's device type."""
        return "cpu"

    @property
    def vendor_name(self) -> str:
        """No vendor's engine is selected by it."""
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        """What stands in for `torch.cuda`."""
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        """A CPU is always there."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never chosen by auto-detection: only VERL_PLATFORM=cpu selects it."""
        return False

    def current_device(self) -> torch.device:
        """The one device."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """One."""
        return 1

    def set_device(self, device_index: int) -> None:
        """There is nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs ahead."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The allocator has none."""

    def empty_cache(self) -> None:
        """There is no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """A CPU has no compute capability."""
        return None, None

    def communication_backend_name(self) -> str:
        """Gloo."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """What Ray sets for its GPU resource, which here merely counts workers."""
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """Ray's built-in accelerator resource, granted in `ray_init.num_gpus` without any GPU."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Keeps Ray from hiding the counter from the workers."""
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        """No: verl then moves weights through shared memory."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """Set by `environment.py` for every process instead."""
        return {}

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """There is no profiler to mark for."""
        yield

    def profiler_start(self) -> None:
        """There is no device profiler."""

    def profiler_stop(self) -> None:
        """There is no device profiler."""

    def cudart(self) -> None:
        """There is no CUDA runtime."""
