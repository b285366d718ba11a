"""The fused scoring kernel, run beside the torch form or compiled for a GPU that need not be there.

Usage: fused_check.py run DEVICE; with TRITON_INTERPRET=1 in the environment the kernels run on a CPU.
       fused_check.py compile CAPABILITY, 80 or 90; without that variable.
       fused_check.py price DEVICE; likewise: nothing is computed there.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from teacher_service.engine.vllm.fast import forms, kernel
from teacher_service.engine.vllm.fast.kernel import Scored, logprobs_of

V, PADDING = 8203, 53
"""The last block is short, whatever its size."""
CASES = tuple(
    (dtype, k, own_temperatures, entropy)
    for dtype, k, (own_temperatures, entropy) in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), (0, 1, 3, 64, 256), ((False, False), (True, True))
    )
)
NUM_CASES = len(CASES)
GPU_VOCAB_ROWS = 151936
COMPILED = (
    *itertools.product((torch.bfloat16,), (0, 1, 64, 256), (False, True)),
    *itertools.product((torch.float16, torch.float32), (64,), (False, True)),
)
NUM_KERNELS = {"_block_sums": 6 + 2 * 2, "_best_blocks": 8 + 2 * 2, "_best_tokens": 3 + 2 * 1}
"""Different ones among `COMPILED`: of K = 0 and K = 1 the first kernel is one."""
PRICED = tuple(
    itertools.product((32, 1003, V, 32000, GPU_VOCAB_ROWS, 262144), (0, 1, 16, 17, 64, 255, 256), (False, True))
)


def main() -> None:
    """Exit status 1, with the first difference, unless all is right."""
    what, where = sys.argv[1:]
    if what == "compile":
        print(compile_for(int(where)))  # noqa: T201
        return
    if what == "price":
        print(f"{check_prices(where)} prices hold")  # noqa: T201
        return
    for dtype, k, own_temperatures, entropy in CASES:
        logits = make_rows(dtype).to(where)
        temperatures = torch.linspace(0.5, 2, len(logits), device=where) if own_temperatures else None
        check(logits, k, temperatures, entropy=entropy)
    for extra in (check_far_tail, check_nan, check_long_stride, check_what_is_not_taken, check_choice):
        extra(where)
    print(f"{NUM_CASES} cases agree")  # noqa: T201


def make_rows(dtype: torch.dtype) -> Tensor:
    """`[10, V]`, a slice of rows that hold garbage beside it."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(10, V + PADDING, generator=generator)
    logits[1, 32:3000] = -torch.inf  # whole blocks
    logits[2, 5:] = -torch.inf  # fewer tokens than K
    logits[3] = torch.randint(0, 4, (V + PADDING,), generator=generator)
    logits[4] = 1.0
    logits[5, 512:768] += 30.0  # all of the top-k in a few blocks
    logits[6, V - 5 : V] += 30.0  # in the last, short one
    logits[7] = -20.0
    logits[7, 77] = 16.0  # a tail of 1e-12
    logits[8, : V - 1] = -torch.inf
    logits[9] = 1 + 2**-23 * torch.arange(V + PADDING)  # each the next float32 after the one before
    logits[:, V:] = 1e4
    return logits.to(dtype)[:, :V]


def check(logits: Tensor, k: int, temperatures: Tensor | None, *, entropy: bool) -> None:
    """Against the torch form, and against a stable sort and a float64 softmax of all tokens."""
    from teacher_service.engine.vllm.fast import fused

    assert fused.takes(k, vocab_rows=V)
    found = fused.score_rows(logits, k, temperatures, entropy=entropy)
    expected = kernel.score_rows(logits, k, temperatures, entropy=entropy)
    close = {"rtol": 1e-6, "atol": 2e-5}
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, **close)
    # of equal logits the one with the lower id counts first
    ids = logits.float().sort(stable=True, dim=-1, descending=True).indices[:, :k]
    assert torch.equal(found.topk_ids, ids.int())
    assert torch.equal(found.topk, logprobs_of(logits, ids, found.log_total, temperatures))
    z = logits.double() if temperatures is None else logits.double() / temperatures.double().unsqueeze(-1)
    full = z.log_softmax(-1)
    close["check_dtype"] = False
    torch.testing.assert_close(found.topk, full.gather(-1, ids), **close)
    torch.testing.assert_close(found.log_tail, full.scatter(-1, ids, -torch.inf).logsumexp(-1), **close)
    if found.entropy is not None:
        plogp = torch.where(full == -torch.inf, 0.0, full.exp() * full)
        torch.testing.assert_close(found.entropy, -plogp.sum(-1), **close)


def check_far_tail(device: str) -> None:
    """Where float32 has no number for the tail's mass, its logarithm is right all the same."""
    from teacher_service.engine.vllm.fast import fused

    logits = torch.full((2, V), -300.0, device=device)
    logits[0, 5], logits[1, :2] = 0.0, 0.0
    found = fused.score_rows(logits, 1, None, entropy=False)
    expected = torch.tensor([math.log(V - 1) - 300.0, -math.log(2.0)], device=device)
    torch.testing.assert_close(found.log_tail, expected)


def check_nan(device: str) -> None:
    """NaN among the logits is not hidden, and stays in its row."""
    from teacher_service.engine.vllm.fast import fused

    logits = make_rows(torch.float32).to(device)
    logits[0, 3001] = torch.nan
    found = fused.score_rows(logits, 3, None, entropy=True)
    for one in found[1:]:
        assert one[0].isnan().all()
        assert not one[1:].isnan().any()


def check_long_stride(device: str) -> None:
    """A row may begin beyond what 32 bits count."""
    if device != "cpu":
        return  # there the memory would be taken; here no page is touched
    stride = 2**29 + 64
    memory = torch.empty(4 * stride + V, dtype=torch.float16)
    logits = memory.as_strided((5, V), (stride, 1))
    logits.copy_(make_rows(torch.float16)[:5])
    check(logits, 3, None, entropy=True)


def check_what_is_not_taken(device: str) -> None:
    """More entries, few tokens, float64 and transposed logits: by the torch form."""
    from teacher_service.engine.vllm.fast import fused

    logits = make_rows(torch.float32).to(device)[:2]
    cases: tuple[tuple[Tensor, int], ...] = (
        (logits, 257),
        (logits, V),
        (logits[:, :128], 5),
        (logits.double(), 3),
        (logits.t().contiguous().t(), 3),
    )
    for rows, k in cases:
        found = fused.score_rows(rows, k, None, entropy=True)
        for one, other in zip(found, kernel.score_rows(rows, k, None, entropy=True), strict=True):
            assert one is not None
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def check_choice(device: str) -> None:
    """What is compared with torch once: the right kernel passes, others are named with what is wrong."""
    from teacher_service.engine.vllm.fast import fused

    given: dict[str, Any] = {"vocab_rows": V, "dtype": torch.bfloat16, "num_logprobs": 64}
    assert forms.objection(device, **given) is None
    right = fused.score_rows

    def shifted(*args: Any, **kwargs: Any) -> Scored:
        scored = right(*args, **kwargs)
        return scored._replace(log_tail=scored.log_tail + 2e-3)

    def repeated(*args: Any, **kwargs: Any) -> Scored:
        scored = right(*args, **kwargs)
        return scored._replace(topk_ids=scored.topk_ids[:, :1].expand_as(scored.topk_ids))

    def broken(*_args: Any, **_kwargs: Any) -> Scored:
        raise AssertionError("no such\ninstruction")

    for form, words in ((shifted, "differs from torch by 0.002"), (repeated, "by inf"), (broken, "no such instr")):
        fused.score_rows = form
        assert words in str(forms.objection(device, **given))
    fused.score_rows = right


def compile_for(capability: int) -> dict[str, int]:
    """How many forms of each kernel were compiled, from the arguments that the scoring itself passes."""
    import triton
    from triton.backends.compiler import GPUTarget

    from teacher_service.engine.vllm.fast import fused

    compiled: dict[str, tuple[str, bytes]] = {}
    run = triton.JITFunction.run

    def warm_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = run(self, *args, **(kwargs | {"warmup": True}))
        compiled[made.hash] = (self.fn.__name__, made.asm["cubin"])
        return made

    triton.JITFunction.run = warm_up
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _device: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
    )
    for dtype, k, entropy in COMPILED:
        fused.score_rows(torch.empty((2, GPU_VOCAB_ROWS), dtype=dtype), k, None, entropy=entropy)
    assert all(binary.startswith(b"\x7fELF") for _, binary in compiled.values())
    return dict(Counter(name for name, _ in compiled.values()))


def check_prices(device_type: str) -> int:
    """What is allocated for the rows of a call of the LM head stays within the bound."""
    import triton

    from teacher_service.engine.vllm.fast import fused

    triton.JITFunction.run = lambda *_args, **_kwargs: None
    num_priced = 0
    for (vocab_rows, k, entropy), dtype in itertools.product(PRICED, (torch.bfloat16, torch.float32)):
        if not fused.takes(k, vocab_rows=vocab_rows):
            continue
        num_rows = kernel.num_lm_head_rows(device_type, vocab_rows=vocab_rows, itemsize=dtype.itemsize)
        logits = torch.empty((num_rows, vocab_rows), dtype=dtype)
        with _Allocations() as made:
            fused.score_rows(logits, k, None, entropy=entropy)
        bounds = [
            forms.scratch_bytes(
                fused.score_rows, device_type, vocab_rows=vocab_rows, num_logprobs=most, entropy=entropy
            )
            for most in (k, k + 1, 256, 300)
        ]
        assert logits.nbytes + made.num_bytes <= min(bounds)
        by_torch = kernel.scratch_bytes(device_type, vocab_rows=vocab_rows)
        assert vocab_rows < 1003 or made.num_bytes < (by_torch - logits.nbytes) / 2
        num_priced += 1
    return num_priced


class _Allocations(TorchDispatchMode):
    num_bytes = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.num_bytes += made.nbytes
        return made


if __name__ == "__main__":
    main()
