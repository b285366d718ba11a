"""The loss that verl's engine calls: once on the logits, once on what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from trainer import metrics as names
from trainer.config import GKDConfig
from trainer.losses import DivergenceForm, TopK, VocabShard, compare_with_statistics
from trainer.verl_adapter import teacher_fields
from trainer.verl_adapter.packing import local_rows

MINI_BATCH_COUNTS = "gkd_mini_batch_counts"
"""`[B, 2]`: selected tokens and selected sequences of the row's mini-batch, over all ranks. Absent where every response
is selected: verl's own counts are then the right ones."""

_DIVERGENCE, _SAMPLED_LOGPROBS = "gkd_divergence", "gkd_sampled_logprobs"
_PER_TOKEN = {
    names.TOP1_AGREEMENT: "gkd_top1_agreement",
    names.STUDENT_ENTROPY: "gkd_student_entropy",
    names.TEACHER_ENTROPY: "gkd_teacher_entropy",
}
"""Metric -> what process_logits calls its value per token."""


@dataclass(frozen=True, kw_only=True)
class GKDLoss:
    """`teacher_kl_coef` times the divergence over the selected tokens, plus verl's policy loss over all (GKD + GRPO).

    verl calls it twice per micro-batch: as logits processor (`student_logits` given), whose per-token outputs verl
    gathers over sequence-parallel ranks, and as loss (`model_output` given).
    """

    gkd: GKDConfig
    loss_agg_mode: str
    """verl's `actor.loss_agg_mode`."""
    loss_scale_factor: float | None
    """verl's `actor.loss_scale_factor`."""
    rollout_temperature: float
    """What verl has divided the logits by."""
    student_vocab_rows: int
    """Rows of the student's LM head; Megatron pads them."""
    policy: Any = None
    """verl's actor configuration, by which its policy loss is added; None: distillation alone."""

    def __call__(
        self,
        *,
        model_output: dict[str, Tensor] | None = None,
        data: TensorDict,
        dp_group: object = None,
        student_logits: Tensor | None = None,
        data_format: str | None = None,
    ) -> dict[str, Tensor] | tuple[Tensor, dict[str, Any]]:
        """Per-token outputs `[B, L]` of logits `[B, L, W]` as the engine packed them, or the loss and its metrics.

        Megatron names its packing in `data_format`, and its logits are this rank's part of the vocabulary.
        """
        if student_logits is not None:
            return self.process_logits(student_logits, data, data_format)
        if model_output is None:
            raise ValueError("neither student_logits nor model_output is given")
        teacher_kl, metrics = self.aggregate(model_output, data)
        loss = self.gkd.actor.teacher_kl_coef * teacher_kl
        if self.policy is not None:
            policy_loss, policy_metrics = ppo_loss(self.policy, model_output, data, dp_group)
            return policy_loss + loss, metrics | policy_metrics
        return loss, metrics

    def process_logits(self, student_logits: Tensor, data: TensorDict, data_format: str | None) -> dict[str, Tensor]:
        """Divergence and what is logged about it per packed token, 0 where nothing is learned from the teacher."""
        logits_LW = student_logits.flatten(0, -2)
        ids, logprobs = data[teacher_fields.TEACHER_IDS], data[teacher_fields.TEACHER_LOGPROBS]
        mask = data["response_mask"]
        packed_rows, teacher_rows = teacher_fields.response_rows(
            sequence_lens=data["input_ids"].offsets().diff(),
            prompt_lens=data["prompts"].offsets().diff(),
            teacher_lens=ids.offsets().diff(),
            response_mask=mask.values(),
            mask_lens=mask.offsets().diff(),
            unscored_allowed=MINI_BATCH_COUNTS in data,
        )
        rows, here = local_rows(packed_rows, data, data_format, logits_LW.shape[0])
        teacher = teacher_fields.unpack(ids.values()[teacher_rows[here]], logprobs.values()[teacher_rows[here]])
        # the policy's own logprobs overwrite the logits when they are done with them: compare a copy then
        shared = self.policy is not None
        divergence_S, statistics = compare_with_statistics(
            self.form,
            logits_LW[rows] if shared else logits_LW,
            TopK(teacher.topk_token_ids, teacher.topk_logprobs, teacher.log_tail_mass),
            rows=None if shared else rows,
            shard=None if data_format is None else self._shard(logits_LW.shape[1]),
            sampled_token_ids=data["input_ids"].values()[packed_rows[here] + 1],
            overwrite_logits=not shared,
        )
        values = {
            _DIVERGENCE: divergence_S,
            _SAMPLED_LOGPROBS: statistics.sampled_logprobs,
            _PER_TOKEN[names.TOP1_AGREEMENT]: statistics.top1_agreement,
            _PER_TOKEN[names.STUDENT_ENTROPY]: statistics.entropy,
            _PER_TOKEN[names.TEACHER_ENTROPY]: _coarse_entropy(teacher),
        }
        shape = student_logits.shape[:-1]
        return {name: _spread(values_S, rows, logits_LW.shape[0]).view(shape) for name, values_S in values.items()}

    @property
    def form(self) -> DivergenceForm:
        """The divergence, at the temperature by which the logits are still to be divided."""
        actor = self.gkd.actor
        return DivergenceForm(
            divergence=actor.topk_divergence,
            beta=actor.gkd_beta,
            skew_alpha=actor.gkd_skew_alpha,
            # verl divides by the sampling temperature, which is none of the divergence's business
            temperature=actor.teacher_kl_temperature / self.rollout_temperature,
            tail=actor.gkd_tail,
        )

    def _shard(self, num_columns: int) -> VocabShard:
        from megatron.core import parallel_state  # only its users have it

        return VocabShard(
            start=parallel_state.get_tensor_model_parallel_rank() * num_columns,
            vocab_size=self.student_vocab_rows,
            group=parallel_state.get_tensor_model_parallel_group(),
        )

    def aggregate(self, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        """The micro-batch's share of the divergence, normalised over the global mini-batch, and its metrics."""
        mask_BR = data["response_mask"].to_padded_tensor(0)
        batch_num_tokens, global_batch_size = data["batch_num_tokens"], data["global_batch_size"]
        if MINI_BATCH_COUNTS in data:
            scored_B = data[teacher_fields.TEACHER_IDS].offsets().diff() > 0
            mask_BR = mask_BR * scored_B.unsqueeze(-1)
            # the same for every row; at least 1, where nothing is selected and the sum is 0 anyway
            batch_num_tokens, global_batch_size = _first_row(data[MINI_BATCH_COUNTS]).clamp_min(1).tolist()
        teacher_kl = agg_loss(
            loss_mat=no_padding_2_padding(model_output[_DIVERGENCE], data),
            loss_mask=mask_BR,
            loss_agg_mode=self.loss_agg_mode,
            dp_size=data["dp_size"],
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
            loss_scale_factor=self.loss_scale_factor,
        )
        metrics: dict[str, Any] = {
            names.TEACHER_KL_LOSS: _sum(teacher_kl),
            names.TEACHER_KL_COEF: self.gkd.actor.teacher_kl_coef,
            names.LOSS_SUMS + "tokens": _sum(mask_BR.sum()),
        }
        for name, key in _PER_TOKEN.items():
            values_BR = no_padding_2_padding(model_output[key], data)
            metrics[names.LOSS_SUMS + name] = _sum((values_BR * mask_BR).sum())
        if self.policy is None and "rollout_log_probs" in data:
            student_BR = no_padding_2_padding(model_output[_SAMPLED_LOGPROBS], data)
            rollout_BR = data["rollout_log_probs"].to_padded_tensor(0)
            metrics.update(_correlation_sums(student_BR, rollout_BR, mask_BR))
        return teacher_kl, metrics


def _spread(values_S: Tensor, rows: Tensor, length: int) -> Tensor:
    """`[1, length]` with the values at their rows and 0 elsewhere; keeps the graph, also for no rows at all."""
    spread = torch.zeros(length, dtype=values_S.dtype, device=values_S.device)
    return spread.index_copy(0, rows, values_S).unsqueeze(0)


def _first_row(counts: Tensor) -> Tensor:
    return (counts.values() if counts.is_nested else counts).reshape(-1, 2)[0]


def _coarse_entropy(teacher: teacher_fields.TeacherColumns) -> Tensor:
    """Entropy of the K + 1 events: the top-k tokens, and any other."""
    logprobs = torch.cat([teacher.topk_logprobs, teacher.log_tail_mass.unsqueeze(-1)], dim=-1).float()
    return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(-1)


def _sum(value: Tensor) -> Metric:
    return Metric(value=value.detach(), aggregation=AggregationType.SUM)


def _correlation_sums(student_BR: Tensor, rollout_BR: Tensor, mask_BR: Tensor) -> dict[str, Metric]:
    """Sums from which the trainer computes the correlation of the two sides' token probabilities."""
    learned = mask_BR.bool()
    x, y = student_BR.detach()[learned].double().exp(), rollout_BR[learned].double().exp()
    sums = {"n": torch.ones_like(x), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {names.ROLLOUT_PROBS + name: _sum(values.sum()) for name, values in sums.items()}
