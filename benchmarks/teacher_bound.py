"""What no scoring can do without, timed in vLLM's own worker: the LM head, the softmax's normaliser and a top-k.

Named as `worker_extension_cls`; it runs between the engine's steps, on its threads and with its LM head.

Legend: R rows, V vocabulary rows, K top-k entries.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teacher_service.engine.vllm.fast.kernel import top_k

BLOCK_BYTES = 2 << 20
"""Float32 logits that are normalised and searched at once: what stays in a core's cache."""
NUM_STATES = 2048
"""Hidden states that are made; they repeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One way to compute it."""

    grouped: bool
    """Whether the top-k is that of the fast route, in two stages, and not torch's."""
    in_place: bool
    """Whether the normaliser overwrites the logits, as the fast route's does, and is not torch's logsumexp."""
    logits_bytes: int
    """Logits that the LM head makes at once."""


FORMS = tuple(
    Form(grouped=grouped, in_place=in_place, logits_bytes=logits_bytes)
    for grouped, in_place in itertools.product((False, True), repeat=2)
    for logits_bytes in (8 << 20, 24 << 20, 48 << 20)
)
"""Of these the fastest counts."""


class BoundExtension:
    """Mixed into vLLM's worker class; its method is called by `collective_rpc`."""

    model_runner: Any

    def time_bound(self, num_rows: int, num_logprobs: int, form_index: int) -> float:
        """Seconds for so many rows, by one of `FORMS`."""
        config = self.model_runner.model_config
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(NUM_STATES, config.get_hidden_size(), generator=generator).to(config.dtype)
        states = states.repeat(-(-num_rows // NUM_STATES), 1)[:num_rows]
        with torch.inference_mode():
            started = time.perf_counter()
            compute(states, self.model_runner.model.compute_logits, num_logprobs, FORMS[form_index])
            return time.perf_counter() - started


def compute(
    states: Tensor, lm_head: Callable[[Tensor], Tensor], num_logprobs: int, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """Normaliser `[R]`, top-k logits `[R, K]` and their ids `[R, K]` of hidden states `[R, H]`."""
    vocab_rows = lm_head(states[:1]).shape[-1]
    num_at_once = max(1, form.logits_bytes // (vocab_rows * states.element_size()))
    size = max(1, BLOCK_BYTES // (4 * vocab_rows))
    buffer = torch.empty((size, vocab_rows))
    parts = []
    for start in range(0, states.shape[0], num_at_once):
        logits = lm_head(states[start : start + num_at_once])
        for first in range(0, logits.shape[0], size):
            block = logits[first : first + size]
            parts.append(_block(buffer[: block.shape[0]].copy_(block), num_logprobs, form))
    log_total, values, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    return log_total, values, ids


def _block(z: Tensor, k: int, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """One block, whose logits may be overwritten."""
    if k == 0:
        values, ids = z[:, :0].clone(), torch.empty((z.shape[0], 0), dtype=torch.int64)
    else:
        values, ids = top_k(z, k) if form.grouped else z.topk(k, dim=-1)
    if not form.in_place:
        return z.logsumexp(-1), values, ids
    largest = values[:, :1] if k else z.amax(-1, keepdim=True)
    return largest.squeeze(-1) + z.sub_(largest).exp_().sum(-1).log(), values, ids
