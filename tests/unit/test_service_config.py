"""Settings of the service: one definition, three ways to give them, one clear line when wrong."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from teacher_service.__main__ import build_app
from teacher_service.config import ServiceSettings, flag_of, load_settings, variable_of
from teacher_service.errors import SettingsError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServiceSettings.model_fields:
        monkeypatch.delenv(variable_of(name), raising=False)


def help_text() -> str:
    result = CliRunner().invoke(build_app(), ["serve", "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0
    return result.output


def test_every_setting_is_a_flag_a_variable_and_a_line_of_help() -> None:
    """--help names flag, variable and default of each setting."""
    text = " ".join(help_text().split())
    for name, field in ServiceSettings.model_fields.items():
        default = "unset" if field.default is None else field.default
        assert f"{flag_of(name)} " in text
        assert f"{field.description} [env: {variable_of(name)}; default: {default}]" in text
    assert set(re.findall(r"--[a-z0-9-]+", text)) == {flag_of(name) for name in ServiceSettings.model_fields} | {
        "--help",
        "--no-enforce-eager",
        "--no-fast-route",
        "--no-http-docs",
        "--no-insecure",
        "--no-metrics-without-token",
        "--no-reflection",
        "--no-trust-remote-code",
        "--model",
    }


def test_the_ports_and_address_default_to_the_documented_ones() -> None:
    """Loopback only, unless told otherwise."""
    settings = load_settings({"engine": "fake"})
    assert (settings.host, settings.grpc_port, settings.http_port) == ("127.0.0.1", 15555, 15556)


def test_a_flag_beats_a_variable_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """And variables are read as text."""
    monkeypatch.setenv("TEACHER_GRPC_PORT", "1001")
    monkeypatch.setenv("TEACHER_HTTP_PORT", "1002")
    monkeypatch.setenv("TEACHER_REFLECTION", "false")
    settings = load_settings({"engine": "fake", "grpc_port": 2001})
    assert (settings.grpc_port, settings.http_port, settings.reflection) == (2001, 1002, False)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("TEACHER_MAX_MODEL_LENGTH", "TEACHER_MAX_MODEL_LEN"),
        ("TEACHER_GRPC_PROT", "TEACHER_GRPC_PORT"),
        ("TEACHER_", ""),
    ],
)
def test_an_unknown_variable_fails_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, nearest: str
) -> None:
    """A misspelled variable would otherwise do nothing, silently."""
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SettingsError, match=f"{variable} is no setting; the nearest is {nearest}"):
        load_settings({"engine": "fake"})


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"grpc_port": 70000}, ("--grpc-port (or TEACHER_GRPC_PORT) is 70000", "65535")),
        ({"max_request_bytes": 1}, ("--max-request-bytes", "is 1:", "64")),
        ({"drain_timeout_s": float("nan")}, ("--drain-timeout-s", "nan")),
        ({"max_timeout_s": 0}, ("--max-timeout-s", "greater than 0")),
        ({"engine": "fast"}, ("--engine", "'fast'", "'vllm'")),
        ({"max_inflight_tokens": 10**7}, ("max_queued_tokens is 4194304", "10000000", "raise")),
        ({"engine": "vllm"}, ("engine vllm needs a model", "--model PATH")),
        ({"max_model_length": 3}, ("max_model_length is no setting",)),
        ({"max_client_inflight_requests": 0}, ("--max-client-inflight-requests", "is 0:")),
        ({"tls_cert": "c"}, ("--tls-cert is given without --tls-key",)),
        ({"vllm_arg": ["block_size"]}, ("--vllm-arg (or TEACHER_VLLM_ARG)", "'block_size' is no KEY=VALUE")),
        ({"vllm_arg": ["=16"]}, ("'=16' is no KEY=VALUE",)),
        ({"vllm_arg": ["block-size=16", "block_size=32"]}, ("block_size is given twice",)),
    ],
)
def test_a_value_out_of_range_names_flag_value_and_rule(flags: dict[str, object], parts: tuple[str, ...]) -> None:
    """One line, without a traceback's worth of types."""
    with pytest.raises(SettingsError) as caught:
        load_settings({"engine": "fake"} | flags)
    assert "\n" not in caught.value.message
    for part in parts:
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["serve", "--grpc-prot", "1"], ("--grpc-prot", "--grpc-port")),
        (["serve", "--grpc-port", "many"], ("--grpc-port", "many")),
        (["serve", "--engine", "vllm"], ("error: engine vllm needs a model; pass --model PATH",)),
        (["sevre"], ("sevre",)),
    ],
)
def test_a_wrong_command_line_exits_with_the_code_of_wrong_usage(arguments: list[str], parts: tuple[str, ...]) -> None:
    """Code 2, and what was wrong, before anything is loaded."""
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 2
    for part in parts:
        assert part in result.output


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServiceSettings]:
    """Takes the settings of each `serve` in the place of a service."""
    taken: list[ServiceSettings] = []
    monkeypatch.setattr("teacher_service.__main__.run_service", lambda settings, _: taken.append(settings))
    return taken


def test_vllms_own_arguments_come_by_a_flag_for_each(served: list[ServiceSettings]) -> None:
    """With hyphens or underscores; a value keeps its equals signs."""
    flags = ["--vllm-arg", "block-size=16", "--vllm-arg", 'hf_overrides={"a": "b=c"}']
    result = CliRunner().invoke(build_app(), ["serve", "--model", "m", *flags])
    assert result.exit_code == 0, result.output
    [settings] = served
    assert settings.vllm_arg == {"block_size": "16", "hf_overrides": '{"a": "b=c"}'}


VARIABLE = '{"block-size": 16, "load_format": "safetensors", "hf_overrides": {"a": [1]}, "async_scheduling": false}'


def test_vllms_own_arguments_come_by_one_variable(
    served: list[ServiceSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JSON object; it holds unless the flag is given, which then stands alone."""
    monkeypatch.setenv("TEACHER_VLLM_ARG", VARIABLE)
    CliRunner().invoke(build_app(), ["serve", "--model", "m"])
    CliRunner().invoke(build_app(), ["serve", "--model", "m", "--vllm-arg", "block_size=8"])
    assert [settings.vllm_arg for settings in served] == [
        {"block_size": "16", "load_format": "safetensors", "hf_overrides": '{"a": [1]}', "async_scheduling": "false"},
        {"block_size": "8"},
    ]


@pytest.mark.parametrize(
    ("variable", "part"),
    [
        ("block_size=16", "give a JSON object"),
        ("[1]", "give a JSON object"),
        ('{"a": 1, "a": 2}', "a is given twice"),
        ('{"a-b": 1, "a_b": 2}', "a_b is given twice"),
    ],
)
def test_a_variable_that_is_no_object_of_distinct_arguments_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, part: str
) -> None:
    """JSON's own reader would take the last of two equal keys in silence."""
    monkeypatch.setenv("TEACHER_VLLM_ARG", variable)
    with pytest.raises(SettingsError, match=part):
        load_settings({"model": "m"})


@pytest.mark.parametrize(
    ("engine", "flags", "parts"),
    [
        ("fake", {"vllm_arg": ["a=1"]}, ("--vllm-arg (or TEACHER_VLLM_ARG)", "--engine fake does not use it")),
        ("transformers", {"lora": "adapter"}, ("--lora", "'adapter'", "--engine transformers", "only vllm")),
        ("transformers", {"quantization": "fp8"}, ("--quantization",)),
        ("transformers", {"enforce_eager": False}, ("--enforce-eager",)),
        ("transformers", {"fast_route": False}, ("--fast-route",)),
        ("transformers", {"tensor_parallel_size": 2}, ("--tensor-parallel-size",)),
        ("fake", {"dtype": "float32"}, ("--dtype", "only vllm and transformers")),
        ("fake", {"trust_remote_code": True}, ("--trust-remote-code",)),
        ("vllm", {"device": "cpu"}, ("--device", "only transformers")),
        ("vllm", {"fake_latency_s": 1}, ("--fake-latency-s", "only fake")),
    ],
)
def test_a_setting_that_the_engine_would_ignore_is_refused(
    engine: str, flags: dict[str, object], parts: tuple[str, ...]
) -> None:
    """With the engines that use it."""
    with pytest.raises(SettingsError) as caught:
        load_settings({"engine": engine, "model": "m"} | flags)
    for part in parts:
        assert part in caught.value.message


def test_a_variable_that_the_engine_would_ignore_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as much a choice of the user's as a flag."""
    monkeypatch.setenv("TEACHER_KV_CACHE_BYTES", "1000")
    with pytest.raises(SettingsError, match="--kv-cache-bytes"):
        load_settings({"engine": "transformers", "model": "m"})


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_a_default_that_somebody_writes_down_is_no_choice(engine: str) -> None:
    """One replica is what there is."""
    settings = load_settings({"engine": engine, "model": "m", "tensor_parallel_size": 1, "fast_route": True})
    assert settings.engine == engine
