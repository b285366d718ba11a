"""verl's trainers with distillation mixed in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from omegaconf import OmegaConf, open_dict
from opentelemetry.trace import Span
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass

from protos import tracing
from trainer import metrics as names
from trainer.config import GKDConfig, Mode
from trainer.errors import GKDError, TeacherLostError
from trainer.metrics import BatchCalls, loss_metrics, merge, metrics_per_teacher, teacher_metrics
from trainer.verl_adapter.agent_loop import LOST_TAG, TRACED_AS
from trainer.verl_adapter.batch_fields import (
    add_teacher_advantages,
    collect_calls,
    write_mini_batch_counts,
    write_unused_advantages,
)
from trainer.verl_adapter.loss import GKDLoss
from trainer.verl_adapter.metrics_port import MetricsPortMixin
from trainer.verl_adapter.off_policy import MixedData
from trainer.verl_adapter.stopping import StoppableMixin

REPLAY_POLL_S = 0.2
"""How often verl looks for finished responses; its own 2 s can be most of a step, and each look costs."""
TRACED = (names.TEACHER_KNOWLEDGE, names.SCORED_TOKENS, names.TEACHER_COVERAGE)
"""Metrics that a step's span carries."""


class GKDTrainerMixin:
    """What distillation changes in a verl trainer: data, the loss, the passes that it does not need, the metrics."""

    config: Any
    actor_rollout_wg: Any
    replay_buffer: Any
    global_steps: int
    trainer_mode: str
    _calls: list[BatchCalls]
    """Of each batch that the step under way has taken."""
    _wanted_at_s: float
    _num_prompts: int
    """Of the batch that is being taken."""
    _span: Span
    """Of the step under way."""
    _mixed: MixedData | None = None

    @cached_property
    def _gkd(self) -> GKDConfig:
        return GKDConfig.model_validate(OmegaConf.to_container(self.config.gkd, resolve=True))

    @property
    def _on_policy(self) -> bool:
        """Whether the student writes the responses of the step under way."""
        return self._mixed is None or self._mixed.is_on_policy(self.global_steps)

    @property
    def _responses_per_prompt(self) -> int:
        return int(self.config.actor_rollout_ref.rollout.n) if self._on_policy else 1

    @property
    def _weighs_by_age(self) -> bool:
        """Whether verl weighs a policy gradient by how far the student has moved since it sampled."""
        correction = self.config.algorithm.get("rollout_correction") or {}
        wanted = correction.get("rollout_is") is not None or correction.get("rollout_rs") is not None
        return self._gkd.teaches_by_advantages and wanted

    @property
    def _num_ranks(self) -> int:
        """Data-parallel ranks of the actor."""
        return int(max(self.actor_rollout_wg._dispatch_info["actor"])) + 1

    @property
    def _mini_batch_size(self) -> int:
        """Responses per optimizer step, over all ranks."""
        actor = self.config.actor_rollout_ref.actor
        size = int(actor.ppo_mini_batch_size) * self._responses_per_prompt
        # verl cuts a mini-batch into whole micro-batches; fewer responses per prompt may leave a rest, which it pads
        unit = self._num_ranks * (1 if actor.use_dynamic_bsz else int(actor.ppo_micro_batch_size_per_gpu))
        return -(-size // unit) * unit

    def on_init_end(self) -> None:
        """Install the loss in the workers."""
        tracing.start_tracing(TRACED_AS)
        self.replay_buffer.poll_interval = REPLAY_POLL_S
        actor = self.config.actor_rollout_ref.actor
        if not self._gkd.teaches_by_advantages:  # those are for verl's own loss
            loss = GKDLoss(
                gkd=self._gkd,
                loss_agg_mode=actor.loss_agg_mode,
                loss_scale_factor=actor.get("loss_scale_factor"),
                rollout_temperature=self.config.actor_rollout_ref.rollout.temperature,
                student_vocab_rows=self.config.gkd_student_vocab_rows,
                policy=omega_conf_to_dataclass(actor) if self._gkd.mode is Mode.GKD_GRPO else None,
            )
            self.actor_rollout_wg.set_loss_fn(loss)
        self._plain_update_actor = self.actor_rollout_wg.update_actor
        self.actor_rollout_wg.update_actor = self._distilling_update
        super().on_init_end()  # type: ignore[misc]  # verl's trainer follows in the class order

    def _init_dataloader(self) -> None:
        super()._init_dataloader()  # type: ignore[misc]
        if not self._gkd.mixes_off_policy:
            return
        trainer: Any = self  # verl's attributes
        self._mixed = MixedData(
            self.config.data,
            self._gkd,
            train_dataset=trainer.train_dataset,
            tokenizer=trainer.tokenizer,
            processor=trainer.processor,
        )
        trainer.steps_per_epoch = self._mixed.schedule.steps_per_epoch
        if self.config.trainer.total_training_steps is None:
            trainer.total_training_steps = trainer.steps_per_epoch * self.config.trainer.total_epochs
            with open_dict(self.config):
                self.config.actor_rollout_ref.actor.optim.total_training_steps = trainer.total_training_steps

    def _fetch_one_gen_batch(self) -> TensorDict:
        if self._mixed is None:
            return super()._fetch_one_gen_batch()  # type: ignore[misc]
        return self._mixed.fetch(self.global_steps)

    def _step_once(self, metrics: dict[str, Any], timing_raw: dict[str, float], sample_batch_size: int) -> KVBatchMeta:
        if self._mixed is not None:
            sample_batch_size = self._mixed.batch_size(self.global_steps)
        self._num_prompts = sample_batch_size
        return super()._step_once(metrics, timing_raw, sample_batch_size)  # type: ignore[misc]

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        if self._on_policy:
            return int(super()._get_required_batch_multiple(dp_size))  # type: ignore[misc]
        return self._mini_batch_size  # a multiple of the ranks

    def _balance_batch(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        logging_prefix: str = "global_seqlen",
        keep_minibatch: bool = False,
    ) -> KVBatchMeta:
        self._check_complete(batch)
        self._calls.append(collect_calls(batch, wanted_at_s=self._wanted_at_s))
        return super()._balance_batch(batch, metrics, logging_prefix, keep_minibatch)  # type: ignore[misc]

    def on_step_begin(self) -> None:
        """Called by verl before it asks for the step's responses."""
        self._calls = []
        self._span = tracing.start_step(self.config.gkd_run_id, self.global_steps)
        super().on_step_begin()  # type: ignore[misc]

    def on_sample_begin(self) -> None:
        """Called by verl before it waits for the responses of an update."""
        self._wanted_at_s = time.time()
        super().on_sample_begin()  # type: ignore[misc]

    def _check_responses(self, responses: Mapping[str, Mapping[str, Any]], *, taken: bool) -> None:
        lost = [tag[LOST_TAG] for tag in responses.values() if LOST_TAG in tag]
        teacher = self._gkd.teacher
        if not lost or (teacher.on_failure == "degrade" and not taken):
            return
        share = min(1.0, self._gkd.actor.gkd_select_k / self._responses_per_prompt) if self._gkd.selects else 1.0
        asked = max(len(lost), round(share * len(responses)))
        if teacher.on_failure != "degrade":
            raise TeacherLostError(
                f"{len(lost)} of {len(responses)} responses could not be scored by the teacher "
                f"(actor_rollout_ref.teacher.on_failure={teacher.on_failure}): {lost[0]}"
            )
        coverage = 1 - len(lost) / asked
        if coverage < teacher.min_coverage:
            raise TeacherLostError(
                f"the teacher scored {coverage:.0%} of the step's selected responses, less than "
                f"actor_rollout_ref.teacher.min_coverage={teacher.min_coverage:g}: {lost[0]}"
            )

    def _check_complete(self, batch: KVBatchMeta) -> None:
        # verl trains on without the responses whose generation failed
        expected = self._num_prompts * self._responses_per_prompt
        there = len({key.rsplit("_", 1)[0] for key in batch.keys})  # {uid}_{response}_{part of its conversation}
        if there < expected:
            raise GKDError(
                f"{expected - there} of {expected} responses failed while being generated; "
                "the agent-loop worker's log above says why"
            )

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self._gkd.mode is Mode.GKD and not self._gkd.teaches_by_advantages:
            return batch  # only a policy ratio needs it
        return super()._compute_old_log_prob(batch, metrics)  # type: ignore[misc]

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if self._gkd.mode is Mode.GKD:
            batch = write_unused_advantages(batch)
        if self._gkd.mode is not Mode.GKD or self._weighs_by_age:
            batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        if self._gkd.teaches_by_advantages:
            coefficient = self._gkd.actor.teacher_kl_coef
            batch, reverse_kl = add_teacher_advantages(batch, coefficient)
            metrics[names.TEACHER_KL_COEF] = coefficient
            if reverse_kl is not None:
                metrics[names.TEACHER_KL_LOSS] = reverse_kl
        return batch

    def _distilling_update(self, batch: KVBatchMeta) -> Any:  # whatever verl returns
        """verl's update, whose engine calls the loss on the logits too."""
        size = self._mini_batch_size
        batch.extra_info.update(mini_batch_size=size, global_batch_size=size)
        if self._gkd.teaches_by_advantages:
            return self._plain_update_actor(batch)
        batch.extra_info.update(
            distillation_use_topk=True,
            distillation_only=self._gkd.mode is Mode.GKD,  # no need for the policy's own logprobs
        )
        if self._gkd.scores_partly:
            # the workers fetch the fields that the batch names
            batch.fields = write_mini_batch_counts(batch, mini_batch_size=size, num_ranks=self._num_ranks).fields
        output = self._plain_update_actor(batch)
        metrics = output["metrics"]
        for name in [one for one in metrics if one.startswith(names.ROLLOUT_PROBS)]:
            metrics[name] = metrics[name][:1]  # one value per mini-batch: only the first saw the rollout's weights
        return output

    def _dump_generations(
        self,
        inputs: list[str],
        outputs: list[str],
        gts: list[Any],
        scores: list[float],
        reward_extra_infos_dict: dict[str, list[Any]],
        dump_path: str,
    ) -> None:
        """Write beside each dumped training response how many of its tokens the teacher scored."""
        keys = reward_extra_infos_dict.get("uid", [])
        calls = merge(self._calls).calls
        if any(key in calls for key in keys):
            scored = [calls[key].scored_tokens if key in calls else 0 for key in keys]
            reward_extra_infos_dict = {**reward_extra_infos_dict, "gkd_scored_tokens": scored}
        super()._dump_generations(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)  # type: ignore[misc]

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)  # type: ignore[misc]
        if self._gkd.mode is Mode.GKD:
            for name in [one for one in metrics if one.startswith("critic/")]:
                del metrics[name]  # they describe zeros
        calls = merge(self._calls)
        metrics.update(teacher_metrics(calls))
        if self._gkd.teacher.routes is not None:
            metrics.update(metrics_per_teacher(calls))
        metrics[names.SELECT_STRATEGY] = names.STRATEGY_NUMBERS[self._gkd.actor.gkd_select_strategy]
        metrics[names.IS_ON_POLICY] = float(self._on_policy)
        sums = {
            name.removeprefix(names.LOSS_SUMS): float(metrics.pop(name))
            for name in [one for one in metrics if one.startswith(names.LOSS_SUMS)]
        }
        metrics.update({name: value for name, value in loss_metrics(sums).items() if name not in metrics})
        self._span.set_attributes({name: metrics[name] for name in TRACED if name in metrics})
        self._span.end()


class GKDTrainerSync(MetricsPortMixin, GKDTrainerMixin, StoppableMixin, PPOTrainerSync):  # type: ignore[misc]
    """Generation and update take turns."""


class GKDTrainerColocateAsync(MetricsPortMixin, GKDTrainerMixin, StoppableMixin, PPOTrainerColocateAsync):  # type: ignore[misc]
    """They take turns on the same devices, and generation goes on where it was interrupted."""


class GKDTrainerSeparateAsync(MetricsPortMixin, GKDTrainerMixin, StoppableMixin, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """Generation and the teacher go on during updates."""


class PlainTrainerSync(MetricsPortMixin, StoppableMixin, PPOTrainerSync):  # type: ignore[misc]
    """verl's own, without a teacher."""


class PlainTrainerColocateAsync(MetricsPortMixin, StoppableMixin, PPOTrainerColocateAsync):  # type: ignore[misc]
    """Likewise."""


class PlainTrainerSeparateAsync(MetricsPortMixin, StoppableMixin, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """Likewise."""


GKD_TRAINERS: dict[str, type[Any]] = {
    "sync": GKDTrainerSync,
    "colocate_async": GKDTrainerColocateAsync,
    "separate_async": GKDTrainerSeparateAsync,
}
"""By `trainer.v1.trainer_mode`, for runs with a teacher."""
PLAIN_TRAINERS: dict[str, type[Any]] = {
    "sync": PlainTrainerSync,
    "colocate_async": PlainTrainerColocateAsync,
    "separate_async": PlainTrainerSeparateAsync,
}
"""Likewise, for runs without one."""


def trainers_for(config: Any) -> dict[str, type[Any]]:
    """The trainers for a configuration that verl has been handed."""
    return GKD_TRAINERS if "gkd" in config else PLAIN_TRAINERS
