"""verl's task runner with our trainers in its registry, which also ends the rollout engines it started."""

from __future__ import annotations

import logging
from typing import Any

import ray
from omegaconf import DictConfig
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

_log = logging.getLogger(__name__)
_PlainTaskRunner: type[Any] = TaskRunnerV1.__ray_metadata__.modified_class
ENGINE_SHUTDOWN_TIMEOUT_S = 20.0


class _GKDTaskRunner(_PlainTaskRunner):  # type: ignore[misc]  # verl carries no types
    """verl's own run, which looks its trainer up by `trainer.v1.trainer_mode`."""

    def run(self, config: DictConfig) -> None:
        """Train, with distillation where the configuration has a `gkd` section."""
        from trainer.verl_adapter.trainers import trainers_for  # in the runner's process, not in the driver's

        TRAINER_REGISTRY.update(trainers_for(config))
        try:
            super().run(config)
        finally:
            _end_rollout_engines(self.trainer)


def _end_rollout_engines(trainer: Any) -> None:
    """Let vLLM free its shared memory: Ray would kill its processes, and hundreds of megabytes would stay behind."""
    managers = [getattr(trainer, name, None) for name in ("llm_server_manager", "standalone_server_manager")]
    servers = [
        server
        for manager in managers
        if manager is not None  # the run failed before it was there, or its mode has none
        for replica in manager.get_replicas()
        for server in replica.servers
    ]
    ends = [server.__ray_call__.remote(lambda self: self.engine.shutdown()) for server in servers]
    try:
        ray.get(ends, timeout=ENGINE_SHUTDOWN_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as exc:
        _log.warning("a rollout engine did not end in order: %s", exc)


GKDTaskRunner = ray.remote(_GKDTaskRunner)
