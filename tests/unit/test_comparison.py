"""Logits compared where they lie: some rows of packed ones, with statistics, in place, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.losses import DivergenceForm, TopK, compare_with_statistics, rows, topk_divergence

T, V, K = 11, 29, 4
ROWS = torch.tensor([9, 2, 3, 7])


@pytest.fixture(params=[1, 64, 1 << 20])
def _block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one row, of two, and of all."""
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", request.param)


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, TopK, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(T, V, generator=generator, dtype=torch.float64)).to(dtype)
    teacher = torch.log_softmax(3 * torch.randn(len(ROWS), V, generator=generator, dtype=torch.float64), -1)
    logprobs, ids = teacher.topk(K, -1)
    return logits, TopK(ids.int(), logprobs), torch.randint(0, V, (len(ROWS),), generator=generator)


def _compare(
    logits: Tensor, teacher: TopK, sampled: Tensor, *, overwrite: bool = False, **options: object
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Value, gradient by the logits, statistics."""
    leaf = logits.clone().requires_grad_()
    value, statistics = compare_with_statistics(
        DivergenceForm(**options),  # type: ignore[arg-type]
        leaf * 1.0,
        teacher,
        rows=ROWS,
        sampled_token_ids=sampled,
        overwrite_logits=overwrite,
    )
    (gradient,) = torch.autograd.grad((value * torch.arange(1.0, len(ROWS) + 1)).sum(), leaf)
    return value.detach(), gradient, statistics


@pytest.mark.usefixtures("_block_elements")
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_of_packed_logits_equal_their_copy(tail: str, overwrite: bool) -> None:
    """Rows are read and their gradient is written where they lie, others get 0; also over the logits themselves."""
    logits, teacher, sampled = _inputs()
    value, gradient, _ = _compare(logits, teacher, sampled, overwrite=overwrite, divergence="jsd", tail=tail)
    copy = logits[ROWS].clone().requires_grad_()
    expected = topk_divergence(copy, teacher.token_ids, teacher.logprobs, divergence="jsd", tail=tail)  # type: ignore[arg-type]
    (copy_gradient,) = torch.autograd.grad((expected * torch.arange(1.0, len(ROWS) + 1)).sum(), copy)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        gradient, torch.zeros_like(logits).index_copy(0, ROWS, copy_gradient), rtol=1e-12, atol=1e-14
    )


@pytest.mark.usefixtures("_block_elements")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_statistics_are_those_of_the_full_distribution(temperature: float, tail: str) -> None:
    """Entropy at the divergence's temperature, sampled logprobs at 1, agreement of the likeliest tokens."""
    logits, teacher, sampled = _inputs()
    logits[ROWS[0], teacher.token_ids[0, 0]] = 50.0  # agrees
    logits[ROWS[1], (teacher.token_ids[1, 0] + 1) % V] = 50.0  # does not
    logits[ROWS[2], 5] = -torch.inf  # ruled out: adds nothing to the entropy
    _, _, statistics = _compare(logits, teacher, sampled, temperature=temperature, tail=tail)
    full = torch.distributions.Categorical(logits=logits[ROWS].clamp_min(-1e30) / temperature)
    torch.testing.assert_close(statistics.entropy, full.entropy(), rtol=1e-9, atol=1e-12)  # type: ignore[attr-defined]
    logprobs = torch.log_softmax(logits[ROWS], -1).gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(statistics.sampled_logprobs, logprobs, rtol=1e-9, atol=1e-12)  # type: ignore[attr-defined]
    expected = (logits[ROWS].argmax(-1) == teacher.token_ids[:, 0]).double()
    assert statistics.top1_agreement.tolist() == expected.tolist()  # type: ignore[attr-defined]
    assert statistics.top1_agreement.tolist()[:2] == [1.0, 0.0]  # type: ignore[attr-defined]


def test_overwritten_logits_hold_their_gradient() -> None:
    """With leave to, no second tensor of the logits' size is made: the gradient lies where the logits lay."""
    logits, teacher, sampled = _inputs(torch.bfloat16)
    leaf = logits.requires_grad_()
    packed = leaf * 1.0
    value, _ = compare_with_statistics(
        DivergenceForm(), packed, teacher, rows=ROWS, sampled_token_ids=sampled, overwrite_logits=True
    )
    seen: list[Tensor] = []
    packed.register_hook(seen.append)
    value.sum().backward()
    assert seen[0].data_ptr() == packed.data_ptr()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_a_row_of_ruled_out_tokens_outside_the_top_k_is_finite() -> None:
    """Everything outside the top-k at -inf leaves no NaN: value, gradient and statistics stay finite."""
    logits, teacher, sampled = _inputs()
    outside = torch.ones(V, dtype=torch.bool)
    outside[teacher.token_ids[0].long()] = False
    logits[ROWS[0], outside] = -torch.inf
    sampled[0] = int(teacher.token_ids[0, 0])
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        for tail in ("bucket", "renormalize", "none"):
            value, gradient, statistics = _compare(logits, teacher, sampled, divergence=divergence, tail=tail)
            assert all(bool(torch.isfinite(one).all()) for one in (value, gradient, *statistics))
            assert float(gradient[ROWS[0], outside].abs().max()) == 0
