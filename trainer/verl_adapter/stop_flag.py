"""SIGTERM in the driver, seen by the trainer in its own process: a flag that both reach through Ray."""

from __future__ import annotations

import functools
import logging
import signal
import sys
import threading
from types import FrameType
from typing import Any

import ray
from omegaconf import DictConfig

_log = logging.getLogger(__name__)
FLAG_KEY = "gkd_stop_flag"
"""The flag's name, in the configuration that verl hands to its trainer."""
FLAG_TIMEOUT_S = 10.0
TERMINATED = 128 + signal.SIGTERM
"""Exit code after a second SIGTERM, as a shell has it."""


class _Flag:
    """Lowered until it is raised."""

    def __init__(self) -> None:
        self._is_raised = False

    def set(self) -> None:
        self._is_raised = True

    def is_set(self) -> bool:
        return self._is_raised


class StopOnSigterm:
    """While entered, the first SIGTERM asks the trainer to end in order, and the second one ends this process.

    Enter it in the main thread, once Ray is there: Ray takes the signal for itself.
    """

    def __init__(self, name: str) -> None:
        """Raise a flag of this name, which must be unique in the cluster."""
        self._name = name
        self._asked = threading.Event()
        self._before: Any = None

    def __enter__(self) -> StopOnSigterm:
        self._flag = ray.remote(_Flag).options(name=self._name, num_cpus=0).remote()
        threading.Thread(target=self._forward, name="stop-flag", daemon=True).start()
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_exc: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        self._asked.set()  # lets the thread end

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._asked.is_set():
            sys.exit(TERMINATED)
        self._asked.set()
        print(  # noqa: T201  # for the user
            "SIGTERM: the trainer ends after its step, with a checkpoint; a second one ends it at once",
            file=sys.stderr,
            flush=True,
        )

    def _forward(self) -> None:
        # not in the handler: it may have interrupted Ray in the middle of a call
        self._asked.wait()
        try:
            ray.get(self._flag.set.remote(), timeout=FLAG_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as exc:
            _log.debug("the stop flag was not raised: %s", exc)  # the run is over


def is_stop_requested(config: DictConfig) -> bool:
    """Whether the driver of this run was asked to end it. Called in the trainer's process."""
    name = config.get(FLAG_KEY)
    if name is None:
        return False  # started by verl's own entry point, which handles no signals
    return bool(ray.get(_flag(name).is_set.remote(), timeout=FLAG_TIMEOUT_S))


@functools.cache
def _flag(name: str) -> Any:
    return ray.get_actor(name)
