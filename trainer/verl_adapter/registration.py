"""Loaded by verl through VERL_USE_EXTERNAL_MODULES: importing it is the registration."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

_plain = dict(TRAINER_REGISTRY)


def _trainer(mode: str) -> Any:
    def make(config: DictConfig) -> Any:
        from trainer.verl_adapter.trainers import TRAINERS

        return (TRAINERS if "gkd" in config else _plain)[mode](config=config)

    return make


TRAINER_REGISTRY["sync"] = _trainer("sync")
