"""verl's trainers with distillation mixed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.workers.utils.padding import response_to_nested

from trainer import metrics as names
from trainer.config import GKDConfig
from trainer.errors import GKDError
from trainer.metrics import TeacherCall, pearson_correlation, teacher_metrics
from trainer.verl_adapter.agent_loop import TEACHER_CALL, TEACHER_ERROR
from trainer.verl_adapter.loss import GKDLoss

REPLAY_POLL_S = 0.2
"""How often verl looks for finished responses; its own 2 s can be most of a step, and each look costs."""


class GKDTrainerMixin:
    """What distillation changes in a verl trainer: the loss, the passes that it does not need, and the metrics."""

    config: Any
    actor_rollout_wg: Any
    replay_buffer: Any

    def on_init_end(self) -> None:
        """Install the loss in the workers."""
        self._gkd = GKDConfig.model_validate(OmegaConf.to_container(self.config.gkd, resolve=True))
        self._teacher_calls: list[TeacherCall] = []
        self.replay_buffer.poll_interval = REPLAY_POLL_S
        actor = self.config.actor_rollout_ref.actor
        loss = GKDLoss(
            gkd=self._gkd,
            loss_agg_mode=actor.loss_agg_mode,
            loss_scale_factor=actor.get("loss_scale_factor"),
            rollout_temperature=self.config.actor_rollout_ref.rollout.temperature,
        )
        self.actor_rollout_wg.set_loss_fn(loss)
        self.actor_rollout_wg.update_actor = _distilling(self.actor_rollout_wg.update_actor)
        super().on_init_end()  # type: ignore[misc]  # verl's trainer follows in the class order

    def _balance_batch(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        logging_prefix: str = "global_seqlen",
        keep_minibatch: bool = False,
    ) -> KVBatchMeta:
        self._check_complete(batch)
        self._teacher_calls = _collect_teacher_calls(batch)
        return super()._balance_batch(batch, metrics, logging_prefix, keep_minibatch)  # type: ignore[misc]

    def _check_complete(self, batch: KVBatchMeta) -> None:
        # verl trains on without the responses whose generation failed
        expected = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        if len(batch.keys) < expected:
            raise GKDError(
                f"{expected - len(batch.keys)} of {expected} responses failed while being generated; "
                "the agent-loop worker's log above says why"
            )

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        return batch  # only a policy ratio needs it

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """There is no advantage; verl's bookkeeping still reads these fields."""
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
        mask = fields["response_mask"]
        zeros = response_to_nested(torch.zeros_like(mask.to_padded_tensor(0), dtype=torch.float32), mask)
        unused = TensorDict(dict.fromkeys(("rm_scores", "advantages", "returns"), zeros), batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=unused)

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)  # type: ignore[misc]
        for name in [one for one in metrics if one.startswith("critic/")]:
            del metrics[name]  # they describe the zeros above
        metrics.update(teacher_metrics(self._teacher_calls))
        metrics[names.IS_ON_POLICY] = 1.0
        correlation = _take_correlation(metrics)
        if correlation is not None:
            metrics[names.PEARSON_CORR] = correlation


def _distilling(update_actor: Callable[[KVBatchMeta], Any]) -> Callable[[KVBatchMeta], Any]:
    """Have verl's engine call the loss on the logits too, and leave out the policy's own logprobs."""

    def update(batch: KVBatchMeta) -> Any:  # whatever verl returns
        batch.extra_info.update(distillation_use_topk=True, distillation_only=True)
        output = update_actor(batch)
        metrics = output["metrics"]
        for name in [one for one in metrics if one.startswith(names.ROLLOUT_PROBS)]:
            metrics[name] = metrics[name][:1]  # one value per mini-batch: only the first saw the rollout's weights
        return output

    return update


def _collect_teacher_calls(batch: KVBatchMeta) -> list[TeacherCall]:
    """What the batch's teacher calls cost.

    Raises:
        GKDError: a response could not be scored.
    """
    fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
    # a list, a stack or an array, depending on the queue's backend
    extras = [getattr(one, "data", one) for one in list(fields["extra_fields"])]
    errors = [one[TEACHER_ERROR] for one in extras if TEACHER_ERROR in one]
    if errors:
        raise GKDError(f"{len(errors)} of {len(extras)} responses could not be scored by the teacher: {errors[0]}")
    return [TeacherCall(**one[TEACHER_CALL]) for one in extras]


def _take_correlation(metrics: dict[str, Any]) -> float | None:
    """Replace the loss's sums by the correlation that they make."""
    sums = {name.removeprefix(names.ROLLOUT_PROBS): name for name in metrics if name.startswith(names.ROLLOUT_PROBS)}
    if not sums:
        return None
    return pearson_correlation({short: float(metrics.pop(name)) for short, name in sums.items()})


class GKDTrainerSync(GKDTrainerMixin, PPOTrainerSync):  # type: ignore[misc]
    """Generation and update take turns."""


TRAINERS: dict[str, type[Any]] = {"sync": GKDTrainerSync}
"""By `trainer.v1.trainer_mode`."""
