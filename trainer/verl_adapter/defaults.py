"""Configuration defaults that depend on what the user chose. Imports no verl: it runs before verl is loaded."""

from __future__ import annotations

from collections.abc import Set

from omegaconf import DictConfig, OmegaConf


def choose_micro_batches(config: DictConfig, user_keys: Set[str]) -> None:
    """Pack by tokens, or use the actor's micro-batch size everywhere: verl refuses to choose one itself.

    Args:
        config: the composed configuration; changed in place.
        user_keys: dotted keys that the command line names.
    """
    size_key = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    if size_key not in user_keys:
        if "actor_rollout_ref.actor.use_dynamic_bsz" not in user_keys:
            OmegaConf.update(config, "actor_rollout_ref.actor.use_dynamic_bsz", True)
        return
    for section in ("rollout", "ref"):
        key = f"actor_rollout_ref.{section}.log_prob_micro_batch_size_per_gpu"
        if key not in user_keys:
            OmegaConf.update(config, key, OmegaConf.select(config, size_key))
