"""Loaded by verl in every process through VERL_USE_EXTERNAL_MODULES: importing it is the registration."""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

from trainer.verl_adapter.cpu import platform as _platform  # noqa: F401  # its decorator registers the platform
from trainer.verl_adapter.cpu.amx import request_amx
from trainer.verl_adapter.cpu.patches import apply_patches
from trainer.verl_adapter.cpu.vllm_metadata import install_vllm_alias


def _load_replica() -> type[Any]:
    from trainer.verl_adapter.cpu.rollout import CPUReplica  # imports vLLM: only where a replica is wanted

    return CPUReplica


install_vllm_alias()
apply_patches()
request_amx()
RolloutReplicaRegistry.register("vllm", _load_replica)
_ROLLOUT_REGISTRY["vllm", "async"] = "trainer.verl_adapter.cpu.rollout.CPUServerAdapter"
