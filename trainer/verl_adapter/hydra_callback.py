"""What `python -m verl.trainer.main_ppo` does between composing its configuration and training: Hydra's callback."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.errors import GKDError
from trainer.verl_adapter.cpu.environment import set_environment
from trainer.verl_adapter.cpu.warm_workers import warm_workers
from trainer.verl_adapter.prepare import keys_of, prepare

VERL_MAIN = "verl.trainer.main_ppo"
REGISTRATION = "trainer.verl_adapter.registration"
"""Loaded by verl in every worker: puts our trainers where its task runner looks."""
_MODULES = "VERL_USE_EXTERNAL_MODULES"


class GKDCallback(Callback):  # type: ignore[misc]  # Hydra carries no types
    """Checks the run and hands verl a configuration it knows, as `python -m trainer.main_ppo` does.

    Named in ppo_trainer.yaml; does nothing in any other program than verl's.
    """

    def on_run_start(self, config: DictConfig, **_rest: Any) -> None:
        """Called by Hydra with the composed configuration, before verl sees it."""
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is None or spec.name != VERL_MAIN:
            return
        if config.trainer.device == "cpu" and "VERL_PLATFORM" not in os.environ:
            set_environment()  # verl has read it when it was imported: the same command once more
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606  # this very program
        from trainer.verl_adapter.launch import hand_over
        from trainer.verl_adapter.ray_start import own_ray_folder, start_ray_again

        user_keys = keys_of(config.hydra.overrides.task)
        running = contextlib.ExitStack()
        atexit.register(running.close)
        try:
            with open_dict(config):
                running.enter_context(warm_workers(config, user_keys))
                hand_over(config, prepare(config, user_keys))
                key = f"ray_kwargs.ray_init.runtime_env.env_vars.{_MODULES}"
                others = OmegaConf.select(config, key) or os.environ.get(_MODULES)
                OmegaConf.update(config, key, f"{others},{REGISTRATION}" if others else REGISTRATION, force_add=True)
        except GKDError as exc:
            sys.exit(f"error: {exc}")
        running.enter_context(own_ray_folder(config, user_keys))
        verls = sys.modules["__main__"]
        run_ppo = verls.run_ppo  # verl starts Ray in it, and looks it up here (test_upstream)
        verls.run_ppo = lambda *given, **named: start_ray_again(  # type: ignore[attr-defined]
            functools.partial(run_ppo, *given, **named)
        )
