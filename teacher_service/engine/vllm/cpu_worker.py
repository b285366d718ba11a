"""vLLM's worker on a CPU, allowed to use the processor's matrix unit (AMX), and able to run a part of the layers.

Linux gives a process AMX only on request, and kills one that uses it without asking with SIGILL. vLLM takes its
AMX attention for bfloat16 wherever the processor has AMX, and does not ask: it works only where another library of the
process happened to ask before.

Source: Linux, Documentation/arch/x86/xstate.rst.

A pipeline's later stages take their input into buffers that vLLM makes in a profiling run, and on a CPU vLLM makes none
without compiling.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class TeacherCPUWorker(CPUWorker):  # type: ignore[misc] # vllm carries no types
    """vLLM's own worker; `VllmEngine` names it as `worker_cls` on a CPU."""

    def init_device(self) -> None:
        """Ask for AMX where there is one, before anything is computed; the rest is vLLM's.

        Raises:
            RuntimeError: the kernel refuses, and the model's dtype would need it.
        """
        # torch has no public form of either; vLLM asks the same way
        refused = torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx()
        if refused and self.model_config.dtype == torch.bfloat16:
            raise RuntimeError(
                "this processor has AMX, which vLLM uses for bfloat16, but the kernel does not let this process use it "
                "(is arch_prctl filtered?); serve with --dtype float32"
            )
        super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        """Let a stage of a pipeline make its buffers; the rest is vLLM's."""
        if self.parallel_config.pipeline_parallel_size > 1:
            self.model_runner.profile_run()
        return super().compile_or_warm_up_model()
