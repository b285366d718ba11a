"""Builds the engine that a setting names; the heavy libraries are imported only when theirs is the one."""

from __future__ import annotations

from typing import Literal

from teacher_service.engine.base import Engine
from teacher_service.engine.options import EngineOptions
from teacher_service.errors import EngineStartError

EngineName = Literal["vllm", "transformers", "fake"]


def build_engine(name: EngineName, options: EngineOptions) -> Engine:
    """An engine that is not started yet.

    Raises:
        EngineStartError: the engine needs a model and none is given, or can't apply the adapter that is.
    """
    if options.lora is not None and name != "vllm":
        raise EngineStartError(
            f"engine {name!r} can't apply the LoRA adapter {options.lora}; take --engine vllm, or merge it into the "
            "model (PEFT's merge_and_unload) and serve the result"
        )
    if name == "fake":
        from teacher_service.engine.fake import FakeEngine
        from teacher_service.engine.model_files import model_name

        return FakeEngine(
            max_model_len=options.max_model_len or FakeEngine.DEFAULT_MAX_MODEL_LEN,
            model_name=FakeEngine.DEFAULT_MODEL_NAME if options.model is None else model_name(options.model),
            latency_s=options.fake_latency_s,
        )
    if options.model is None:
        raise EngineStartError(f"engine {name!r} has no model; give a checkpoint's folder or a hub id")
    if name == "transformers":
        from teacher_service.engine.transformers import TransformersEngine

        return TransformersEngine(
            model=options.model,
            dtype=options.dtype,
            device=options.device,
            max_model_len=options.max_model_len,
            max_num_logprobs=options.max_num_logprobs,
            trust_remote_code=options.trust_remote_code,
        )
    from teacher_service.engine.vllm.engine import VllmEngine

    return VllmEngine(options)
