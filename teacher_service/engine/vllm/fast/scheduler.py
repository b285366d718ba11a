"""vLLM's scheduler with prefix hits capped at the first scored row.

A prefix hit spares rows their forward pass, and a row without one has no logits to score. What lies before the first
scored row may be taken from the cache, be it a sibling's or, after a preemption, the request's own.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from teacher_service.engine.vllm.fast.parameters import Parameters


class PrefixCappedScheduler(AsyncScheduler):  # type: ignore[misc] # vllm carries no types
    """Named as `scheduler_cls`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager = self.kv_cache_manager
        look_up = manager.get_computed_blocks

        def get_computed_blocks(request: Any) -> Any:
            sampling = request.sampling_params
            parameters = Parameters.unpack(sampling.extra_args) if sampling is not None else None
            return look_up(request if parameters is None else _Shorter(request, parameters.score_start))

        manager.get_computed_blocks = get_computed_blocks


class _Shorter:
    """A request as vLLM's look-up sees it: a hit may cover all of its tokens but the last."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = min(num_tokens, request.num_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
