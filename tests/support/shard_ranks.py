"""One tensor-parallel rank of vLLM: its own LM head, logits processor and communicator, under the scorer of shards.

Usage: shard_ranks.py OUTPUT, with RANK, WORLD_SIZE and DIST_INIT_METHOD in the environment. The first rank writes what
it found, by case; `Found` says what that is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

H, R, K = 16, 6, 64
CASES = {"in shards of 152k": 151_936, "padded": 1003, "padding alone": 40}
"""Vocabulary rows."""
DTYPE = torch.float32
UNLIKELY = -30.0
"""Most logits of a large vocabulary. About 500 tokens share the probability, so that their logprobs are above -8, where
float32 is finer than 5e-7."""


class Found(TypedDict):
    """Of one case."""

    error: float
    """Largest difference from the single form in top-k, tail, total, entropy and given tokens."""
    wrong_ids: int
    """Entries whose value is not that of their token, and tokens that stand twice."""
    is_sharded: bool
    """Whether each rank's logits were its own part alone."""
    sent_bytes: int
    """Of one rank, per row."""
    logit_bytes: int
    """Of all logits, per row."""
    reasons: dict[str, list[str | None]]
    """Of the check at start on every rank, by what was broken; in one case only."""


class Teacher(nn.Module):
    """The end of a model: what changes its logits afterwards is a case of the check."""

    def __init__(self, vocab_rows: int, *, soft_cap: float | None = None) -> None:
        super().__init__()
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.lm_head = ParallelLMHead(vocab_rows, H, params_dtype=DTYPE)
        self.logits_processor = LogitsProcessor(vocab_rows, soft_cap=soft_cap)
        self.weight = torch.randn((vocab_rows, H), generator=torch.Generator().manual_seed(7)).mul_(0.03)
        self.weight[:, 0] = UNLIKELY
        self.weight[:: likely_every(vocab_rows), 0] = 0
        self.lm_head.weight_loader(self.lm_head.weight, self.weight)
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)
        self.afterwards: Callable[[Tensor], Tensor] = lambda logits: logits

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """As vLLM's models do."""
        logits = self.logits_processor(self.lm_head, hidden)
        return None if logits is None else self.afterwards(logits)


@dataclass
class CountingGroup:
    """vLLM's group of ranks, with a record of what is sent through it."""

    group: Any
    sent: list[Tensor] = field(default_factory=list)

    def all_gather(self, sent: Tensor, dim: int) -> Tensor:
        """As the group does."""
        self.sent.append(sent)
        gathered: Tensor = self.group.all_gather(sent, dim)
        return gathered

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)


def likely_every(vocab_rows: int) -> int:
    """Likely are the multiples of this."""
    return max(1, vocab_rows // 500)


def main() -> None:
    (output,) = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["VLLM_DIST_IDENT"] = Path(output).parent.name
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        parallel_state.init_distributed_environment(
            world_size, rank, os.environ["DIST_INIT_METHOD"], local_rank=rank, backend="gloo"
        )
        parallel_state.initialize_model_parallel(world_size, backend="gloo")
        found = {name: find(vocab_rows) for name, vocab_rows in CASES.items()}
    if rank == 0:
        torch.save(found, output)
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def find(vocab_rows: int) -> Found:
    """One case, on this rank; only the first rank's is complete."""
    from teacher_service.engine.vllm.fast.kernel import score_rows
    from teacher_service.engine.vllm.fast.scorer import Asked
    from teacher_service.engine.vllm.fast.shards import ShardScorer

    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn((R, H), generator=generator)
    hidden[:, 0] = 1
    step = likely_every(vocab_rows)
    sampled = step * torch.randint(0, vocab_rows // step, (R, 1), generator=generator)
    candidates = step * torch.randint(0, vocab_rows // step, (2, 3), generator=generator)
    temperatures = torch.linspace(0.5, 2, R)
    # without the candidates of two rows, so that the bytes are those of every row
    plain = Asked(min(K, vocab_rows), temperatures, True, [(slice(0, R), sampled)])
    asked = plain._replace(given=[*plain.given, (slice(1, 3), candidates)])
    teacher = Teacher(vocab_rows, soft_cap=30.0)
    scorer = ShardScorer(teacher, score_rows)
    counted = CountingGroup(scorer._group)
    scorer._group = counted
    logits, shards = scorer.local_logits(hidden)
    scorer(hidden, plain)
    (sent,) = counted.sent
    scored = scorer(hidden, asked)
    error, wrong_ids = float("nan"), -1
    if scored is not None:
        whole = teacher.weight
        expected_logits = 30 * torch.tanh(hidden @ whole.T / 30)
        error, wrong_ids = _compare(*scored, expected_logits, asked)
    return Found(
        error=error,
        wrong_ids=wrong_ids,
        is_sharded=logits.shape[-1] == shards[scorer._group.rank_in_group].num_tokens
        and max(one.num_tokens for one in shards) < vocab_rows,
        sent_bytes=sent.numel() * sent.element_size() // R,
        logit_bytes=vocab_rows * logits.element_size(),
        reasons=reasons(vocab_rows, scorer._group) if vocab_rows == CASES["padded"] else {},
    )


def _compare(scored: Any, given: list[Tensor], logits: Tensor, asked: Any) -> tuple[float, int]:
    from teacher_service.engine.vllm.fast.kernel import logprobs_of, score_rows

    expected = score_rows(logits, asked.num_logprobs, asked.temperatures, entropy=True)
    pairs = [(getattr(scored, name), getattr(expected, name)) for name in ("topk", "log_tail", "log_total", "entropy")]
    for part, (rows, ids) in zip(given, asked.given, strict=True):
        pairs.append((part, logprobs_of(logits[rows], ids, expected.log_total[rows], asked.temperatures[rows])))
    own = logprobs_of(logits, scored.topk_ids.long(), expected.log_total, asked.temperatures)
    wrong = int(((own - scored.topk).abs() > 1e-6).sum())
    twice = sum(len(row) - len(set(row)) for row in scored.topk_ids.tolist())
    return max(
        float(torch.nan_to_num(a - b, nan=0.0 if a.equal(b) else 1e9).abs().max()) for a, b in pairs
    ), wrong + twice


def reasons(vocab_rows: int, group: Any) -> dict[str, list[str | None]]:
    """What the check at start says on each rank of sound models and of others."""
    from teacher_service.engine.vllm.fast.kernel import score_rows
    from teacher_service.engine.vllm.fast.shard_check import find_disagreement
    from teacher_service.engine.vllm.fast.shards import ShardScorer

    def rule_out(logits: Tensor) -> Tensor:
        """As some models do: by absolute ids, one of each rank's columns at least."""
        return logits.index_fill(1, torch.tensor([3, vocab_rows // 2, vocab_rows - 1]), -torch.inf)

    def normalise(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)

    def fail_on_last(logits: Tensor, k: int, temperatures: Tensor | None, *, entropy: bool) -> Any:
        if group.rank_in_group == group.world_size - 1:
            raise RuntimeError("out of memory, said the last rank")
        return score_rows(logits, k, temperatures, entropy=entropy)

    cases: dict[str, tuple[Callable[[Tensor], Tensor] | None, Any]] = {
        "sound": (None, score_rows),
        "ids ruled out": (rule_out, score_rows),
        "logits of other tokens": (lambda logits: logits.flip(-1), score_rows),
        "normalised": (normalise, score_rows),
        "one rank fails": (None, fail_on_last),
    }
    said: dict[str, list[str | None]] = {}
    for name, (afterwards, score) in cases.items():
        teacher = Teacher(vocab_rows)
        if afterwards is not None:
            teacher.afterwards = afterwards
        reason = find_disagreement(ShardScorer(teacher, score), hidden_size=H, dtype=DTYPE, device=torch.device("cpu"))
        everyone: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(everyone, reason, group=group.cpu_group)
        said[name] = everyone
    return said


if __name__ == "__main__":
    main()
