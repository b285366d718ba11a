"""The fast route's arithmetic against a float64 log_softmax of the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teacher_service.engine.vllm.fast import kernel
from teacher_service.engine.vllm.fast.kernel import logprobs_of, score_rows, top_k

R, V = 7, 1003


def _logits(scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(R, V, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("block_bytes", [1, 3 * 4 * V, 1 << 20])
@pytest.mark.parametrize("k", [0, 1, 3, 64, V])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_full_log_softmax(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, k: int, dtype: torch.dtype
) -> None:
    """Whatever the blocks: top-k, tail, entropy and given tokens, each row at its own temperature."""
    monkeypatch.setitem(kernel.BLOCK_BYTES, "cpu", block_bytes)
    logits, temperatures = _logits(3, dtype), torch.linspace(0.5, 2, R)
    found = score_rows(logits, k, temperatures, entropy=True)
    full = torch.log_softmax(logits.double() / temperatures.double().unsqueeze(-1), -1)
    close = {"rtol": 0, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(found.topk, full.topk(k, -1).values, **close)
    torch.testing.assert_close(found.topk, full.gather(-1, found.topk_ids.long()), **close)
    rest = full.scatter(-1, found.topk_ids.long(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found.log_tail, rest, **close)
    torch.testing.assert_close(found.entropy, -(full.exp() * full).sum(-1), **close)
    given = torch.randint(0, V, (R, 4), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        logprobs_of(logits, given, found.log_total, temperatures), full.gather(-1, given), **close
    )


def test_a_tiny_tail_is_not_rounded_away() -> None:
    """A tail of 1e-12 is summed by itself; one minus the top-k would say 0 or 1e-7."""
    logits = torch.full((1, V), -20.0)
    logits[0, 5] = 14.0
    expected = torch.log_softmax(logits.double(), -1)[0, torch.arange(V) != 5].logsumexp(-1)
    assert float(score_rows(logits, 1, None, entropy=False).log_tail) == pytest.approx(float(expected), abs=1e-4)


def test_ruled_out_tokens_leave_no_nan() -> None:
    """Logits of -inf have probability 0 and add nothing to the entropy."""
    logits = torch.full((1, V), -torch.inf)
    logits[0, :3] = torch.tensor([0.0, 1.0, 2.0])
    found = score_rows(logits, 3, None, entropy=True)
    assert float(found.log_tail) == -torch.inf
    p = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), -1)
    assert found.entropy is not None
    assert float(found.entropy) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-6)


@pytest.mark.parametrize(("width", "k"), [(64 * 40, 3), (64 * 40 + 17, 5), (64 * 300, 64), (63, 2), (64 * 5, 64)])
def test_two_stage_top_k_is_exact(width: int, k: int) -> None:
    """The values are torch's own, also with ties and with the best tokens all in one group."""
    generator = torch.Generator().manual_seed(width)
    z = torch.randint(0, 50, (R, width), generator=generator).float()
    z[0, :64] = 100.0
    z[1, -min(64, width) :] = 100.0
    values, ids = top_k(z, k)
    assert torch.equal(values, z.topk(k, -1).values)
    assert torch.equal(z.gather(-1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())
