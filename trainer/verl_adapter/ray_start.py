"""A Ray of the run's own, on a single machine: the folder that it lies in, and its start on a machine that is busy."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import psutil
import ray
import tenacity
from omegaconf import DictConfig, OmegaConf

from trainer.verl_adapter.cpu.environment import private_folder

_log = logging.getLogger(__name__)
MAX_STARTS = 3
NODE_TIMED_OUT = "The current node timed out during startup"
"""How Ray says, after 30 s that cannot be changed, that its own processes were not up in time."""


@contextmanager
def own_ray_folder(config: DictConfig, user_keys: Set[str]) -> Iterator[None]:
    """On a single machine, run Ray apart from any other Ray on it, in a folder that is removed afterwards."""
    if config.trainer.device != "cpu" or "ray_kwargs.ray_init.address" in user_keys:
        yield
        return
    folder = private_folder("gkd-ray-")
    settings: dict[str, Any] = {"address": "local", "_temp_dir": folder}
    outer_folder = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder  # vLLM leaves its sockets behind, Ray a file: there they go with the folder
    try:
        OmegaConf.update(config, "ray_kwargs.ray_init", settings, merge=True, force_add=True)
        yield
    finally:
        if outer_folder is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = outer_folder
        shutil.rmtree(folder, ignore_errors=True)


def start_ray_again(run: Callable[[], None]) -> None:
    """Call what starts Ray and trains, once more if the machine was too busy for Ray to start in time.

    Raises:
        Exception: what `run` raised, of itself or at its last start of Ray.
    """
    others = set(psutil.Process().children())

    def clear(state: tenacity.RetryCallState) -> None:
        _log.warning("Ray did not start in time: this machine is busy; start %d of %d follows", *_next(state))
        for process in set(psutil.Process().children()) - others:  # Ray's, which know no one to end them
            process.kill()
            process.wait()

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(MAX_STARTS),
        retry=tenacity.retry_if_exception(_is_late_start),
        before_sleep=clear,
        reraise=True,
    )
    retrying(run)


def _next(state: tenacity.RetryCallState) -> tuple[int, int]:
    return state.attempt_number + 1, MAX_STARTS


def _is_late_start(exc: BaseException) -> bool:
    return NODE_TIMED_OUT in str(exc) and not ray.is_initialized()
