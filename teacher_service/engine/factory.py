"""Builds the engine that a setting names; the heavy libraries are imported only when theirs is the one."""

from __future__ import annotations

from typing import Literal

from teacher_service.engine.base import Engine
from teacher_service.errors import EngineStartError

EngineName = Literal["vllm", "transformers", "fake"]


def build_engine(
    name: EngineName,
    *,
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_model_len: int | None = None,
    max_num_logprobs: int = 256,
    seed: int = 0,
    gpu_memory_utilization: float = 0.9,
    kv_cache_bytes: int | None = None,
    tensor_parallel_size: int = 1,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    enforce_eager: bool | None = None,
) -> Engine:
    """An engine that is not started yet. An engine ignores what does not concern it.

    Args:
        name: which engine.
        model: folder of a checkpoint, or a hub id. `fake` needs none.
        dtype: arithmetic type of the weights; `auto` takes the checkpoint's.
        device: `cpu`, `cuda` or `auto` (transformers; vLLM takes the device it was built for).
        max_model_len: longest sequence in tokens; None: what the model was built for.
        max_num_logprobs: largest K; capped at the vocabulary.
        seed: of vLLM's sampler, which scoring does not use.
        gpu_memory_utilization: share of the GPU's memory that vLLM may take.
        kv_cache_bytes: size of vLLM's KV cache; None: from `gpu_memory_utilization`, or 1 GiB on a CPU.
        tensor_parallel_size: GPUs that vLLM spreads the model over.
        max_num_batched_tokens: tokens per step of vLLM; None: its default.
        max_num_seqs: sequences per step of vLLM; None: its default.
        enforce_eager: whether vLLM runs without compiling; None: only on a CPU.

    Raises:
        EngineStartError: the engine needs a model and none is given.
    """
    if name == "fake":
        from teacher_service.engine.fake import FakeEngine

        return FakeEngine(max_model_len=max_model_len or FakeEngine.DEFAULT_MAX_MODEL_LEN)
    if model is None:
        raise EngineStartError(f"engine {name!r} has no model; give a checkpoint's folder or a hub id")
    if name == "transformers":
        from teacher_service.engine.transformers import TransformersEngine

        return TransformersEngine(
            model=model, dtype=dtype, device=device, max_model_len=max_model_len, max_num_logprobs=max_num_logprobs
        )
    from teacher_service.engine.vllm.engine import VllmEngine

    return VllmEngine(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_logprobs=max_num_logprobs,
        seed=seed,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_bytes=kv_cache_bytes,
        tensor_parallel_size=tensor_parallel_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        enforce_eager=enforce_eager,
    )
