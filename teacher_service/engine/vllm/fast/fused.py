"""The scoring kernel's arithmetic as three Triton kernels for GPUs: whole rows of logits are read once.

The first kernel reads all logits and leaves of each block of tokens its largest logit and its sum of exponentials. The
second finds per row the K blocks with the largest maxima: a token of the top-k lies in one of them, since otherwise K
other blocks would each hold a token at least as large. It also sums what the other blocks hold. The third reads the K
blocks again, finds the exact top-k and adds the tokens beside it to the tail. The tail is thus summed by itself.

Blocks and tokens are compared as raw logits: a positive temperature changes no order. Of equal logits the one with the
lower id counts first. NaN in a row makes its results NaN.

Legend: R rows, V vocabulary rows, K top-k entries, B blocks of a row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher_service.engine.vllm.fast import kernel
from teacher_service.engine.vllm.fast.kernel import Scored

LEVELS = (16, 64, 256)
"""K is padded to one of these, so that few forms of the kernels are compiled. More entries: the torch form."""
MIN_BLOCK = 32
"""Tokens: 64 bytes in half precision, the least that memory hands over."""
TILE = 4096
"""Tokens that a program of the first kernel reads."""
TOKENS_PER_WARP = 512
"""A row's blocks or candidates lie in the registers of one program: so many values take 16 registers of a thread."""
MIN_WARPS, MAX_WARPS = 4, 16
KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}
"""Leading bits of a float32 that tell the values of a type apart. Other types, float64: the torch form."""


@triton.jit(do_not_specialize_on_alignment=["temperatures"])  # type: ignore[untyped-decorator]
def _block_sums(  # type: ignore[no-untyped-def]
    logits, stride, temperatures, max_out, sum_out, weighted_out, width, num_blocks,
    WEIGHTED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of GROUP blocks of a row: maximum, sum of exp(z - maximum) and that sum weighted by z - maximum."""
    num_groups = tl.cdiv(num_blocks, GROUP)
    row = (tl.program_id(0) // num_groups).to(tl.int64)
    block = (tl.program_id(0) % num_groups) * GROUP + tl.arange(0, GROUP)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = tl.load(logits + row * stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
    largest = tl.max(z, 1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    distance = (z - shift[:, None]) * (1.0 / tl.load(temperatures + row))
    e = tl.exp(distance)
    at = row * num_blocks + block
    tl.store(max_out + at, largest, mask=block < num_blocks)
    tl.store(sum_out + at, tl.sum(e, 1), mask=block < num_blocks)
    if WEIGHTED:
        # -inf stands for probability 0, and 0 * -inf must be 0
        weighted = tl.sum(e * tl.maximum(distance, -1e30), 1)
        tl.store(weighted_out + at, weighted, mask=block < num_blocks)


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=["temperatures"])  # type: ignore[untyped-decorator]
def _best_blocks(  # type: ignore[no-untyped-def]
    maxima, sums, weighted, temperatures, best_out, tail_out, log_sum_out, total_out, entropy_out, num_blocks, k,
    HAS_K: tl.constexpr, WEIGHTED: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Of a row: its K best blocks in order, what the others add to the tail, log total and entropy."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, SIZE)
    there = block < num_blocks
    start = row * num_blocks
    block_max = tl.load((maxima + start) + block, mask=there, other=float("-inf"))
    block_sum = tl.load((sums + start) + block, mask=there, other=0.0)
    temperature = tl.load(temperatures + row)
    largest = tl.max(block_max, 0)
    distance = tl.where(block_max == float("-inf"), 0.0, block_max - largest) * (1.0 / temperature)
    share = tl.exp(distance)
    total = tl.sum(share * block_sum, 0)
    log_sum = tl.log(total)
    tl.store(log_sum_out + row, log_sum)
    tl.store(total_out + row, tl.div_rn(largest, temperature) + log_sum)
    if WEIGHTED:
        within = tl.load((weighted + start) + block, mask=there, other=0.0)
        tl.store(entropy_out + row, log_sum - tl.sum(share * (within + block_sum * distance), 0) / total)
    rest = log_sum
    if HAS_K:
        chosen = _among_largest(tl.where(there, _keys(block_max, BITS), 0), k, BITS)
        tl.store((best_out + row * k) + (tl.cumsum(chosen.to(tl.int32), 0) - 1), block, mask=chosen)
        rest = _log_sum(tl.where(chosen, float("-inf"), block_max), block_sum, largest, temperature)
    tl.store(tail_out + row, rest - log_sum)


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=["temperatures"])  # type: ignore[untyped-decorator]
def _best_tokens(  # type: ignore[no-untyped-def]
    logits, stride, temperatures, best, log_sums, totals, ids_out, topk_out, tail_out, width, k,
    BITS: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of a row: its top-k among the tokens of its best blocks; the tail takes in the others of them."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, LEVEL)
    block = tl.load(best + row * k + entry, mask=entry < k, other=0)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = (entry < k)[:, None] & (column < width)
    z = tl.load((logits + row * stride) + column, mask=there, other=float("-inf")).to(tl.float32)
    keys = tl.reshape(tl.where(there, _keys(z, BITS), 0), (LEVEL * BLOCK,))
    z = tl.reshape(z, (LEVEL * BLOCK,))
    chosen = _among_largest(keys, k, BITS)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store((topk_out + row * k) + place, z, mask=chosen)
    tl.store((ids_out + row * k) + place, tl.arange(0, LEVEL * BLOCK), mask=chosen)
    temperature = tl.load(temperatures + row)
    tail = _log_sum(tl.where(chosen, float("-inf"), z), 1.0, tl.max(z, 0), temperature) - tl.load(log_sums + row)
    tl.store(tail_out + row, _log_add(tail, tl.load(tail_out + row)))
    # other threads wrote what is read from here on: the top-k in the order of ids, to be put likeliest first
    tl.debug_barrier()
    mine = tl.load(topk_out + row * k + entry, mask=entry < k, other=float("-inf"))
    candidate = tl.load(ids_out + row * k + entry, mask=entry < k, other=0)
    token = tl.load(best + row * k + candidate // BLOCK, mask=entry < k, other=0) * BLOCK + candidate % BLOCK
    place = tl.zeros((LEVEL,), tl.int32)
    for start in range(0, k, STEP):
        other = start + tl.arange(0, STEP)
        theirs = tl.load(topk_out + row * k + other, mask=other < k, other=float("-inf"))
        tie = (theirs[None, :] == mine[:, None]) & (other[None, :] < entry[:, None])
        before = (other < k)[None, :] & ((theirs[None, :] > mine[:, None]) | tie)
        place += tl.sum(before.to(tl.int32), 1)
    tl.debug_barrier()
    logprob = tl.div_rn(mine, temperature) - tl.load(totals + row)
    tl.store(topk_out + row * k + place, logprob, mask=entry < k)
    tl.store(ids_out + row * k + place, token, mask=entry < k)


@triton.jit  # type: ignore[untyped-decorator]
def _keys(values, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unsigned integers in the order of float32 values; that of -inf is above 0."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000) >> (32 - BITS)


@triton.jit  # type: ignore[untyped-decorator]
def _among_largest(keys, k, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether each key is among the k largest, where of equal ones the first count; exactly k are."""
    least = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << (BITS - 1), tl.uint32)
    for _ in range(BITS):  # the largest number that k keys reach, bit by bit
        reaching = tl.sum((keys >= (least | bit)).to(tl.int32), 0)
        least = tl.where(reaching >= k, least | bit, least)
        bit = bit >> 1
    above, equal = keys > least, keys == least
    places = k - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= places))


@triton.jit
def _log_sum(values, weights, reference, temperature):  # type: ignore[no-untyped-def]
    """Log of the weighted sum of exp((value - reference) / temperature), however small: -inf if all values are."""
    largest = tl.max(values, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp((values - shift) * (1.0 / temperature)) * weights, 0)
    return (shift - reference) * (1.0 / temperature) + tl.log(total)


@triton.jit
def _log_add(one, other):  # type: ignore[no-untyped-def]
    """Log of the sum of two exponentials; -inf if both are."""
    largest = tl.maximum(one, other)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return shift + tl.log(tl.exp(one - shift) + tl.exp(other - shift))


def takes(num_logprobs: int, *, vocab_rows: int) -> bool:
    """Whether the kernels are made for this K and V: at most 256 entries, and V some 32 times as large."""
    return num_logprobs <= LEVELS[-1] and _num_blocks(num_logprobs, vocab_rows) >= num_logprobs


def score_rows(logits: Tensor, num_logprobs: int, temperatures: Tensor | None, *, entropy: bool) -> Scored:
    """See `kernel.score_rows`, which does what the kernels do not take.

    That is: a K or V that `takes` refuses, float64, and logits whose tokens do not lie beside each other.
    """
    num_rows, vocab_rows = logits.shape
    bits = KEY_BITS.get(logits.dtype)
    if bits is None or logits.stride(-1) != 1 or not takes(num_logprobs, vocab_rows=vocab_rows):
        return kernel.score_rows(logits, num_logprobs, temperatures, entropy=entropy)
    if temperatures is None:
        temperatures = torch.ones(num_rows, dtype=torch.float32, device=logits.device)
    temperatures = temperatures.contiguous()
    answer = _empty(num_rows, num_logprobs, logits.device, entropy=entropy)
    best_RK, log_sum_R = torch.empty_like(answer.topk_ids), torch.empty_like(answer.log_total)
    _sum_up(logits, temperatures, best_RK, log_sum_R, answer, bits=bits)
    if num_logprobs:
        level, block = _level(num_logprobs), _block(num_logprobs, vocab_rows)
        _best_tokens[(num_rows,)](
            logits, logits.stride(0), temperatures, best_RK, log_sum_R, answer.log_total,
            answer.topk_ids, answer.topk, answer.log_tail, vocab_rows, num_logprobs,
            BITS=bits, LEVEL=level, BLOCK=block, STEP=LEVELS[0], num_warps=_warps(level * block),
        )  # fmt: skip
    return answer


def scratch_bytes(device_type: str, *, vocab_rows: int, num_logprobs: int, entropy: bool) -> int:
    """Logits, sums of their blocks and answers that are there at once, at most, for any K up to `num_logprobs`.

    As `kernel.scratch_bytes`, for the rows of which the LM head makes logits at once, of 2 or 4 bytes.
    """
    rows = {size: kernel.num_lm_head_rows(device_type, vocab_rows=vocab_rows, itemsize=size) for size in (2, 4)}
    logits = max(size * num_rows * vocab_rows for size, num_rows in rows.items())
    k = min(num_logprobs, LEVELS[-1], vocab_rows)
    num_blocks = _num_blocks(k, vocab_rows)
    # of 4 bytes: sums by block; best blocks, ids and logprobs; temperature, log sum, log total, tail and entropy
    buffers = 4 * rows[2] * ((3 if entropy else 2) * num_blocks + 3 * k + 5)
    if takes(num_logprobs, vocab_rows=vocab_rows):
        return logits + buffers
    return max(logits + buffers, kernel.scratch_bytes(device_type, vocab_rows=vocab_rows))


def _sum_up(
    logits: Tensor, temperatures: Tensor, best_RK: Tensor, log_sum_R: Tensor, answer: Scored, *, bits: int
) -> None:
    """What the first two kernels write: the best blocks, and the answer except for its top-k and their tail."""
    (num_rows, vocab_rows), k = logits.shape, best_RK.shape[1]
    block = _block(k, vocab_rows)
    num_blocks = _num_blocks(k, vocab_rows)
    group = max(1, min(TILE // block, _power_of_2(num_blocks)))
    weighted = answer.entropy is not None
    # each a tensor of its own: for views at other alignments the kernels would be compiled anew
    max_RB = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
    sum_RB = torch.empty_like(max_RB)
    # a kernel takes a pointer, also where it does not look
    weights, entropy = (torch.empty_like(max_RB), answer.entropy) if weighted else (sum_RB, log_sum_R)
    _block_sums[(num_rows * -(-num_blocks // group),)](
        logits, logits.stride(0), temperatures, max_RB, sum_RB, weights, vocab_rows, num_blocks,
        WEIGHTED=weighted, GROUP=group, BLOCK=block, num_warps=MIN_WARPS,
    )  # fmt: skip
    size = _power_of_2(num_blocks)
    _best_blocks[(num_rows,)](
        max_RB, sum_RB, weights, temperatures, best_RK, answer.log_tail, log_sum_R, answer.log_total, entropy,
        num_blocks, k, HAS_K=k > 0, WEIGHTED=weighted, BITS=bits, SIZE=size, num_warps=_warps(size),
    )  # fmt: skip


def _empty(num_rows: int, k: int, device: torch.device, *, entropy: bool) -> Scored:
    """An answer to write into."""
    floats = torch.float32
    return Scored(
        topk_ids=torch.empty((num_rows, k), dtype=torch.int32, device=device),
        topk=torch.empty((num_rows, k), dtype=floats, device=device),
        log_tail=torch.empty(num_rows, dtype=floats, device=device),
        log_total=torch.empty(num_rows, dtype=floats, device=device),
        entropy=torch.empty(num_rows, dtype=floats, device=device) if entropy else None,
    )


def _level(k: int) -> int:
    """K as the kernels are compiled for it."""
    return next(level for level in LEVELS if level >= k)


def _block(k: int, vocab_rows: int) -> int:
    """Tokens per block, about sqrt(2 V / K): a row then has half as many blocks as its best blocks have tokens.

    A block costs more than a token: its sums are written and read in float32.
    """
    exponent = math.log2(max(1.0, 2 * vocab_rows / _level(k))) / 2
    return max(MIN_BLOCK, 1 << round(exponent))


def _num_blocks(k: int, vocab_rows: int) -> int:
    return -(-vocab_rows // _block(k, vocab_rows))


def _warps(num_values: int) -> int:
    """Of a program that holds so many values."""
    return max(MIN_WARPS, min(MAX_WARPS, _power_of_2(num_values // TOKENS_PER_WARP)))


def _power_of_2(number: int) -> int:
    return int(triton.next_power_of_2(number))
