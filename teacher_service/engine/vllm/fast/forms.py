"""Which form of the scoring kernel a device takes: Triton's where it is right there, torch's elsewhere.

Legend: R rows, V vocabulary rows, K top-k entries.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from teacher_service.engine.vllm.fast import kernel
from teacher_service.engine.vllm.fast.kernel import logprobs_of
from teacher_service.engine.vllm.fast.scorer import ScoreRows

FUSED = "teacher_service.engine.vllm.fast.fused"
"""It imports Triton, which need not be there."""
NUM_ROWS = 5
PADDING = 64
"""Columns beside the logits, as where the LM head's rows are padded."""
SPREAD = 3.0
TOLERANCE = 1e-3
"""Nats. Both forms compute in float32; the order of their sums differs."""


def choose(
    device_type: str, *, widths: Collection[int], dtype: torch.dtype, num_logprobs: int
) -> tuple[ScoreRows, str | None]:
    """The form for a device, and why it is not Triton's where that might have been; never raises.

    Triton's form is compiled for each K up to `num_logprobs` and compared with torch's on random logits.

    Args:
        device_type: of the logits. On a CPU torch's form is the right one.
        widths: V of the logits that will come: of the whole vocabulary, and of a shard.
        dtype: of the logits.
        num_logprobs: the largest K that will come.
    """
    if device_type == "cpu":
        return kernel.score_rows, None
    for width in sorted(widths):
        reason = objection(device_type, vocab_rows=width, dtype=dtype, num_logprobs=num_logprobs)
        if reason is not None:
            return kernel.score_rows, reason
    return _fused().score_rows, None


def scratch_bytes(form: ScoreRows, device_type: str, *, vocab_rows: int, num_logprobs: int, entropy: bool) -> int:
    """What a form takes at most for any K up to `num_logprobs`, the logits of one call of the LM head included."""
    if form is kernel.score_rows:
        return kernel.scratch_bytes(device_type, vocab_rows=vocab_rows)
    return int(_fused().scratch_bytes(device_type, vocab_rows=vocab_rows, num_logprobs=num_logprobs, entropy=entropy))


def objection(device: str, *, vocab_rows: int, dtype: torch.dtype, num_logprobs: int) -> str | None:
    """Why Triton's form is of no use on a device: absent, broken or wrong. None: of use."""
    # whatever a compiler, a driver or a version raises, torch's form still scores
    try:
        fused = _fused()
    except Exception as exc:  # noqa: BLE001
        return f"Triton can't be imported ({_text(exc)})"
    try:
        for k in sorted({min(k, num_logprobs, vocab_rows) for k in (0, *fused.LEVELS)}):
            for entropy in (False, True):
                error = difference(fused.score_rows, device, vocab_rows, dtype, k, entropy=entropy)
                if not error <= TOLERANCE:
                    return (
                        f"the Triton kernel differs from torch by {error:.3g} nats at V = {vocab_rows}, K = {k}, "
                        f"{dtype}, entropy {entropy}, more than {TOLERANCE}"
                    )
    except Exception as exc:  # noqa: BLE001
        return f"the Triton kernel can't run on {device} ({_text(exc)})"
    return None


def difference(
    form: ScoreRows, device: str, vocab_rows: int, dtype: torch.dtype, num_logprobs: int, *, entropy: bool
) -> float:
    """Nats by which a form's answer for random rows differs from torch's, at most; infinite if ids are wrong.

    Some tokens are ruled out, and the rows have a stride and what must not be read beside them.
    """
    generator = torch.Generator(device).manual_seed(0)
    padded = SPREAD * torch.randn(NUM_ROWS, vocab_rows + PADDING, generator=generator, device=device)
    padded[:, vocab_rows:] = 1e4
    padded[0, : vocab_rows // 2] = -torch.inf
    logits = padded.to(dtype)[:, :vocab_rows]
    temperatures = torch.linspace(0.5, 2, NUM_ROWS, device=device)
    found = form(logits, num_logprobs, temperatures, entropy=entropy)
    expected = kernel.score_rows(logits, num_logprobs, temperatures, entropy=entropy)
    ids = found.topk_ids.long()
    ordered = ids.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()) or bool(((ids < 0) | (ids >= vocab_rows)).any()):
        return torch.inf
    # of equal logits each form may take others: an id is right if its logit is
    pairs = [(logprobs_of(logits, ids, expected.log_total, temperatures), expected.topk)]
    names = ("topk", "log_tail", "log_total", *(["entropy"] if entropy else []))
    pairs += [(getattr(found, name), getattr(expected, name)) for name in names]
    return max(_largest_error(one, other) for one, other in pairs)


def _largest_error(found: Tensor, expected: Tensor) -> float:
    """Infinite where one is not a number; equal infinities agree."""
    if not found.numel():
        return 0.0
    error = torch.where(found == expected, 0.0, (found - expected).abs())
    return float(error.nan_to_num(nan=torch.inf).max())


def _fused() -> Any:
    return importlib.import_module(FUSED)


def _text(exc: Exception) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:500]
