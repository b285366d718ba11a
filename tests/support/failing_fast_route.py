"""Classes of the fast route that fail inside vLLM's process, one way each. Named as vLLM's options."""

from __future__ import annotations

from typing import Any

from teacher_service.engine.vllm.fast.scheduler import PrefixCappedScheduler
from teacher_service.engine.vllm.fast.worker import ScoringExtension


class RaisingExtension(ScoringExtension):
    """Raises when the route is installed; vLLM lives on."""

    def install_scoring(self) -> list[str]:
        """See `ScoringExtension.install_scoring`."""
        raise AttributeError("the runner has no attribute of that name")


class RaisingScheduler(PrefixCappedScheduler):
    """Raises in its first step, which kills vLLM's engine."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's `Scheduler.schedule`."""
        raise TypeError("get_computed_blocks() takes 1 positional argument but 2 were given")


class UnconstructibleScheduler(PrefixCappedScheduler):
    """Raises before vLLM's engine is ready."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        raise TypeError("the scheduler has another constructor")
