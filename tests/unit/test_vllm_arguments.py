"""What vLLM is started with, and which of a user's own arguments reach it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm import arguments
from teacher_service.engine.vllm.adapter import Adapter
from teacher_service.errors import EngineStartError, SettingsError


class Backend(enum.Enum):
    """As vLLM's: a value is the path of a class."""

    FLASH = "vllm.flash.Backend"


@dataclasses.dataclass
class Nested:
    """A part of vLLM's configuration."""

    depth: int = 0
    share: float = 0.0


FIELD_TYPES: Mapping[str, Any] = {
    "model": str,
    "block_size": int | None,
    "cpu_offload_gb": float,
    "enable_expert_parallel": bool,
    "allowed_local_media_path": str,
    "load_format": str | Literal["auto"],
    "kv_cache_dtype": Literal["auto", "fp8"],
    "cudagraph_capture_sizes": list[int] | None,
    "cpu_offload_params": set[str],
    "model_loader_extra_config": dict[str, Any],
    "attention_backend": Backend | None,
    "compilation_config": Nested,
    "quantization_config": "dict[str, Any] | NotDefinedHere | None",
    "_api_process_count": int,
}
"""Of the kinds that `AsyncEngineArgs` has; the types are objects, as they are there."""
FIELDS = dataclasses.fields(dataclasses.make_dataclass("Arguments", FIELD_TYPES.items()))


def built(*, is_cpu: bool = False, adapter: Adapter | None = None, **options: Any) -> dict[str, Any]:
    return arguments.engine_arguments(
        EngineOptions(model="m", **options),
        directory=Path("/models/m"),
        dtype="bfloat16",
        adapter=adapter,
        is_cpu=is_cpu,
        fields=FIELDS,
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("block_size", "16", 16),
        ("block_size", "null", None),
        ("cpu_offload_gb", "4", 4.0),
        ("enable_expert_parallel", "true", True),
        ("allowed_local_media_path", "/data", "/data"),
        ("allowed_local_media_path", "16", "16"),
        ("load_format", "safetensors", "safetensors"),
        ("kv_cache_dtype", "fp8", "fp8"),
        ("kv_cache_dtype", '"fp8"', "fp8"),
        ("cudagraph_capture_sizes", "[1, 2]", [1, 2]),
        ("cpu_offload_params", '["a", "b"]', {"a", "b"}),
        ("model_loader_extra_config", '{"a": {"b": 1}}', {"a": {"b": 1}}),
        ("attention_backend", "FLASH", "FLASH"),
        ("compilation_config", '{"depth": 3, "share": 1}', Nested(depth=3, share=1.0)),
        ("quantization_config", '{"a": 1}', {"a": 1}),
        ("quantization_config", "text", "text"),
    ],
)
def test_a_value_is_json_or_else_text_of_the_fields_type(name: str, text: str, value: object) -> None:
    """Where a type can't be checked here (members of an enumeration, names from elsewhere) vLLM judges it."""
    found = arguments.added_arguments({name: text}, FIELDS)
    assert found == {name: value}
    assert type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("block_size", "abc", ("block_size is 'abc'", "valid integer")),
        ("block_size", "true", ("block_size is 'true'", "valid integer")),
        ("block_size", "1.5", ("block_size is '1.5'", "valid integer")),
        ("enable_expert_parallel", "yes", ("valid boolean",)),
        ("enable_expert_parallel", "1", ("valid boolean",)),
        ("kv_cache_dtype", "fp9", ("'fp9'", "'auto' or 'fp8'")),
        ("cudagraph_capture_sizes", "1", ("valid array",)),
        ("cudagraph_capture_sizes", '[1, "x"]', ("1: Input should be a valid integer",)),
        ("compilation_config", '{"depth": "deep"}', ("depth: Input should be a valid integer",)),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, text: str, parts: Sequence[str]) -> None:
    """With the value and the rule, in one line."""
    with pytest.raises(SettingsError) as caught:
        arguments.added_arguments({name: text}, FIELDS)
    assert "\n" not in caught.value.message
    for part in ("--vllm-arg (or TEACHER_VLLM_ARG)", *parts):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("blok_size", ("no engine argument blok_size", "did you mean block_size?", "Engine Arguments")),
        ("_api_process_count", ("no engine argument _api_process_count",)),
        ("model", ("use --model",)),
        ("max_model_len", ("use --max-model-len",)),
        ("kv_cache_memory_bytes", ("use --kv-cache-bytes",)),
        ("enable_prefix_caching", ("use --fast-route",)),
        ("scheduler_cls", ("scheduler_cls can't be set", "class of its own")),
        ("skip_tokenizer_init", ("token ids",)),
        ("kv_sharing_fast_prefill", ("leaves out rows",)),
    ],
)
def test_an_argument_that_is_unknown_or_the_services_own_is_refused(name: str, parts: Sequence[str]) -> None:
    """Whatever its value, with the flag to use in its place, or the reason."""
    with pytest.raises(SettingsError) as caught:
        arguments.added_arguments({name: "1"}, FIELDS)
    for part in parts:
        assert part in caught.value.message


def test_what_a_user_adds_wins_over_the_services_defaults() -> None:
    """A default for the device is one; what a flag sets can't be added at all."""
    assert built(is_cpu=True)["block_size"] == arguments.CPU_BLOCK_TOKENS
    assert built(is_cpu=True, vllm_arg={"block_size": "16"})["block_size"] == 16


def test_a_wrong_argument_is_refused_with_the_rest() -> None:
    """The one function checks them too."""
    with pytest.raises(SettingsError, match="blok_size"):
        built(vllm_arg={"blok_size": "16"})


def test_a_gpu_takes_vllms_own_sizes_and_no_graphs() -> None:
    """Sizes of a step are unset unless asked for; nothing of what a CPU needs is there."""
    found = built()
    assert found["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert (found["max_num_batched_tokens"], found["max_num_seqs"], found["kv_cache_memory_bytes"]) == (
        None,
        None,
        None,
    )
    assert found["enforce_eager"] is False
    assert {"block_size", "distributed_executor_backend", "worker_cls"}.isdisjoint(found)
    asked = built(max_num_batched_tokens=512, max_num_seqs=8, kv_cache_bytes=1 << 20)
    assert (asked["max_num_batched_tokens"], asked["max_num_seqs"], asked["kv_cache_memory_bytes"]) == (512, 8, 1 << 20)


@pytest.mark.parametrize(
    "options", [{"enforce_eager": True}, {"vllm_arg": {"cudagraph_capture_sizes": "[1]"}}], ids=["eager", "sizes"]
)
def test_graphs_are_left_to_whoever_sets_something_about_them(options: dict[str, Any]) -> None:
    """Their sizes would do nothing beside `NONE`, and eager mode has none anyway."""
    assert "compilation_config" not in built(**options)


def test_a_users_compilation_config_is_taken_as_it_is() -> None:
    """The service adds nothing to it."""
    found = built(vllm_arg={"compilation_config": '{"depth": 1}'})
    assert found["compilation_config"] == Nested(depth=1)


@pytest.mark.parametrize(("asked", "eager"), [(None, True), (False, False), (True, True)])
def test_a_cpu_runs_eagerly_in_the_engines_process(asked: bool | None, eager: bool) -> None:
    """With a small cache, small blocks and the service's worker; compiling is a matter of asking."""
    found = built(is_cpu=True, enforce_eager=asked)
    assert found["enforce_eager"] is eager
    assert found["kv_cache_memory_bytes"] == 1 << 30
    assert found["distributed_executor_backend"] == arguments.IN_PROCESS_EXECUTOR
    assert found["worker_cls"] == arguments.CPU_WORKER
    assert "compilation_config" not in found


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_several_workers_on_a_cpu_have_processes_of_their_own(options: dict[str, Any]) -> None:
    """vLLM chooses the executor."""
    assert built(is_cpu=True, **options)["distributed_executor_backend"] is None


@pytest.mark.parametrize(("rank", "allowed"), [(4, 8), (16, 16), (24, 32), (512, 512)])
def test_an_adapters_rank_is_rounded_up_to_what_vllm_takes(rank: int, allowed: int, tmp_path: Path) -> None:
    """And the adapter is switched on."""
    found = built(adapter=Adapter(tmp_path, rank))
    assert (found["enable_lora"], found["max_lora_rank"]) == (True, allowed)


def test_an_adapter_above_vllms_largest_rank_is_refused(tmp_path: Path) -> None:
    """With the limit."""
    with pytest.raises(EngineStartError, match=r"rank 513.*at most 512"):
        built(adapter=Adapter(tmp_path, 513))


def test_trust_is_passed_on() -> None:
    """And is off unless it was asked for."""
    assert built()["trust_remote_code"] is False
    assert built(trust_remote_code=True)["trust_remote_code"] is True


def test_vllm_itself_has_every_argument_that_the_service_sets_or_refuses() -> None:
    """By the fields of the installed version: they take seconds to import, and a stand-in would prove nothing."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = dataclasses.fields(AsyncEngineArgs)
    names = {field.name for field in fields}
    assert built().keys() | built(is_cpu=True).keys() <= names
    assert arguments._FLAGS.keys() | arguments._REASONS.keys() <= names
    given = {
        "compilation_config": '{"cudagraph_mode": "NONE"}',
        "attention_backend": "FLASH_ATTN",
        "lora_dtype": "float32",
        "kv_cache_dtype": "fp8",
    }
    taken = AsyncEngineArgs(**arguments.added_arguments(given, fields))
    ours = AsyncEngineArgs(compilation_config=dict(arguments.NO_CUDA_GRAPHS))
    assert taken.compilation_config.cudagraph_mode == ours.compilation_config.cudagraph_mode
    assert ours.compilation_config.cudagraph_mode.name == "NONE"
    assert taken.attention_backend == "FLASH_ATTN"
    with pytest.raises(SettingsError, match="nonsense"):
        arguments.added_arguments({"compilation_config": '{"nonsense": 1}'}, fields)


def test_each_flag_named_in_a_refusal_is_a_flag() -> None:
    """A remedy that does not exist is none."""
    from teacher_service.config import ServiceSettings, flag_of

    assert set(arguments._FLAGS.values()) <= {flag_of(name) for name in ServiceSettings.model_fields}
