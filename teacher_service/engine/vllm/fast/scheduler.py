"""vLLM's scheduler with prefix hits capped at the first scored row.

A prefix hit spares rows their forward pass, and a row without one has no logits to score. What lies before the first
scored row may be taken from the cache, be it a sibling's or, after a preemption, the request's own.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from teacher_service.engine.vllm.fast.parameters import Parameters


class PrefixCappedScheduler(Scheduler):  # type: ignore[misc] # vllm carries no types
    """Named as `scheduler_cls` where vLLM schedules a step after the one before is computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cap_prefix_hits(self.kv_cache_manager)


class PrefixCappedAsyncScheduler(AsyncScheduler):  # type: ignore[misc] # vllm carries no types
    """Named as `scheduler_cls` where vLLM schedules a step while the one before is computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cap_prefix_hits(self.kv_cache_manager)


def cap_prefix_hits(manager: Any) -> None:
    """Let vLLM's `KVCacheManager` find no cached block of ours that holds a scored row."""
    look_up = manager.get_computed_blocks

    def get_computed_blocks(request: Any, *limit: int | None) -> Any:
        sampling = request.sampling_params
        parameters = Parameters.unpack(sampling.extra_args) if sampling is not None else None
        if parameters is None:
            return look_up(request, *limit)
        if not limit:  # before 0.33, whose look-up has no limit
            return look_up(_Shorter(request, parameters.score_start))
        longest = request.num_tokens - 1 if limit[0] is None else limit[0]
        return look_up(request, min(longest, parameters.score_start - 1))

    manager.get_computed_blocks = get_computed_blocks


class _Shorter:
    """A request as vLLM's look-up sees it: a hit may cover all of its tokens but the last."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = min(num_tokens, request.num_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
