"""The comparison of logits with a teacher's top-k: differentiable, in constant memory, also on a split vocabulary.

Legend: T packed rows, S rows that are compared, K top-k entries, E events, W vocabulary rows on this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.errors import ShapeError
from trainer.losses import rows as torch_rows
from trainer.losses.events import divergence_on_events
from trainer.losses.forms import DivergenceForm, TopK
from trainer.losses.rows import ExpSums, Rows, Targets, clear_others, finite, gather, write_targets
from trainer.losses.vocabulary import VocabShard

_EVENT_ROWS = {"cpu": 1024}
"""Rows whose K + 1 events are computed at once: bounds what is held beside the logits."""
_EVENT_ROWS_ELSEWHERE = 16384
"""On a GPU each of the hundred operations on a block is a launch, which takes longer than a smaller block's work."""


class Statistics(NamedTuple):
    """What is logged about each compared row; nothing of it is differentiable."""

    entropy: Tensor
    """`[S]` nats, of the student's full distribution at the divergence's temperature."""
    top1_agreement: Tensor
    """`[S]` 1.0 where no token's logit exceeds that of the teacher's first entry."""
    sampled_logprobs: Tensor
    """`[S]` nats, the student's of the sampled tokens, at temperature 1."""


def compare(form: DivergenceForm, logits_TW: Tensor, teacher: TopK, *, shard: VocabShard | None = None) -> Tensor:
    """The divergence `[T]` of every row of logits; see `compare_with_statistics`."""
    value_S, *_ = _TopKDivergence.apply(  # type: ignore[no-untyped-call]
        logits_TW, _call(form, logits_TW, teacher, shard=shard)
    )
    return value_S  # type: ignore[no-any-return]


def compare_with_statistics(
    form: DivergenceForm,
    logits_TW: Tensor,
    teacher: TopK,
    *,
    sampled_token_ids: Tensor,
    rows: Tensor | None = None,
    shard: VocabShard | None = None,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Statistics]:
    """The divergence `[S]` of some rows of packed logits, and statistics of the same reading.

    Args:
        form: which divergence.
        logits_TW: `[T, W]`, of which no row is copied.
        teacher: its answers for the S rows.
        sampled_token_ids: `[S]`, the tokens that were sampled.
        rows: `[S]` distinct indices into T; None: every row, in order.
        shard: which part of the vocabulary W is; None: all of it. Every rank of its group takes the same rows.
        overwrite_logits: the backward pass writes the gradient over the logits, which nothing else may need then.

    Raises:
        ShapeError: S or K differ between the arguments.
        ValueError: a token id is not in the vocabulary.
    """
    call = _call(
        form,
        logits_TW,
        teacher,
        rows=rows,
        shard=shard,
        sampled_ids=sampled_token_ids,
        overwrite_logits=overwrite_logits,
    )
    value_S, *statistics = _TopKDivergence.apply(logits_TW, call)  # type: ignore[no-untyped-call]
    return value_S, Statistics(*statistics)


def _call(
    form: DivergenceForm,
    logits_TW: Tensor,
    teacher: TopK,
    *,
    rows: Tensor | None = None,
    shard: VocabShard | None = None,
    sampled_ids: Tensor | None = None,
    overwrite_logits: bool = False,
) -> _Call:
    num_columns = int(logits_TW.shape[1])
    vocab_size = num_columns if shard is None else shard.vocab_size
    _check(logits_TW.shape[0] if rows is None else rows.shape[0], vocab_size, teacher)
    return _Call(
        form=form,
        teacher=teacher,
        rows_S=rows,
        vocab_size=vocab_size,
        width=num_columns if shard is None else shard.width(num_columns),
        shard=shard,
        sampled_ids_S=sampled_ids,
        overwrite_logits=overwrite_logits,
    )


@dataclass(frozen=True, kw_only=True)
class _Call:
    form: DivergenceForm
    teacher: TopK
    rows_S: Tensor | None
    vocab_size: int
    width: int
    shard: VocabShard | None
    sampled_ids_S: Tensor | None
    overwrite_logits: bool

    @property
    def has_outside(self) -> bool:
        """Whether the vocabulary holds more than the top-k."""
        return self.teacher.token_ids.shape[1] < self.vocab_size

    @property
    def reads_outside(self) -> bool:
        """Whether the rest of the vocabulary has a say."""
        return self.has_outside and (self.form.tail != "renormalize" or self.sampled_ids_S is not None)

    @property
    def learns_outside(self) -> bool:
        """Whether the gradient reaches the rest of the vocabulary."""
        return self.has_outside and self.form.tail != "renormalize"

    def rows(self, logits_TW: Tensor) -> Rows:
        """The rows to read or write."""
        return Rows(logits_TW, self.rows_S, self.width)

    def targets(self, token_ids_SK: Tensor) -> Targets:
        """Where tokens lie among this rank's columns."""
        return Targets(token_ids_SK, None) if self.shard is None else self.shard.targets(token_ids_SK, self.width)


class _Reading(NamedTuple):
    """What the logits are read for, over the whole vocabulary; z = logits / temperature."""

    topk_SK: Tensor
    """z of the top-k tokens."""
    outside: ExpSums | None
    log_outside_S: Tensor
    """logsumexp of z outside the top-k; -inf where nothing is there, or nothing was read."""
    total_S: Tensor
    """logsumexp of all z that was read."""


class _TopKDivergence(torch.autograd.Function):
    """Forward keeps per-row statistics and `[S, K]`; backward reads the logits once more and writes their gradient.

    With g_e the derivative of the divergence by log q_e and G their sum, the chain rule through the softmax gives, by
    z of a token v: g_v - G q_v inside the top-k, and (g_tail - G q_tail) exp(z_v - logsumexp outside) else.
    """

    @staticmethod
    def forward(ctx: Any, logits_TW: Tensor, call: _Call) -> tuple[Tensor, ...]:
        rows = call.rows(logits_TW)
        reading = _read(call, rows)
        value_S = torch.empty_like(reading.total_S)
        inside_SK, outside_S = torch.empty_like(reading.topk_SK), torch.zeros_like(reading.total_S)
        size = _EVENT_ROWS.get(logits_TW.device.type, _EVENT_ROWS_ELSEWHERE)
        for start in range(0, rows.num_rows, size):
            block = slice(start, start + size)
            value_S[block], inside_SK[block], outside_S[block] = _compare_events(call, reading, block)
        # without a token outside, nothing is to be shifted, and 0 times what stands there must stay 0
        reference_S = reading.log_outside_S.where(reading.log_outside_S > -torch.inf, reading.total_S)
        ctx.save_for_backward(logits_TW, inside_SK, outside_S, reference_S)
        ctx.call = call
        statistics = () if call.sampled_ids_S is None else _statistics(call, rows, reading, call.sampled_ids_S)
        ctx.mark_non_differentiable(*statistics)
        return value_S, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        logits_TW, inside_SK, outside_S, reference_S = ctx.saved_tensors
        call: _Call = ctx.call
        rows, targets = call.rows(logits_TW), call.targets(call.teacher.token_ids)
        scale_S = upstream[0].to(inside_SK.dtype) / call.form.temperature
        inside_SK, outside_S = inside_SK * scale_S.unsqueeze(-1), outside_S * scale_S
        out_TW = logits_TW if call.overwrite_logits else torch.empty_like(logits_TW)
        if call.learns_outside:
            clear_others(out_TW, rows)
            _backend(logits_TW).write_outside(out_TW, rows, outside_S, reference_S, call.form.temperature)
        else:
            out_TW.zero_()
        write_targets(out_TW, rows, targets, inside_SK)
        return out_TW, None


def _read(call: _Call, rows: Rows) -> _Reading:
    temperature, targets = call.form.temperature, call.targets(call.teacher.token_ids)
    topk_SK = gather(rows, targets).div_(temperature)
    outside = None
    if call.reads_outside:
        weighted = call.sampled_ids_S is not None
        outside = _backend(rows.logits_TW).outside_sums(rows, targets, temperature, weighted=weighted)
    if call.shard is not None:
        call.shard.sum_(topk_SK)
        outside = call.shard.combine(outside) if outside is not None else None
    log_outside_S = torch.full_like(topk_SK[:, 0], -torch.inf) if outside is None else outside.log_sum
    return _Reading(topk_SK, outside, log_outside_S, finite(torch.logaddexp(topk_SK.logsumexp(-1), log_outside_S)))


def _backend(logits_TW: Tensor) -> ModuleType:
    """Where whole rows are read and written: the kernels on CUDA, torch elsewhere."""
    if not logits_TW.is_cuda:
        return torch_rows
    from trainer.losses import kernels  # Triton comes with torch's CUDA builds

    return kernels if kernels.usable(logits_TW) else torch_rows


def _compare_events(call: _Call, reading: _Reading, block: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Value, and the derivative by z inside and (before its exponential) outside the top-k."""
    form, total_S = call.form, reading.total_S[block]
    dtype = total_S.dtype
    log_p, log_q = call.teacher.logprobs[block].to(dtype), reading.topk_SK[block]
    if form.tail == "renormalize":
        log_p, total_S = log_p - finite(log_p.logsumexp(-1, keepdim=True)), finite(log_q.logsumexp(-1))
    log_q = log_q - total_S.unsqueeze(-1)
    log_q_tail = reading.log_outside_S[block] - total_S
    if form.tail == "bucket" and call.has_outside:
        given = call.teacher.log_tail_mass
        log_p_tail = (
            _derived_tail(call.teacher.logprobs[block], log_q_tail) if given is None else given[block].to(dtype)
        )
        log_p, log_q = _append(log_p, log_p_tail), _append(log_q, log_q_tail)
    value, slope = divergence_on_events(form.terms, _readable(log_p), _readable(log_q), complete=form.tail != "none")
    slope = slope.masked_fill(log_q == -torch.inf, 0.0)
    if not call.learns_outside:
        return value, _through_softmax(slope, log_q.exp()), torch.zeros_like(value)
    if form.tail == "none":
        slope, log_q = _append(slope, torch.zeros_like(value)), _append(log_q, log_q_tail)
    by_z = _through_softmax(slope, log_q.exp())
    return value, by_z[:, :-1], by_z[:, -1]


def _append(columns: Tensor, column: Tensor) -> Tensor:
    return torch.cat([columns, column.unsqueeze(-1)], -1)


def _through_softmax(slope_SE: Tensor, q_SE: Tensor) -> Tensor:
    """g_e - q_e sum(g), the q_e of a row summing to 1.

    A multiple of q may be taken from g beforehand, as the sum then takes it back. The one that leaves nothing of the
    likeliest event's g keeps both terms from cancelling where one event has nearly all the probability.
    """
    likeliest = q_SE.argmax(-1, keepdim=True)
    shift = slope_SE.gather(-1, likeliest) / q_SE.gather(-1, likeliest).clamp_min(torch.finfo(q_SE.dtype).tiny)
    slope_SE = torch.scatter(slope_SE - shift * q_SE, -1, likeliest, 0.0)
    return slope_SE - q_SE * slope_SE.sum(-1, keepdim=True)


def _derived_tail(logprobs_SK: Tensor, log_q_tail_S: Tensor) -> Tensor:
    """Log of one minus the sum; of a sum that rounds to one, only a bound is known."""
    dtype = log_q_tail_S.dtype
    resolution = max(torch.finfo(dtype).eps, torch.finfo(logprobs_SK.dtype).eps)
    rest_S = 1.0 - logprobs_SK.double().exp().sum(-1)  # in float64: this difference cancels
    within = log_q_tail_S.clamp_max(math.log(resolution))
    return torch.where(rest_S >= resolution, rest_S.clamp_min(resolution).log().to(dtype), within)


def _readable(logprobs: Tensor) -> Tensor:
    """Finite: log 0 read as the logarithm of the smallest normal number (above it, that its exponential is none)."""
    return logprobs.masked_fill(logprobs == -torch.inf, math.log(torch.finfo(logprobs.dtype).tiny) + 1e-3)


def _statistics(call: _Call, rows: Rows, reading: _Reading, sampled_ids_S: Tensor) -> Statistics:
    logprobs_SK = reading.topk_SK - reading.total_S.unsqueeze(-1)
    entropy_S = -_plogp(logprobs_SK, logprobs_SK).sum(-1)
    largest_S = reading.topk_SK.amax(-1)
    if (outside := reading.outside) is not None:
        # the mean of log q over the tokens outside
        mean_S = outside.max_S - reading.total_S + outside.weighted_mean
        entropy_S = entropy_S - _plogp(reading.log_outside_S - reading.total_S, mean_S)
        largest_S = torch.maximum(largest_S, outside.max_S)
    agreement_S = (reading.topk_SK[:, 0] >= largest_S).to(entropy_S.dtype)
    sampled_S1 = gather(rows, call.targets(sampled_ids_S.unsqueeze(-1)))
    if call.shard is not None:
        call.shard.sum_(sampled_S1)
    return Statistics(entropy_S, agreement_S, sampled_S1.squeeze(-1) - _total_at_one(call, rows, reading))


def _total_at_one(call: _Call, rows: Rows, reading: _Reading) -> Tensor:
    """logsumexp of the logits, at temperature 1."""
    if call.form.temperature == 1:
        return reading.total_S
    nothing = Targets(call.teacher.token_ids[:, :0], None)
    sums: ExpSums = _backend(rows.logits_TW).outside_sums(rows, nothing, 1.0, weighted=False)
    return (sums if call.shard is None else call.shard.combine(sums)).log_sum


def _plogp(logprobs: Tensor, logs: Tensor) -> Tensor:
    """p times logs, and 0 where p is: a token that is ruled out adds nothing."""
    return torch.where(logprobs > -torch.inf, logprobs.exp() * logs, 0.0)


def _check(num_rows: int, vocab_size: int, teacher: TopK) -> None:
    ids, logprobs, log_tail_mass = teacher
    if ids.ndim != 2 or ids.shape != logprobs.shape or ids.shape[0] != num_rows:
        raise ShapeError(
            f"topk_token_ids {list(ids.shape)} and topk_logprobs {list(logprobs.shape)} must both be [S, K], for "
            f"{num_rows} rows of student_logits"
        )
    if log_tail_mass is not None and log_tail_mass.shape != (num_rows,):
        raise ShapeError(f"log_tail_mass is {list(log_tail_mass.shape)}, not [S] = [{num_rows}]")
    if ids.numel():
        smallest, largest = torch.stack(ids.aminmax()).tolist()
        if smallest < 0 or largest >= vocab_size:
            raise ValueError(
                f"topk_token_ids spans {smallest}..{largest}, outside the student's {vocab_size} vocabulary rows; the "
                "teacher does not fit this student"
            )
