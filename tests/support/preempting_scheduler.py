"""The fast route's scheduler where sequences grow side by side and crowd each other out of the cache.

vLLM preempts only what runs: it lets one long prompt in at a time, unless it is told to take little of each per step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from teacher_service.engine.vllm.fast.scheduler import PrefixCappedScheduler

COUNT_FILE = "TEST_PREEMPTIONS"
"""Environment variable: where each preemption leaves a byte, since the scheduler runs in vLLM's process."""
TOKENS_PER_STEP = 16


class PreemptingScheduler(PrefixCappedScheduler):
    """Named as `scheduler_cls`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scheduler_config.long_prefill_token_threshold = TOKENS_PER_STEP

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(*args, **kwargs)
        with Path(os.environ[COUNT_FILE]).open("ab") as file:
            file.write(b".")
