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


def choose_for_async(config: DictConfig, user_keys: Set[str]) -> None:
    """What verl's asynchronous modes want, where the user is silent.

    Responses that an older student sampled are weighed by how far it has moved since (truncated importance weights of
    the tokens); verl itself does so only when asked. And verl's separate_async updates once per mini-batch, and insists
    on being told how many of them there are.

    Args:
        config: the composed configuration; changed in place.
        user_keys: dotted keys that the command line names.
    """
    mode = config.trainer.v1.trainer_mode
    if mode == "sync":
        return
    key = "algorithm.rollout_correction.rollout_is"
    if key not in user_keys:
        OmegaConf.update(config, key, "token")
    key = "trainer.v1.separate_async.parameter_sync_step"
    if mode == "separate_async" and key not in user_keys:
        batch, mini_batch = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
        OmegaConf.update(config, key, max(1, batch // mini_batch))
