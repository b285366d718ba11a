"""Loaded by verl through VERL_USE_EXTERNAL_MODULES: importing it is the registration."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

MODES = ("sync", "colocate_async", "separate_async")


def _trainer(mode: str) -> Any:
    def make(config: DictConfig) -> Any:
        from trainer.verl_adapter.trainers import trainers_for

        return trainers_for(config)[mode](config=config)

    return make


TRAINER_REGISTRY.update({mode: _trainer(mode) for mode in MODES})
