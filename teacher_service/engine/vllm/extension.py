"""What is added to vLLM's worker on every route: `worker_extension_cls`, whose methods `collective_rpc` calls."""

from __future__ import annotations

from typing import Any

import torch

from teacher_service.engine.vllm.adapter import detach_from_logits, placement


class TeacherExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def free_device_bytes(self) -> int | None:
        """Device memory that scoring may take between two forward passes; None: the model computes in main memory.

        What vLLM's allocator holds and does not use at the moment counts as free. Call it after a forward pass of the
        largest size: the allocator has then taken all that vLLM needs.
        """
        device = self.model_runner.device
        if device.type != "cuda":
            return None
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)

    def detach_adapter_from_logits(self) -> None:
        """See `adapter.detach_from_logits`."""
        detach_from_logits(self.model_runner.model)

    def adapter_placement(self) -> dict[str, list[str]]:
        """See `adapter.placement`."""
        return placement(self.model_runner.model)
