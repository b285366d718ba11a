"""Compares the loss by the Triton kernels with the loss by torch, on one device.

Usage: kernel_check.py DEVICE; with TRITON_INTERPRET=1 in the environment the kernels run on a CPU.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from trainer.losses import DivergenceForm, Statistics, TopK, comparison
from trainer.losses import rows as torch_rows

T, V = 7, 301
ROWS = torch.tensor([5, 0, 3])
CASES = tuple(
    itertools.product(
        (("forward_kl", "bucket"), ("reverse_kl", "none"), ("jsd", "bucket"), ("skew_reverse_kl", "renormalize")),
        (torch.float32, torch.float16, torch.bfloat16),
        (1, 5, 64),
        (1.0, 0.7),
        (False, True),
    )
)
NUM_CASES = len(CASES)


def main() -> None:
    """Exit status 1, with the first difference, unless all cases agree."""
    from trainer.losses import kernels

    (device,) = sys.argv[1:]
    kernels.BLOCK, kernels.NUM_WARPS = 64, 4  # several blocks to a row
    for (divergence, tail), dtype, k, temperature, overwrite in CASES:
        form = DivergenceForm(divergence=divergence, tail=tail, temperature=temperature, beta=0.3)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(k)
        logits = 3 * torch.randn(T, V, generator=generator)
        logits[0, 17:40] = -torch.inf
        teacher = torch.log_softmax(3 * torch.randn(len(ROWS), V, generator=generator), -1).topk(k, -1)
        inputs = (
            logits.to(device, dtype),
            TopK(teacher.indices.int().to(device), teacher.values.to(device)),
            torch.randint(50, V, (len(ROWS),), generator=generator).to(device),
        )
        found = _run(kernels, form, *inputs, overwrite=overwrite)
        expected = _run(torch_rows, form, *inputs, overwrite=overwrite)
        # the sums' order differs; a gradient is rounded to the logits' type
        for one, other in zip(found, expected, strict=True):
            coarse = 1e-2 if one.dtype == torch.bfloat16 else 2e-3 if one.dtype == torch.float16 else 2e-5
            torch.testing.assert_close(one, other, rtol=coarse, atol=2e-6)
    print(f"{NUM_CASES} cases agree")  # noqa: T201


def _run(
    backend: object, form: DivergenceForm, logits: Tensor, teacher: TopK, sampled: Tensor, *, overwrite: bool
) -> tuple[Tensor, ...]:
    comparison._backend = lambda _logits: backend  # type: ignore[assignment,return-value]
    leaf = logits.clone().requires_grad_()
    packed = leaf * 1.0
    before = packed.detach().clone()
    statistics: Statistics
    value, statistics = comparison.compare_with_statistics(
        form,
        packed,
        teacher,
        rows=ROWS.to(logits.device),
        sampled_token_ids=sampled,
        overwrite_logits=overwrite,
    )
    assert torch.equal(packed.detach(), before), "the forward pass left its mark on the logits"
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient, *statistics


if __name__ == "__main__":
    main()
