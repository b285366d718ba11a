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
    monkeypatch.setenv("TEACHER_ENFORCE_EAGER", "false")
    settings = load_settings({"engine": "fake", "grpc_port": 2001})
    assert (settings.grpc_port, settings.http_port, settings.enforce_eager) == (2001, 1002, False)


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
