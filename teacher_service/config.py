"""Settings of the service: each one a flag, an environment variable `TEACHER_<NAME>` and a line of `--help`.

No heavy import: `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from protos.hosts import is_loopback
from teacher_service.errors import SettingsError

ENV_PREFIX = "TEACHER_"

EngineName = Literal["vllm", "transformers", "fake"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]


def _read_vllm_arguments(given: Any) -> Any:
    """Texts by key, of the flags' `KEY=VALUE` or of the variable's JSON object; a key may be written with hyphens."""
    if isinstance(given, str):
        given = _read_json_object(given)
    if isinstance(given, Mapping):
        pairs = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in given.items()]
    else:
        pairs = [_split(one) for one in given]
    return _without_repeats([(key.replace("-", "_"), value) for key, value in pairs])


def _read_json_object(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError:
        found = None
    if isinstance(found, dict):
        return found
    raise ValueError('give a JSON object, such as {"block_size": 64}')


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text!r} is no KEY=VALUE; write, for example, block_size=64 or enable_expert_parallel=true")
    return key, value


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice; keep one of them")
    return found


VllmArguments = Annotated[Mapping[str, str], NoDecode, BeforeValidator(_read_vllm_arguments)]

_CONCERNS: Mapping[str, tuple[EngineName, ...]] = {
    **dict.fromkeys(
        (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
            "quantization",
            "lora",
            "fast_route",
            "gpu_memory_utilization",
            "kv_cache_bytes",
            "max_num_batched_tokens",
            "max_num_seqs",
            "enforce_eager",
            "vllm_arg",
        ),
        ("vllm",),
    ),
    "dtype": ("vllm", "transformers"),
    "trust_remote_code": ("vllm", "transformers"),
    "device": ("transformers",),
    "fake_latency_s": ("fake",),
}
"""Setting -> the engines that use it; what is not here concerns all of them."""


class ServiceSettings(BaseSettings):
    """How one teacher is served. Flags win over environment variables, those over the defaults."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    model: str | None = Field(None, min_length=1, description="Directory of a Hugging Face checkpoint, or a hub id.")
    engine: EngineName = Field("vllm", description="What scores: vllm, transformers (reference) or fake (analytic).")
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for every interface.")
    grpc_port: int = Field(15555, ge=0, le=65535, description="Port of gRPC; 0 takes a free one.")
    http_port: int = Field(15556, ge=0, le=65535, description="Port of HTTP; 0 takes a free one.")
    port_file: Path | None = Field(
        None, description="File that holds the two addresses as JSON while the service listens."
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of the certificate to serve gRPC and HTTP with; unset: plain text."
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key, not encrypted.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the CA that signs clients' certificates; set: every client must show one."
    )
    token_file: Path | None = Field(
        None, description="File of accepted bearer tokens, one a line; set: every call but a health check needs one."
    )
    insecure: bool = Field(
        False, description="Whether to listen beyond loopback with neither tokens nor client certificates."
    )
    metrics_without_token: bool = Field(False, description="Whether /metrics needs no token.")
    reflection: bool = Field(True, description="Whether gRPC describes itself to who asks.")
    http_docs: bool = Field(True, description="Whether HTTP has /docs and /openapi.json.")
    dtype: DtypeName = Field("auto", description="Arithmetic type of the weights; auto takes the checkpoint's own.")
    max_model_len: int | None = Field(None, ge=2, description="Longest sequence in tokens; unset: the model's own.")
    max_num_logprobs: int = Field(256, ge=0, description="Largest num_logprobs a request may ask for.")
    device: DeviceName = Field("auto", description="Where transformers computes: cpu, cuda or auto.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that vLLM spreads each layer over.")
    pipeline_parallel_size: int = Field(1, ge=1, description="Groups of GPUs that vLLM spreads the layers over.")
    data_parallel_size: int = Field(1, ge=1, description="Replicas of the model behind one vLLM engine.")
    quantization: str | None = Field(None, description="How vLLM reads quantised weights; unset: as the model says.")
    lora: str | None = Field(None, min_length=1, description="Directory of a LoRA adapter to answer with (vLLM).")
    fast_route: bool = Field(True, description="Whether vLLM may score by the fast route; else by its public one.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of the GPU's memory that vLLM may take.")
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="Size of vLLM's KV cache; unset: from the share above, or 1 GiB on a CPU."
    )
    max_num_batched_tokens: int | None = Field(None, ge=1, description="Tokens per step of vLLM; unset: its default.")
    max_num_seqs: int | None = Field(None, ge=1, description="Sequences per step of vLLM; unset: its default.")
    enforce_eager: bool | None = Field(None, description="Whether vLLM runs without compiling; unset: only on a CPU.")
    vllm_arg: VllmArguments = Field(
        {},
        description="An argument of vLLM's AsyncEngineArgs; the flag may be given many times. The value is JSON, or "
        'else text. The variable holds a JSON object, {"KEY": VALUE, ...}, and is not read where the flag is given.',
    )
    trust_remote_code: bool = Field(
        False, description="Whether Python code that lies in the checkpoint may run in this service."
    )
    fake_latency_s: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Seconds that the fake engine takes for a sequence."
    )
    max_request_bytes: int = Field(8 * 2**20, ge=64, description="Largest body of a request, in bytes.")
    max_response_bytes: int = Field(256 * 2**20, ge=64, description="Largest answer to a request, in bytes.")
    memory_budget_bytes: int | None = Field(
        None,
        ge=2**20,
        description="Main memory that the sequences in the engine may take; unset: half of what is free when it is "
        "loaded.",
    )
    answer_cache_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Answers kept for requests that repeat an idempotency key, in bytes, as far as the memory budget "
        "has them to spare; 0: none.",
    )
    answer_cache_seconds: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="Seconds that such an answer is kept; 0: none is."
    )
    max_queued_requests: int = Field(1024, ge=0, description="Sequences that may wait for the engine.")
    max_queued_tokens: int = Field(4 * 2**20, ge=2, description="Tokens that may wait for the engine.")
    max_inflight_requests: int = Field(256, ge=1, description="Sequences in the engine at a time.")
    max_client_inflight_requests: int | None = Field(
        None, ge=1, description="Sequences of one client (token, else host) in the engine at a time; unset: any number."
    )
    max_inflight_tokens: int = Field(
        2**18, ge=2, description="Tokens in the engine at a time; also bounds one sequence."
    )
    max_stream_inflight: int = Field(64, ge=1, description="Sequences in flight on one ScoreStream.")
    max_timeout_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="Seconds a request may take, whatever its caller allows."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="Seconds to finish work in flight after SIGTERM or SIGINT."
    )
    log_level: LogLevel = Field("info", description="Lowest level to log, on stderr: debug, info, warning or error.")
    log_format: LogFormat = Field("console", description="Form of the log: console or json.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.engine != "fake" and self.model is None:
            raise ValueError(f"engine {self.engine} needs a model; pass --model PATH")
        if self.max_queued_tokens < self.max_inflight_tokens:
            raise ValueError(
                f"max_queued_tokens is {self.max_queued_tokens}, below max_inflight_tokens "
                f"{self.max_inflight_tokens}: the longest sequence could never wait; raise the first"
            )
        self._check_engine()
        self._check_tls()
        if not (is_loopback(self.host) or self.token_file or self.tls_client_ca or self.insecure):
            raise ValueError(
                f"--host {self.host} lets others than this machine call, and nothing tells who may; pass --token-file "
                "(callers need a token), or --tls-cert, --tls-key and --tls-client-ca (they need a certificate), or "
                "--insecure (TEACHER_INSECURE=true) where the network itself keeps strangers out"
            )
        return self

    def _check_engine(self) -> None:
        for name, engines in _CONCERNS.items():
            value = getattr(self, name)
            if self.engine not in engines and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{flag_of(name)} (or {variable_of(name)}) is {value!r}, but --engine {self.engine} does not use "
                    f"it, only {' and '.join(engines)}; leave it out"
                )

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            raise ValueError(f"{given} is given without {missing}; pass both, or neither for plain text")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca is given without --tls-cert and --tls-key; pass them too")


def load_settings(flags: Mapping[str, Any]) -> ServiceSettings:
    """Merge flags, the process's environment and defaults.

    Args:
        flags: values by setting name; only those that were given.

    Raises:
        SettingsError: a variable is unknown, or a value is out of range; one line with value, limit and remedy.
    """
    _refuse_unknown_variables(os.environ)
    try:
        return ServiceSettings(**flags)
    except ValidationError as exc:
        raise SettingsError("; ".join(_describe(error) for error in exc.errors())) from exc


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = {name.upper(): variable_of(name) for name in ServiceSettings.model_fields}
    for variable in sorted(environ):
        name = variable.upper().removeprefix(ENV_PREFIX)
        if variable.upper().startswith(ENV_PREFIX) and name not in known:
            nearest = known[difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]]
            raise SettingsError(
                f"environment variable {variable} is no setting; the nearest is {nearest} "
                f"(`serve --help` lists all): rename or unset it",
                metadata={"field": variable, "nearest": nearest},
            )


def _describe(error: Mapping[str, Any]) -> str:
    """One refused value in a line: where it came from, the value, and the rule."""
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = str(error["loc"][0])
    if name not in ServiceSettings.model_fields:
        return f"{name} is no setting; `serve --help` lists all"
    rule = str(error["msg"]).removeprefix("Value error, ")
    return f"{flag_of(name)} (or {variable_of(name)}) is {error['input']!r}: {rule}"
