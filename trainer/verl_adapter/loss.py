"""The loss that verl's engine calls: once on the logits, once on what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from trainer import metrics as names
from trainer.config import GKDConfig
from trainer.losses import topk_divergence
from trainer.verl_adapter import teacher_fields

_DIVERGENCE, _STUDENT_LOGPROBS = "teacher_divergence", "student_logprobs"


@dataclass(frozen=True, kw_only=True)
class GKDLoss:
    """`teacher_kl_coef` times the divergence over the learned tokens.

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
        return self.aggregate(model_output, data)

    def process_logits(self, student_logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        """Divergence and sampled-token logprob per packed token, 0 where nothing is learned."""
        logits_TV = student_logits.squeeze(0)
        ids, logprobs = data[teacher_fields.TEACHER_IDS], data[teacher_fields.TEACHER_LOGPROBS]
        mask = data["response_mask"]
        rows, teacher_rows = teacher_fields.response_rows(
            sequence_lens=data["input_ids"].offsets().diff(),
            prompt_lens=data["prompts"].offsets().diff(),
            teacher_lens=ids.offsets().diff(),
            response_mask=mask.values(),
            mask_lens=mask.offsets().diff(),
        )
        teacher = teacher_fields.unpack(ids.values()[teacher_rows], logprobs.values()[teacher_rows])
        logits_SV = logits_TV[rows]
        divergence_S = topk_divergence(
            logits_SV,
            teacher.topk_token_ids,
            teacher.topk_logprobs,
            divergence=self.gkd.actor.gkd_divergence,
            # verl divides by the sampling temperature, which is none of the divergence's business
            temperature=self.gkd.actor.teacher_kl_temperature / self.rollout_temperature,
            tail=self.gkd.actor.gkd_tail,
            log_tail_mass=teacher.log_tail_mass,
        )
        targets = data["input_ids"].values()[rows + 1]
        return {
            _DIVERGENCE: _spread(divergence_S, rows, logits_TV.shape[0]),
            _STUDENT_LOGPROBS: _spread(_logprobs_of(logits_SV.detach(), targets), rows, logits_TV.shape[0]),
        }

    def aggregate(self, model_output: dict[str, Tensor], data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        """The micro-batch's share of the loss, normalised over the global mini-batch, and its metrics."""
        divergence_BR = no_padding_2_padding(model_output[_DIVERGENCE], data)
        mask_BR = data["response_mask"].to_padded_tensor(0)
        teacher_kl = agg_loss(
            loss_mat=divergence_BR,
            loss_mask=mask_BR,
            loss_agg_mode=self.loss_agg_mode,
            dp_size=data["dp_size"],
            batch_num_tokens=data["batch_num_tokens"],
            global_batch_size=data["global_batch_size"],
            loss_scale_factor=self.loss_scale_factor,
        )
        coefficient = self.gkd.actor.teacher_kl_coef
        metrics: dict[str, Any] = {
            names.TEACHER_KL_LOSS: Metric(value=teacher_kl.detach(), aggregation=AggregationType.SUM),
            names.TEACHER_KL_COEF: coefficient,
        }
        if "rollout_log_probs" in data:
            student_BR = no_padding_2_padding(model_output[_STUDENT_LOGPROBS], data)
            rollout_BR = data["rollout_log_probs"].to_padded_tensor(0)
            metrics.update(_correlation_sums(student_BR, rollout_BR, mask_BR))
        return coefficient * teacher_kl, metrics


def _spread(values_S: Tensor, rows: Tensor, length: int) -> Tensor:
    """`[1, length]` with the values at their rows and 0 elsewhere; keeps the graph, also for no rows at all."""
    spread = torch.zeros(length, dtype=values_S.dtype, device=values_S.device)
    return spread.index_copy(0, rows, values_S).unsqueeze(0)


def _logprobs_of(logits_SV: Tensor, token_ids: Tensor) -> Tensor:
    logits_SV = logits_SV.float()
    return logits_SV.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - logits_SV.logsumexp(-1)


def _correlation_sums(student_BR: Tensor, rollout_BR: Tensor, mask_BR: Tensor) -> dict[str, Metric]:
    """Sums from which the trainer computes the correlation of the two sides' token probabilities."""
    learned = mask_BR.bool()
    x, y = student_BR.detach()[learned].double().exp(), rollout_BR[learned].double().exp()
    sums = {"n": torch.ones_like(x), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {
        names.ROLLOUT_PROBS + name: Metric(value=values.sum(), aggregation=AggregationType.SUM)
        for name, values in sums.items()
    }
