"""What to measure, checked when it is given and again once the teacher has said what it is."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.codec import WireDtype
from protos.manifest import Capability, Manifest
from teacher_service.errors import SettingsError
from teacher_service.transports.caller import check_endpoint
from teacher_service.transports.caller_credentials import CallerCredentials

STDOUT = Path("-")

_LOWEST = {
    "sequences": 1,
    "prompt_tokens": 1,
    "response_tokens": 1,
    "num_logprobs": 0,
    "siblings": 1,
    "warm_up": 0,
    "seed": 0,
}
_WIRE_CAPABILITIES = {WireDtype.FLOAT16: Capability.WIRE_FLOAT16, WireDtype.BFLOAT16: Capability.WIRE_BFLOAT16}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """What to measure. Each field is a flag of `bench`."""

    endpoint: str
    """`host:port` of gRPC."""
    sequences: int
    """Sequences to score at each concurrency."""
    prompt_tokens: int
    """Tokens before the first scored one."""
    response_tokens: int
    """S, scored positions of a sequence."""
    num_logprobs: int
    """K."""
    concurrency: tuple[int, ...]
    """Sequences in flight at a time, one level after another."""
    siblings: int
    """Responses per prompt."""
    wire_dtype: WireDtype
    """Element type of the top-k logprobs on the wire."""
    temperature: float
    """Divides the logits."""
    timeout_s: float
    """Seconds that a call may take, and for which a sequence refused as OVERLOADED is tried again."""
    warm_up: int
    """Sequences to score before the first level, unmeasured."""
    seed: int
    """Of the token ids."""
    json: Path | None
    """Where the results go as JSON; `-` is stdout. None: nowhere."""
    credentials: CallerCredentials = CallerCredentials()  # noqa: RUF009 - it is frozen
    """What is shown to the teacher."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)
        for name, lowest in _LOWEST.items():
            if getattr(self, name) < lowest:
                raise _refused(name, getattr(self, name), f"at least {lowest}")
        for level in self.concurrency:
            if level < 1:
                raise _refused("concurrency", level, "at least 1")
        for name in ("temperature", "timeout_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise _refused(name, getattr(self, name), "finite and > 0")
        # now, not after an hour of measuring
        if self.json is not None and self.json != STDOUT and not _is_writable(self.json):
            raise _refused("json", self.json, "a file in a folder that exists and can be written to")


def new_seed() -> int:
    """A seed that no earlier run had: a prefix cache may answer for the engine on token ids it has seen."""
    return secrets.randbelow(2**31)


def fit(settings: BenchSettings, manifest: Manifest) -> BenchSettings:
    """The settings with sequences no longer than the teacher takes, prompt and response shortened alike.

    Raises:
        SettingsError: the teacher can't do what is asked for.
    """
    if settings.num_logprobs > manifest.max_num_logprobs:
        raise _refused(
            "num_logprobs",
            settings.num_logprobs,
            f"at most {manifest.max_num_logprobs} for this teacher; ask for fewer, or serve with a larger "
            f"--max-num-logprobs (its vocabulary has {manifest.vocab_rows} rows)",
        )
    if settings.temperature != 1.0 and Capability.TEMPERATURE not in manifest.capabilities:
        raise _refused("temperature", settings.temperature, f"1: the engine {manifest.engine} knows no other")
    wire_capability = _WIRE_CAPABILITIES.get(settings.wire_dtype)
    if wire_capability is not None and wire_capability not in manifest.capabilities:
        raise _refused("wire_dtype", settings.wire_dtype, f"{WireDtype.FLOAT32}: this teacher sends no other")
    num_tokens, limit = settings.prompt_tokens + settings.response_tokens, manifest.max_request_tokens
    if num_tokens <= limit:
        return settings
    prompt_tokens = min(max(settings.prompt_tokens * limit // num_tokens, 1), limit - 1)
    return dataclasses.replace(settings, prompt_tokens=prompt_tokens, response_tokens=limit - prompt_tokens)


def parse_wire_dtype(name: str) -> WireDtype:
    """The element type of that name.

    Raises:
        SettingsError: there is none.
    """
    try:
        return WireDtype(name)
    except ValueError as exc:
        raise _refused("wire_dtype", repr(name), f"one of {', '.join(WireDtype)}") from exc


def _refused(name: str, value: Any, rule: str) -> SettingsError:
    flag = "--" + name.replace("_", "-")
    return SettingsError(
        f"{flag} is {value}; it must be {rule}", metadata={"field": flag, "value": f"{value}", "limit": rule}
    )


def _is_writable(path: Path) -> bool:
    if path.exists():
        return path.is_file() and os.access(path, os.W_OK)
    return path.parent.is_dir() and os.access(path.parent, os.W_OK)
