"""Keys that contradict each other, or that a run would ignore without a word: refused before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.gkd import ANY_VALUE, REWARD_STRATEGIES, GKDConfig, Mode
from trainer.errors import ConfigError

STRATEGIES = ("fsdp", "fsdp2", "megatron")
"""Training engines that the distillation loss works with."""
SYNC = "sync"
"""verl's trainer mode in which generation and update take turns."""
_ABSENT = object()


def check_conflicts(gkd: GKDConfig, config: Mapping[str, Any]) -> None:
    """Check the GKD keys against each other and against verl's.

    Args:
        gkd: the GKD keys.
        config: the composed and resolved configuration; verl's keys that are absent have no say.

    Raises:
        ConfigError: two keys contradict each other, or one would be ignored without a word.
    """
    if gkd.trainer.enable_off_policy and gkd.mode is not Mode.GKD:
        raise ConfigError(
            "trainer.enable_off_policy=true needs actor_rollout_ref.actor.use_teacher_kl_loss=true and "
            "gkd_only_mode=true: off-policy data is not supported with GRPO, which estimates advantages from several "
            "rollouts of a prompt; set it to false"
        )
    if gkd.mode is Mode.GRPO:
        return
    strategy = _select(config, "actor_rollout_ref.actor.strategy")
    if strategy not in (_ABSENT, *STRATEGIES):
        raise ConfigError(
            f"actor_rollout_ref.actor.strategy={strategy}: how this engine lays out its logits is not known to the "
            f"distillation loss; use {', '.join(STRATEGIES)}"
        )
    _check_selection(gkd, config)
    _check_teacher(gkd)
    _check_async(gkd, config)
    if gkd.teaches_by_advantages:
        _check_advantages(gkd, config)
    else:
        why = "fused kernels never hold the logits, which the distillation loss compares; set it to false"
        _refuse(config, "actor_rollout_ref.model.use_fused_kernels", True, why)
    _refuse(config, "distillation.enabled", True, "its teacher and this one would both act; set it to false")
    if gkd.mode is Mode.GKD:
        _check_distillation_alone(gkd, config)


def _check_distillation_alone(gkd: GKDConfig, config: Mapping[str, Any]) -> None:
    why = "the loss is the distillation term alone with gkd_only_mode=true; {remedy}, or set gkd_only_mode=false"
    _refuse(config, "actor_rollout_ref.actor.use_kl_loss", True, why.format(remedy="set it to false"))
    _refuse(config, "algorithm.use_kl_in_reward", True, why.format(remedy="set it to false"))
    if _select(config, "actor_rollout_ref.actor.entropy_coeff") not in (_ABSENT, 0, 0.0):
        coefficient = _select(config, "actor_rollout_ref.actor.entropy_coeff")
        raise ConfigError(f"actor_rollout_ref.actor.entropy_coeff={coefficient}: " + why.format(remedy="set it to 0"))
    if gkd.mixes_off_policy:
        why = "off-policy batches can't be refilled one prompt at a time; {}, or trainer.enable_off_policy=false"
        for key in ("algorithm.filter_groups.enable", "trainer.v1.sampler.sync_refill_failed_groups"):
            _refuse(config, key, True, why.format("set it to false"))
        batch_size = _select(config, "data.train_batch_size")
        if _select(config, "data.gen_batch_size") not in (_ABSENT, None, batch_size):
            raise ConfigError(
                f"data.gen_batch_size={_select(config, 'data.gen_batch_size')}: " + why.format("set it to null")
            )


def _check_teacher(gkd: GKDConfig) -> None:
    teacher = gkd.teacher
    if teacher.on_failure == "degrade" and gkd.mode is Mode.GKD:
        raise ConfigError(
            "actor_rollout_ref.teacher.on_failure=degrade goes on with GRPO where the teacher fails, and there is none "
            "with gkd_only_mode=true; set it to wait or fail, or set gkd_only_mode=false"
        )
    if teacher.routes is not None:
        if not teacher.routes:
            raise ConfigError("actor_rollout_ref.teacher.routes is empty; name a teacher per value, or set it to null")
        if teacher.endpoints is not None:
            raise ConfigError(
                f"actor_rollout_ref.teacher.endpoints={teacher.endpoints} would be ignored beside teacher.routes; set "
                f"it to null, or make it the route {ANY_VALUE!r}"
            )


def _check_async(gkd: GKDConfig, config: Mapping[str, Any]) -> None:
    mode = _select(config, "trainer.v1.trainer_mode")
    if mode in (_ABSENT, SYNC):
        return
    if gkd.mixes_off_policy:
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode} takes responses in the order in which they are ready, and "
            f"trainer.gkd_lambda={gkd.trainer.gkd_lambda} makes whole steps of ground-truth answers; use "
            "trainer.v1.trainer_mode=sync, or trainer.enable_off_policy=false"
        )
    if _select(config, "trainer.v1.sampler.max_off_policy_threshold") is None:
        raise ConfigError(
            f"trainer.v1.sampler.max_off_policy_threshold=null leaves the age of responses unbounded with "
            f"trainer.v1.trainer_mode={mode}; set the most model versions that a response may span, such as 8"
        )


def _check_advantages(gkd: GKDConfig, config: Mapping[str, Any]) -> None:
    key = "actor_rollout_ref.actor.gkd_divergence=policy_gradient"
    if gkd.mixes_off_policy:
        raise ConfigError(
            f"{key} learns from the student's own samples, and trainer.gkd_lambda={gkd.trainer.gkd_lambda} mixes in "
            "answers that it did not sample; set trainer.enable_off_policy=false, or choose a divergence"
        )
    sampling = _select(config, "actor_rollout_ref.rollout.temperature")
    if gkd.actor.teacher_kl_temperature != sampling:
        raise ConfigError(
            f"actor_rollout_ref.actor.teacher_kl_temperature={gkd.actor.teacher_kl_temperature}: {key} compares both "
            f"models' logprobs of the sampled tokens at the temperature of sampling; set it to "
            f"actor_rollout_ref.rollout.temperature, {sampling}"
        )


def _check_selection(gkd: GKDConfig, config: Mapping[str, Any]) -> None:
    strategy, k = gkd.actor.gkd_select_strategy, gkd.actor.gkd_select_k
    num_rollouts = _select(config, "actor_rollout_ref.rollout.n")
    if k > num_rollouts:
        raise ConfigError(
            f"actor_rollout_ref.actor.gkd_select_k={k} responses can't be selected of actor_rollout_ref.rollout.n="
            f"{num_rollouts}; lower the one or raise the other"
        )
    if strategy in REWARD_STRATEGIES:
        if gkd.mode is Mode.GKD:
            raise ConfigError(
                f"actor_rollout_ref.actor.gkd_select_strategy={strategy} ranks responses by reward, and there "
                "is none with gkd_only_mode=true; set it to all or random, or set gkd_only_mode=false"
            )
        if (
            _select(config, "reward.reward_model.enable") is True
            and _select(config, "reward.reward_model.enable_resource_pool") is not True
        ):
            raise ConfigError(
                f"actor_rollout_ref.actor.gkd_select_strategy={strategy} needs each reward before the teacher is "
                "asked, and a colocated reward model computes them after all were generated; set "
                "reward.reward_model.enable_resource_pool=true, or the strategy to all or random"
            )
    if gkd.scores_partly:
        _refuse(
            config,
            "actor_rollout_ref.actor.shuffle",
            True,
            "the scored tokens of each mini-batch are counted before the update; set it to false, or "
            "gkd_select_strategy=all and teacher.on_failure to another than degrade",
        )


def _refuse(config: Mapping[str, Any], key: str, value: object, why: str) -> None:
    if _select(config, key) == value:
        raise ConfigError(f"{key}={str(value).lower()}: {why}")


def _select(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; `_ABSENT` where there is none."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _ABSENT
        found = found[part]
    return found
