"""What vLLM's engine is started with: the service's own arguments, its defaults for the device, and what a user adds.

Nothing here imports vllm: the fields of `AsyncEngineArgs`, which differ between versions, are passed in.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm.adapter import Adapter, max_rank
from teacher_service.errors import SettingsError

CPU_KV_CACHE_BYTES = 1 << 30
"""KV cache on a CPU where none is asked for: vLLM's own default takes nearly all memory of the machine."""
CPU_BLOCK_TOKENS = 32
"""Tokens of a cached block on a CPU. Only whole blocks before the first scored row are shared by siblings, and vLLM's
default there is 128."""
IN_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the model in the engine's own process. On a CPU vLLM would start a worker beside it, which spins on its queue
for a second after each step: a whole core taken from whoever shares the machine. The full name, since vLLM replaces the
short one."""
CPU_WORKER = "teacher_service.engine.vllm.cpu_worker.TeacherCPUWorker"
NO_CUDA_GRAPHS: Mapping[str, str] = {"cudagraph_mode": "NONE"}
"""Graphs speed up steps of a few tokens. Scoring never decodes, and capturing them takes minutes and memory."""

_FLAGS = {
    "model": "--model",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "trust_remote_code": "--trust-remote-code",
    "max_model_len": "--max-model-len",
    "max_logprobs": "--max-num-logprobs",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "kv_cache_memory_bytes": "--kv-cache-bytes",
    "tensor_parallel_size": "--tensor-parallel-size",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "data_parallel_size": "--data-parallel-size",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_seqs": "--max-num-seqs",
    "max_num_queued_reqs": "--max-queued-requests",
    "max_num_queued_tokens": "--max-queued-tokens",
    "enforce_eager": "--enforce-eager",
    "enable_lora": "--lora",
    "enable_prefix_caching": "--fast-route",
}
"""Argument -> the flag that sets it, or that it follows."""

_NO_TOKENIZER = "sequences come as token ids, so vLLM loads no tokenizer"
_FETCHED_HERE = "the service fetches the model itself, and vLLM reads its folder"
_OWN_CLASS = "the service installs a class of its own there"
_ONE_TOKEN = "vLLM samples one token for each sequence, and the service drops it"
_REASONS = {
    **dict.fromkeys(("skip_tokenizer_init", "tokenizer", "tokenizer_mode", "tokenizer_revision"), _NO_TOKENIZER),
    **dict.fromkeys(("revision", "hf_token", "download_dir", "ignore_patterns"), _FETCHED_HERE),
    **dict.fromkeys(("worker_cls", "worker_extension_cls", "scheduler_cls"), _OWN_CLASS),
    **dict.fromkeys(
        (
            "generation_config",
            "override_generation_config",
            "logits_processors",
            "seed",
            "speculative_config",
            "spec_method",
            "spec_model",
            "spec_tokens",
        ),
        _ONE_TOKEN,
    ),
    **dict.fromkeys(("disable_log_stats", "enable_log_requests"), "the service has a log and metrics of its own"),
    **dict.fromkeys(("runner", "convert"), "a teacher is a causal language model"),
    "logprobs_mode": "answers are logprobs of the whole vocabulary, before any processing",
    "kv_sharing_fast_prefill": "it leaves out rows of the prompt, and the service scores those",
    "max_lora_rank": "the service takes it from the adapter of --lora",
    "model_weights": "the manifest has the digest of the weights in the model's folder",
    "served_model_name": "the service is called after the model's folder",
    "use_tqdm_on_load": "the service logs its own progress",
}
"""Argument that the service sets itself, or that would change what its answers mean -> why nobody else sets it."""

_ABOUT_GRAPHS = frozenset({"compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size"})


def engine_arguments(
    options: EngineOptions,
    *,
    directory: Path,
    dtype: str,
    adapter: Adapter | None,
    is_cpu: bool,
    fields: Sequence[dataclasses.Field[Any]],
) -> dict[str, Any]:
    """The keyword arguments of vLLM's `AsyncEngineArgs`; what a user added wins over the service's defaults.

    On a GPU the sizes of a step stay unset: vLLM chooses them for the device, as its own server does.

    What depends on the route (`worker_extension_cls`, `scheduler_cls`, `enable_prefix_caching`) is the engine's to add.

    Args:
        options: what was asked for.
        directory: of the checkpoint.
        dtype: arithmetic type of the weights, in vLLM's words.
        adapter: that the teacher answers with; None: the base model.
        is_cpu: whether this vLLM computes on a CPU.
        fields: of this vLLM's `AsyncEngineArgs`.

    Raises:
        SettingsError: an added argument is unknown, the service's own, or of another type.
        EngineStartError: vLLM takes no adapter of that rank.
    """
    added = added_arguments(options.vllm_arg, fields)
    enforce_eager = is_cpu if options.enforce_eager is None else options.enforce_eager
    return {
        "model": str(directory),
        "trust_remote_code": options.trust_remote_code,
        "skip_tokenizer_init": True,  # ids in, ids out
        "generation_config": "vllm",  # the checkpoint's sampling defaults are no part of scoring
        "dtype": dtype,
        "quantization": options.quantization,
        "enable_lora": adapter is not None,
        "max_model_len": options.max_model_len,
        "max_logprobs": options.max_num_logprobs,
        "seed": options.seed,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "data_parallel_size": options.data_parallel_size,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "max_num_seqs": options.max_num_seqs,
        "enforce_eager": enforce_eager,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **({} if adapter is None else {"max_lora_rank": max_rank(adapter.rank)}),
        **(_cpu_defaults(options) if is_cpu else {}),
        **(
            {}
            if is_cpu or enforce_eager or _ABOUT_GRAPHS & added.keys()
            else {"compilation_config": dict(NO_CUDA_GRAPHS)}
        ),
        **added,
    }


def added_arguments(given: Mapping[str, str], fields: Sequence[dataclasses.Field[Any]]) -> dict[str, Any]:
    """What a user added, as values of the fields' types. Needs no model, so that it can be refused first.

    Raises:
        SettingsError: an argument is unknown, the service's own, or of another type.
    """
    known = {field.name: field for field in fields if not field.name.startswith("_")}
    for name in given:
        _refuse(name, known)
    return {name: _value(known[name], text) for name, text in given.items()}


def _refuse(name: str, known: Mapping[str, object]) -> None:
    if name in _FLAGS:
        raise _error(name, f"{name} follows a setting of the service: use {_FLAGS[name]}")
    if name in _REASONS:
        raise _error(name, f"{name} can't be set: {_REASONS[name]}")
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        suggestion = f"; did you mean {nearest[0]}?" if nearest else "."
        raise _error(
            name,
            f"this vLLM has no engine argument {name}{suggestion} All of them are on the page Engine Arguments of "
            "vLLM's documentation",
        )


def _value(field: dataclasses.Field[Any], text: str) -> Any:
    """JSON where the field takes it so, else the text itself; vLLM judges types that can't be checked here."""
    found = _json_or_text(text)
    kind: Any = field.type
    parts = _parts(kind)
    if any(isinstance(part, type) and issubclass(part, enum.Enum) for part in parts):
        return found  # vLLM takes their members by name, which pydantic does not
    # 1 is no bool and true no int. The classes of vLLM's configuration read themselves as they are meant to be read.
    strict = not any(dataclasses.is_dataclass(part) for part in parts)
    problem = ""
    for reading in dict.fromkeys((json.dumps(found), json.dumps(text))):
        try:
            return TypeAdapter(kind).validate_json(reading, strict=strict)
        except PydanticUserError:
            return found
        except ValidationError as exc:
            problem = problem or "; ".join(_describe(one) for one in exc.errors())
    raise _error(field.name, f"{field.name} is {text!r}: {problem}")


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _parts(kind: Any) -> list[Any]:
    """A type and all that it is made of."""
    return [kind, *(part for argument in typing.get_args(kind) for part in _parts(argument))]


def _describe(problem: Mapping[str, Any]) -> str:
    """One of pydantic's problems; where it lies inside a larger value, with its place."""
    place = ".".join(str(step) for step in problem["loc"])
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])


def _error(name: str, message: str) -> SettingsError:
    return SettingsError(
        f"--vllm-arg (or TEACHER_VLLM_ARG): {message}", metadata={"field": "--vllm-arg", "value": name}
    )


def _cpu_defaults(options: EngineOptions) -> dict[str, Any]:
    in_process = options.tensor_parallel_size * options.pipeline_parallel_size == 1
    return {
        "block_size": CPU_BLOCK_TOKENS,
        "kv_cache_memory_bytes": options.kv_cache_bytes or CPU_KV_CACHE_BYTES,
        "distributed_executor_backend": IN_PROCESS_EXECUTOR if in_process else None,
        "worker_cls": CPU_WORKER,
    }
