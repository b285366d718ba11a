"""Which versions of vLLM the fast route knows, and whether the one at hand is still what it was written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

SUPPORTED_VERSIONS = ("0.28",)
"""Releases against which the route is tested."""


class ProbeError(RuntimeError):
    """The fast route does not fit this vLLM."""


def check_frontend(version: str) -> None:
    """Check what the service's process relies on.

    Raises:
        ProbeError: another version, or another signature.
    """
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise ProbeError(f"vLLM {version} is not among the tested versions {', '.join(SUPPORTED_VERSIONS)}")
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine.logprobs import LogprobsProcessor

    _check_signature(LogprobsProcessor.from_new_request, ("tokenizer", "request"))
    _check_signature(LogprobsProcessor._update_prompt_logprobs, ("self", "prompt_logprobs_tensors"))
    _check_signature(KVCacheManager.get_computed_blocks, ("self", "request"))


def check_runner(runner: Any) -> None:
    """Check what the worker relies on.

    Raises:
        ProbeError: another runner than V1's, or another signature.
    """
    for name in ("num_prompt_logprobs", "requests", "query_start_loc", "input_batch", "model", "model_config"):
        if not hasattr(runner, name):
            raise ProbeError(f"vLLM's {type(runner).__name__} has no {name}; is it the V2 runner?")
    _check_signature(runner._get_prompt_logprobs_dict, ("hidden_states", "num_scheduled_tokens"))


def _check_signature(function: Callable[..., Any], expected: Sequence[str]) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(expected):
        raise ProbeError(f"vLLM's {function.__qualname__} takes {found}, not {tuple(expected)}")
