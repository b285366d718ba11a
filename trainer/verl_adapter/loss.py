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
from trainer.losses import topk_divergence
from trainer.verl_adapter import teacher_fields

MINI_BATCH_COUNTS = "gkd_mini_batch_counts"
"""`[B, 2]`: selected tokens and selected sequences of the row's mini-batch, over all ranks. Absent where every response
is selected: verl's own counts are then the right ones."""

_DIVERGENCE, _STUDENT_LOGPROBS = "teacher_divergence", "student_logprobs"
_PER_TOKEN = {
    names.TOP1_AGREEMENT: "top1_agreement",
    names.STUDENT_ENTROPY: "student_entropy",
    names.TEACHER_ENTROPY: "teacher_entropy",
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
    policy: Any = None
    """verl's actor configuration, by which its policy loss is added; None: distillation alone."""

    def __call__(
        self,
        *,
        model_output: dict[str, Tensor] | None = None,
        data: TensorDict,
        dp_group: object = None,
        student_logits: Tensor | None = None,
        data_format: str = "thd",
    ) -> dict[str, Tensor] | tuple[Tensor, dict[str, Any]]:
        """Per-token outputs `[1, T]` of packed logits `[1, T, V]`, or the loss and its metrics."""
        if student_logits is not None:
            return self.process_logits(student_logits, data)
        if model_output is None:
            raise ValueError("neither student_logits nor model_output is given")
        teacher_kl, metrics = self.aggregate(model_output, data)
        loss = self.gkd.actor.teacher_kl_coef * teacher_kl
        if self.policy is not None:
            policy_loss, policy_metrics = ppo_loss(self.policy, model_output, data, dp_group)
            return policy_loss + loss, metrics | policy_metrics
        return loss, metrics

    def process_logits(self, student_logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        """Divergence and what is logged about it per packed token, 0 where nothing is learned from the teacher."""
        logits_TV = student_logits.squeeze(0)
        ids, logprobs = data[teacher_fields.TEACHER_IDS], data[teacher_fields.TEACHER_LOGPROBS]
        mask = data["response_mask"]
        rows, teacher_rows = teacher_fields.response_rows(
            sequence_lens=data["input_ids"].offsets().diff(),
            prompt_lens=data["prompts"].offsets().diff(),
            teacher_lens=ids.offsets().diff(),
            response_mask=mask.values(),
            mask_lens=mask.offsets().diff(),
            unscored_allowed=MINI_BATCH_COUNTS in data,
        )
        teacher = teacher_fields.unpack(ids.values()[teacher_rows], logprobs.values()[teacher_rows])
        logits_SV = logits_TV[rows]
        # verl divides by the sampling temperature, which is none of the divergence's business
        temperature = self.gkd.actor.teacher_kl_temperature / self.rollout_temperature
        divergence_S = topk_divergence(
            logits_SV,
            teacher.topk_token_ids,
            teacher.topk_logprobs,
            divergence=self.gkd.actor.gkd_divergence,
            temperature=temperature,
            tail=self.gkd.actor.gkd_tail,
            log_tail_mass=teacher.log_tail_mass,
        )
        with torch.no_grad():
            values = {
                _STUDENT_LOGPROBS: _logprobs_of(logits_SV, data["input_ids"].values()[rows + 1]),
                _PER_TOKEN[names.TOP1_AGREEMENT]: _top1_agreement(logits_SV, teacher.topk_token_ids),
                _PER_TOKEN[names.STUDENT_ENTROPY]: _entropy(logits_SV / temperature),
                _PER_TOKEN[names.TEACHER_ENTROPY]: _coarse_entropy(teacher.topk_logprobs, teacher.log_tail_mass),
            }
        length = logits_TV.shape[0]
        return {
            name: _spread(values_S, rows, length) for name, values_S in {_DIVERGENCE: divergence_S, **values}.items()
        }

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
            student_BR = no_padding_2_padding(model_output[_STUDENT_LOGPROBS], data)
            rollout_BR = data["rollout_log_probs"].to_padded_tensor(0)
            metrics.update(_correlation_sums(student_BR, rollout_BR, mask_BR))
        return teacher_kl, metrics


def _spread(values_S: Tensor, rows: Tensor, length: int) -> Tensor:
    """`[1, length]` with the values at their rows and 0 elsewhere; keeps the graph, also for no rows at all."""
    spread = torch.zeros(length, dtype=values_S.dtype, device=values_S.device)
    return spread.index_copy(0, rows, values_S).unsqueeze(0)


def _first_row(counts: Tensor) -> Tensor:
    return (counts.values() if counts.is_nested else counts).reshape(-1, 2)[0]


def _logprobs_of(logits_SV: Tensor, token_ids: Tensor) -> Tensor:
    logits_SV = logits_SV.float()
    return logits_SV.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - logits_SV.logsumexp(-1)


def _top1_agreement(logits_SV: Tensor, teacher_ids_SK: Tensor) -> Tensor:
    """1.0 where no token's logit exceeds that of the teacher's likeliest token."""
    at_top1_S = logits_SV.gather(-1, teacher_ids_SK[:, :1].long()).squeeze(-1)
    return (at_top1_S >= logits_SV.amax(-1)).float()


def _entropy(logits_SV: Tensor) -> Tensor:
    logprobs_SV = logits_SV.float().log_softmax(-1)
    # a token that is ruled out adds 0, not 0 * -inf
    return -torch.where(logprobs_SV > -torch.inf, logprobs_SV.exp() * logprobs_SV, 0.0).sum(-1)


def _coarse_entropy(topk_logprobs_SK: Tensor, log_tail_mass_S: Tensor) -> Tensor:
    """Entropy of the K + 1 events: the top-k tokens, and any other."""
    logprobs = torch.cat([topk_logprobs_SK, log_tail_mass_S.unsqueeze(-1)], dim=-1).float()
    return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(-1)


def _sum(value: Tensor) -> Metric:
    return Metric(value=value.detach(), aggregation=AggregationType.SUM)


def _correlation_sums(student_BR: Tensor, rollout_BR: Tensor, mask_BR: Tensor) -> dict[str, Metric]:
    """Sums from which the trainer computes the correlation of the two sides' token probabilities."""
    learned = mask_BR.bool()
    x, y = student_BR.detach()[learned].double().exp(), rollout_BR[learned].double().exp()
    sums = {"n": torch.ones_like(x), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {names.ROLLOUT_PROBS + name: _sum(values.sum()) for name, values in sums.items()}
