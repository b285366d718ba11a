"""Top-k, tail mass and entropy of rows of logits: exact, in blocks, without a float32 tensor of all rows.

Legend: R rows, V vocabulary rows, K top-k entries, C given tokens per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOGITS_BYTES = {"cpu": 24 << 20}
"""Logits that the LM head makes at once. On a CPU less than what its allocator takes from the kernel anew each time."""
LOGITS_BYTES_ELSEWHERE = 256 << 20
MIN_LM_HEAD_ROWS = 64
"""Fewer rows would read the LM head's weights too often."""
BLOCK_BYTES = {"cpu": 2 << 20}
"""Float32 bytes of a block of rows: what stays in a core's cache."""
BLOCK_BYTES_ELSEWHERE = 128 << 20
"""On a GPU the launches of a block take longer than its work where it is small; memory beside the model is scarce."""
SCRATCH_BLOCKS = 4
"""Of float32 logits that are there at once."""


class Scored(NamedTuple):
    """Float32 nats of the full softmax at the row's temperature."""

    topk_ids: Tensor
    """`[R, K]` int32."""
    topk: Tensor
    """`[R, K]` logprobs, likeliest first."""
    log_tail: Tensor
    """`[R]`: mass outside the top-k, summed by itself; -inf where nothing is."""
    log_total: Tensor
    """`[R]`: log of the sum of exp(logit / temperature); what turns a logit into a logprob."""
    entropy: Tensor | None
    """`[R]`; None: not computed."""


def num_lm_head_rows(device_type: str, *, vocab_rows: int, itemsize: int) -> int:
    """Rows of which the LM head should make logits at once."""
    num_bytes = LOGITS_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE)
    return max(MIN_LM_HEAD_ROWS, num_bytes // (vocab_rows * itemsize))


def scratch_bytes(device_type: str, *, vocab_rows: int) -> int:
    """Logits and blocks of them that are there at once, at most, whatever is asked."""
    rows = num_lm_head_rows(device_type, vocab_rows=vocab_rows, itemsize=4)
    block_bytes = max(4 * vocab_rows, BLOCK_BYTES.get(device_type, BLOCK_BYTES_ELSEWHERE))
    return 4 * vocab_rows * rows + SCRATCH_BLOCKS * block_bytes


def score_rows(logits: Tensor, num_logprobs: int, temperatures: Tensor | None, *, entropy: bool) -> Scored:
    """Score rows of logits, a block at a time.

    Args:
        logits: `[R, V]` of any float type, R >= 1.
        num_logprobs: K, in [0, V].
        temperatures: `[R]` float32; None: 1 for all.
        entropy: whether to compute the entropy.
    """
    num_rows, vocab_rows = logits.shape
    size = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES_ELSEWHERE) // (4 * vocab_rows)
    size = max(1, min(num_rows, size))
    buffer = torch.empty((size, vocab_rows), dtype=torch.float32, device=logits.device)
    parts = []
    for start in range(0, num_rows, size):
        block = slice(start, min(start + size, num_rows))
        z = buffer[: block.stop - block.start].copy_(logits[block])
        if temperatures is not None:
            z.div_(temperatures[block].unsqueeze(-1))
        parts.append(_score_block(z, num_logprobs, entropy=entropy))
    return concatenate(parts)


def logprobs_of(logits: Tensor, ids: Tensor, log_total: Tensor, temperatures: Tensor | None) -> Tensor:
    """Logprobs of given tokens, `[R, C]` float32, from `[R, V]` logits, `[R, C]` int64 ids and `[R]` log totals."""
    z = logits.gather(-1, ids).float()
    if temperatures is not None:
        z.div_(temperatures.unsqueeze(-1))
    return z.sub_(log_total.unsqueeze(-1))


def concatenate(parts: Sequence[Scored]) -> Scored:
    """One answer of its parts, at least one."""
    columns = {name: [getattr(one, name) for one in parts] for name in Scored._fields}
    joined = {name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
    return Scored(**joined)  # type: ignore[arg-type] # each is there or not in all parts alike


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top-k of `[R, V]`, likeliest first: of groups by their largest, then of the tokens of the k best groups.

    A token of the top-k lies in a group whose largest is at least as large, and there are at most k of those. Group i
    holds the tokens i, i + G, i + 2G, ...: their largest is then found in whole vectors.
    """
    num_rows, width = z.shape
    # both searches are as long where a group has sqrt(V / k) tokens; the second costs more, as it moves its tokens
    size = round(math.sqrt(width / k) / 2)
    if size < 2:
        return z.topk(k, dim=-1)
    num_groups = width // size
    whole = num_groups * size
    grouped = z[:, :whole].view(num_rows, size, num_groups)
    best = grouped.amax(1).topk(k, dim=-1, sorted=False).indices
    tokens = grouped.gather(2, best.unsqueeze(1).expand(-1, size, -1)).flatten(1)
    ids = (best.unsqueeze(1) + torch.arange(0, whole, num_groups, device=z.device).unsqueeze(-1)).flatten(1)
    if whole < width:
        tokens = torch.cat([tokens, z[:, whole:]], 1)
        ids = torch.cat([ids, torch.arange(whole, width, device=z.device).expand(num_rows, -1)], 1)
    values, at = tokens.topk(k, dim=-1)
    return values, ids.gather(1, at)


def _score_block(z: Tensor, k: int, *, entropy: bool) -> Scored:
    """One block, whose logits `z` are overwritten."""
    values, ids = top_k(z, k) if k else (z[:, :0], torch.empty((z.shape[0], 0), dtype=torch.int64, device=z.device))
    largest = values[:, :1] if k else z.amax(-1, keepdim=True)
    z.sub_(largest)
    mean = None
    if entropy:
        exp = z.exp()
        # -inf stands for probability 0, and 0 * -inf must be 0
        mean = torch.sum(exp * z.clamp_min_(torch.finfo(z.dtype).min), -1)
        z = exp
    else:
        z.exp_()
    # the rest is summed by itself: one minus the top-k would round a small tail away
    rest = z.scatter_(-1, ids, 0.0).sum(-1)
    total = rest + (values - largest).exp().sum(-1)
    log_sum = total.log()
    log_total = largest.squeeze(-1) + log_sum
    return Scored(
        topk_ids=ids.to(torch.int32),
        topk=values - log_total.unsqueeze(-1),
        log_tail=rest.log() - log_sum,
        log_total=log_total,
        entropy=None if mean is None else log_sum - mean / total,
    )
