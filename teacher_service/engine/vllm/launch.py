"""From a checkpoint to vLLM's running processes: what is read of it, what vLLM is told, and what has come of it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_service.engine import model_files
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm import arguments, environment
from teacher_service.engine.vllm.adapter import Adapter
from teacher_service.engine.vllm.processes import EngineProcesses, children
from teacher_service.engine.vllm.routes import NUM_GENERATED_TOKENS, V2_CHUNK_ROWS, FlatRoute, Route
from teacher_service.errors import EngineDeadError, EngineError, EngineStartError
from teacher_service.types import EngineInfo, TokenizerManifest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

WORKER_EXTENSION = "teacher_service.engine.vllm.extension.TeacherExtension"
SCORING_EXTENSION = "teacher_service.engine.vllm.fast.worker.ScoringExtension"
SCHEDULERS = {
    False: "teacher_service.engine.vllm.fast.scheduler.PrefixCappedScheduler",
    True: "teacher_service.engine.vllm.fast.scheduler.PrefixCappedAsyncScheduler",
}
"""Those of the fast route, by whether vLLM schedules a step while the one before is computed."""
WORKER_TIMEOUT_S = 60.0
"""Seconds that vLLM's workers may take for a call beside scoring."""
INSTALL_TIMEOUT_S = 240.0
"""Seconds that they may take to compile the fast route's kernels and to compare them."""
DEATH_POLL_S = 0.2
"""Seconds between two looks whether vLLM's engine lives: it has nothing to await."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What is read of a model before vLLM loads it."""

    directory: Path
    adapter: Adapter | None
    tokenizer: TokenizerManifest | None
    weights_digest: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A loaded model."""

    llm: AsyncLLM
    processes: EngineProcesses
    info: EngineInfo
    route: Route
    adapter: Adapter | None


def import_vllm() -> None:
    """Import vLLM, with the service's environment; call it in a thread of its own before anything is built.

    vLLM keeps import errors of optional modules. Their tracebacks hold the frames that import it, and with those
    whatever the frames hold, until the interpreter ends.
    """
    environment.set_defaults()
    import vllm.v1.engine.async_llm  # noqa: F401


def read_checkpoint(options: EngineOptions) -> Checkpoint:
    """Read what the manifest says of a model.

    Raises:
        EngineStartError: there is no model, or no adapter, or one that vLLM can't serve.
        SettingsError: an argument for vLLM is unknown, the service's own, or of another type.
    """
    from vllm import __version__
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    arguments.added_arguments(options.vllm_arg, dataclasses.fields(AsyncEngineArgs))
    directory = model_files.locate_model(str(options.model))
    model_files.check_remote_code(directory, is_trusted=options.trust_remote_code, model_types=_CONFIG_REGISTRY)
    adapter = None if options.lora is None else Adapter.read(options.lora, vllm_version=__version__)
    return Checkpoint(
        directory=directory,
        adapter=adapter,
        tokenizer=model_files.tokenizer_manifest(directory, trust_remote_code=options.trust_remote_code),
        weights_digest=model_files.weights_digest(directory, *([] if adapter is None else [adapter.folder])),
    )


def configure(options: EngineOptions, checkpoint: Checkpoint, *, fast: bool) -> VllmConfig:
    """What vLLM is told.

    Args:
        options: what was asked for.
        checkpoint: the model.
        fast: whether vLLM gets the fast route's classes.

    Raises:
        EngineStartError: vLLM refuses the model or an option.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    given = arguments.engine_arguments(
        options,
        directory=checkpoint.directory,
        dtype=_dtype(options, checkpoint.directory),
        adapter=checkpoint.adapter,
        is_cpu=current_platform.is_cpu(),
        fields=dataclasses.fields(AsyncEngineArgs),
    )
    if current_platform.is_cpu() and given["enforce_eager"]:
        environment.forbid_compiling()
    given["worker_extension_cls"] = SCORING_EXTENSION if fast else WORKER_EXTENSION
    given["enable_prefix_caching"] = fast  # vLLM never reads it for public prompt logprobs
    try:
        # steps as large as those of vLLM's own server
        config = AsyncEngineArgs(**given).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as exc:
        raise EngineStartError(
            f"vLLM refuses model {options.model!r} in {checkpoint.directory}, or an option: {in_words(exc)}"
        ) from exc
    if fast:
        config.scheduler_config.scheduler_cls = SCHEDULERS[bool(config.scheduler_config.async_scheduling)]
    return config


def load(
    options: EngineOptions, checkpoint: Checkpoint, config: VllmConfig, *, earlier_children: Iterable[BaseProcess]
) -> Running:
    """Start vLLM's processes. Blocks until the model is loaded.

    Raises:
        EngineStartError: a process can't load the model.
    """
    from vllm import __version__
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    model_config = config.model_config
    max_model_len = int(model_config.max_model_len)
    num_places = max_model_len + make_room(config)
    try:
        llm = AsyncLLM.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=True)
    except Exception as exc:
        raise EngineStartError(
            f"vLLM can't load model {options.model!r} from {checkpoint.directory}: {in_words(exc)}; where its process "
            "failed, its log above names the cause. Usual ones: an architecture that this version lacks, or too little "
            "memory (lower max_model_len, kv_cache_bytes or gpu_memory_utilization)"
        ) from exc
    vocab_rows = int(model_config.get_vocab_size())
    route = FlatRoute(
        vocab_rows,
        step_tokens=int(config.scheduler_config.max_num_batched_tokens),
        chunk_rows=V2_CHUNK_ROWS if config.use_v2_model_runner else None,
    )
    return Running(
        llm=llm,
        processes=EngineProcesses(children() - frozenset(earlier_children)),
        route=route,
        adapter=checkpoint.adapter,
        info=EngineInfo(
            name="vllm",
            version=str(__version__),
            model_name=_name(options, checkpoint),
            weights_digest=checkpoint.weights_digest,
            tokenizer=checkpoint.tokenizer,
            vocab_rows=vocab_rows,
            dtype=str(model_config.dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            max_request_tokens=num_places - NUM_GENERATED_TOKENS,
            max_num_logprobs=min(options.max_num_logprobs, vocab_rows),
            capabilities=route.capabilities,
            route=route.name,
            runner="V2" if config.use_v2_model_runner else "V1",
        ),
    )


def make_room(config: VllmConfig) -> int:
    """Give the token that each request generates a place behind the model's last; returns the places added.

    It is never fed back, so no row is computed there. Models whose arithmetic depends on the length keep theirs.
    """
    text_config = config.model_config.hf_text_config
    rotary = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None)
    if "longrope" in str(rotary) or str(getattr(text_config, "model_type", "")).startswith("llama4"):
        return 0
    config.model_config.max_model_len += NUM_GENERATED_TOKENS
    return NUM_GENERATED_TOKENS


async def on_every_worker(running: Running, method: str, *, timeout_s: float = WORKER_TIMEOUT_S) -> list[Any]:
    """What a method of the extension returns on each worker of each engine. vLLM's own call gives the first engine's.

    Raises:
        EngineError: it raised on one of them.
        EngineDeadError: vLLM died meanwhile.
        TimeoutError: it took too long; a worker may still be busy with it.
    """
    client = running.llm.engine_core
    calls = [
        client._call_utility_async("collective_rpc", method, timeout_s, (), None, engine=engine)
        for engine in client.core_engines
    ]
    gathering = asyncio.gather(*calls)
    deadline_s = time.monotonic() + timeout_s
    try:
        while not (await asyncio.wait({gathering}, timeout=DEATH_POLL_S))[0]:
            if running.llm.errored:
                raise EngineDeadError(f"{cause_of_death(running)}, during {method}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"vLLM's workers did not finish {method} within {timeout_s:.0f} s")
    finally:
        gathering.cancel()
    failure = gathering.exception()
    if failure is not None:
        raise EngineError(f"vLLM's worker failed in {method}: {in_words(failure)}") from failure
    return [one for answer in gathering.result() for one in answer]


def cause_of_death(running: Running) -> str:
    """Why vLLM's engine is dead, in words."""
    cause = running.processes.cause_of_death() or str(running.llm.dead_error)
    return f"vLLM's engine is dead: {cause}"


def in_words(exc: BaseException) -> str:
    """An exception of vLLM's, on one line."""
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def _name(options: EngineOptions, checkpoint: Checkpoint) -> str:
    """The model's, and its adapter's."""
    base = model_files.model_name(str(options.model))
    return base if checkpoint.adapter is None else f"{base}+{checkpoint.adapter.folder.name}"


def _dtype(options: EngineOptions, directory: Path) -> str:
    """The type asked for. vLLM's own `auto` would turn a float32 checkpoint into bfloat16."""
    asked = options.dtype
    return model_files.checkpoint_dtype(directory) or "auto" if asked == "auto" else asked
