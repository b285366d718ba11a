"""The definition, spelled out: a softmax over the whole vocabulary, a list of events, plain formulas, autograd.

Everything is computed in float64, row by row. Nothing here comes from the code under test.

Legend: S rows, K top-k entries, V vocabulary rows, E events.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Divergence = Callable[..., Tensor]
"""`topk_divergence(student_logits, topk_token_ids, topk_logprobs, *, divergence, beta, ...)`."""

TAILS = ("bucket", "renormalize", "none")


class Form(NamedTuple):
    """Which divergence; `form._asdict()` are keyword arguments of the function under test."""

    divergence: str
    beta: float = 0.5
    skew_alpha: float = 0.1

    def __str__(self) -> str:
        if self.divergence == "jsd":
            return f"jsd-{self.beta}"
        return f"{self.divergence}-{self.skew_alpha}" if self.divergence.startswith("skew") else self.divergence


FORMS = (
    Form("forward_kl"),
    Form("reverse_kl"),
    Form("jsd", beta=0.1),
    Form("jsd", beta=0.5),
    Form("jsd", beta=0.9),
    Form("skew_forward_kl", skew_alpha=0.1),
    Form("skew_forward_kl", skew_alpha=0.5),
    Form("skew_reverse_kl", skew_alpha=0.1),
    Form("skew_reverse_kl", skew_alpha=0.5),
)
"""Every divergence, and unequal shares wherever two distributions are mixed: they tell which share is whose."""


class Events(NamedTuple):
    """Probabilities of events and their logarithms, kept apart: log 0 is read as a finite number."""

    p: Tensor
    log_p: Tensor
    q: Tensor
    log_q: Tensor


def reference_divergence(
    student_logits: Tensor,
    topk_token_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
    tail: str = "bucket",
    log_tail_mass: Tensor | None = None,
    arithmetic: torch.dtype = torch.float64,
) -> Tensor:
    """The divergence of each row, `[S]` float64; `arithmetic` is the type whose limits stand in for log 0."""
    form = Form(divergence, beta, skew_alpha)
    values = []
    for row in range(len(student_logits)):
        log_q_V = torch.log_softmax(student_logits[row].double() / temperature, -1)
        given = None if log_tail_mass is None else log_tail_mass[row].double()
        events = _events(
            log_q_V, topk_token_ids[row].tolist(), topk_logprobs[row].double(), given, tail=tail, arithmetic=arithmetic
        )
        values.append(divergence_of_events(events, form))
    return torch.stack(values)


def full_divergence(student_logits: Tensor, teacher_logprobs: Tensor, form: Form, temperature: float) -> Tensor:
    """The divergence `[S]` of whole distributions, each token of the vocabulary an event."""
    log_q = torch.log_softmax(student_logits.double() / temperature, -1)
    log_p = teacher_logprobs.double()
    return divergence_of_events(Events(log_p.exp(), log_p, log_q.exp(), log_q), form)


def _events(
    log_q_V: Tensor,
    token_ids: list[int],
    log_p_K: Tensor,
    log_tail_mass: Tensor | None,
    *,
    tail: str,
    arithmetic: torch.dtype,
) -> Events:
    log_p, log_q = log_p_K, log_q_V[token_ids]
    if tail == "renormalize":
        log_p, log_q = log_p - torch.logsumexp(log_p, -1), log_q - torch.logsumexp(log_q, -1)
    events = Events(log_p.exp(), _read(log_p, arithmetic), log_q.exp(), _read(log_q, arithmetic))
    rest = [token for token in range(len(log_q_V)) if token not in token_ids]
    if tail != "bucket" or not rest:
        return events

    q_tail = torch.stack([log_q_V[token].exp() for token in rest]).sum()
    possible = [log_q_V[token] for token in rest if log_q_V[token] > -torch.inf]
    log_q_tail = torch.logsumexp(torch.stack(possible), -1) if possible else torch.tensor(-torch.inf).double()
    if log_tail_mass is not None:
        p_tail, log_p_tail = log_tail_mass.exp(), _read(log_tail_mass, arithmetic)
    else:
        eps = torch.finfo(arithmetic).eps
        p_tail = 1 - torch.stack([log_p.exp() for log_p in log_p_K]).sum()
        log_p_tail = p_tail.clamp_min(eps).log()
        p_tail = torch.where(p_tail < eps, 0.0, p_tail)
    more = Events(p_tail, log_p_tail, q_tail, _read(log_q_tail, arithmetic))
    return Events(*(torch.cat([column, last.reshape(1)]) for column, last in zip(events, more, strict=True)))


def _read(logprobs: Tensor, arithmetic: torch.dtype) -> Tensor:
    """Log 0 as the logarithm of the type's smallest normal number; a constant."""
    return logprobs.masked_fill(logprobs == -torch.inf, math.log(torch.finfo(arithmetic).tiny))


def divergence_of_events(events: Events, form: Form) -> Tensor:
    """The formulas, over the last dimension."""
    p, log_p, q, log_q = events
    beta, alpha = form.beta, form.skew_alpha
    if form.divergence == "forward_kl" or (form.divergence == "jsd" and beta == 0):
        return _kl(p, log_p, log_q)
    if form.divergence == "reverse_kl" or (form.divergence == "jsd" and beta == 1):
        return _kl(q, log_q, log_p)
    if form.divergence == "jsd":
        log_m = _log_mixture(beta, log_p, log_q)
        return beta * _kl(p, log_p, log_m) + (1 - beta) * _kl(q, log_q, log_m)
    if form.divergence == "skew_forward_kl":
        return _kl(p, log_p, _log_mixture(alpha, log_p, log_q))
    if form.divergence == "skew_reverse_kl":
        return _kl(q, log_q, _log_mixture(alpha, log_q, log_p))
    raise ValueError(f"divergence={form.divergence!r} is unknown")


def _kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    return (a * (log_a - log_b)).sum(-1)


def _log_mixture(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(share a + (1 - share) b), of logarithms, as exp(-1e4) is no float."""
    if share == 0:
        return log_b
    return torch.logaddexp(math.log(share) + log_a, math.log(1 - share) + log_b)


def value_and_gradient(
    function: Callable[[Tensor], Tensor], student_logits: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`function(student_logits)` and the gradient of its sum, weighted by `upstream`."""
    logits = student_logits.detach().clone().requires_grad_()
    value = function(logits)
    weights = torch.ones_like(value) if upstream is None else upstream.to(value)
    (gradient,) = torch.autograd.grad(value, logits, weights)
    return value.detach(), gradient


def central_differences(
    function: Divergence, student_logits: Tensor, token_ids: Tensor, logprobs: Tensor, *, step: float = 1e-5
) -> Tensor:
    """The gradient `[S, V]` of each row's value by finite differences, in one call: rows are independent.

    A logit of -inf can't be moved; its entry is 0.
    """
    num_rows, vocab_size = student_logits.shape
    moved = student_logits.detach().repeat(2, vocab_size, 1, 1)  # [sign, V, S, V]
    column = torch.arange(vocab_size)
    moved[0, column, :, column] += step
    moved[1, column, :, column] -= step
    copies = 2 * vocab_size
    values = function(moved.reshape(-1, vocab_size), token_ids.repeat(copies, 1), logprobs.repeat(copies, 1))
    above, below = values.detach().reshape(2, vocab_size, num_rows)
    width = moved[0, column, :, column] - moved[1, column, :, column]  # what the step became by rounding
    return torch.where(width > 0, (above - below) / width, 0.0).T
