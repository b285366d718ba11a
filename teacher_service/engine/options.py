"""What an engine is told before it loads; one place, free of heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Options of every engine; each reads what concerns it. `ServiceSettings` refuses what the chosen one does not."""

    model: str | None = None
    """Folder of a checkpoint, or a hub id. `fake` needs none, and takes it for its name."""
    dtype: str = "auto"
    """Arithmetic type of the weights; `auto` takes the checkpoint's."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto` (transformers; vLLM takes the device it was built for)."""
    max_model_len: int | None = None
    """Longest sequence in tokens; None: what the model was built for."""
    max_num_logprobs: int = 256
    """Largest K; capped at the vocabulary."""
    seed: int = 0
    """Of vLLM's sampler, which scoring does not use."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that vLLM may take."""
    kv_cache_bytes: int | None = None
    """Size of vLLM's KV cache; None: from `gpu_memory_utilization`, or 1 GiB on a CPU."""
    tensor_parallel_size: int = 1
    """GPUs that vLLM spreads each layer over."""
    pipeline_parallel_size: int = 1
    """Groups of GPUs that vLLM spreads the layers over."""
    data_parallel_size: int = 1
    """Replicas of the model that vLLM runs behind one engine."""
    quantization: str | None = None
    """How vLLM reads quantised weights; None: as the checkpoint says."""
    lora: str | None = None
    """Folder of a LoRA adapter that the teacher answers with; None: the base model."""
    max_num_batched_tokens: int | None = None
    """Tokens per step of vLLM; None: its default."""
    max_num_seqs: int | None = None
    """Sequences per step of vLLM; None: its default."""
    enforce_eager: bool | None = None
    """Whether vLLM runs without compiling; None: only on a CPU."""
    fast_route: bool = True
    """Whether vLLM may score by the fast route; else by its public one."""
    vllm_arg: Mapping[str, str] = field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`: JSON or text by name."""
    trust_remote_code: bool = False
    """Whether Python code that lies in the checkpoint may run here."""
    fake_latency_s: float = 0.0
    """Seconds that `fake` takes for a sequence."""
