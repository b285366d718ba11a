"""In vLLM's worker: takes the place of vLLM's own prompt logprobs, on whichever runner is there."""

from __future__ import annotations

from typing import Any, TypedDict

from teacher_service.engine.vllm.extension import TeacherExtension
from teacher_service.engine.vllm.fast import forms
from teacher_service.engine.vllm.fast.scorer import RowScorer, ScoreBlock, ScoreRows, score_from_logits


class Installed(TypedDict):
    """What a worker tells of the route, as it travels to the service's process."""

    scratch_bytes: int
    """Logits and copies of them that are there at once, at most."""
    notes: list[str]
    """Slower forms taken, and why."""


class ScoringExtension(TeacherExtension):
    """Mixed into vLLM's worker class by `worker_extension_cls`; its methods are called by `collective_rpc`."""

    def install_scoring(self) -> Installed:
        """Score by this route from now on."""
        from vllm.distributed.parallel_state import get_tp_group

        runner = self.model_runner
        config, device_type = runner.model_config, runner.device.type
        vocab_rows = int(config.get_vocab_size())
        form, objection = forms.choose(
            device_type,
            widths={vocab_rows, -(-vocab_rows // get_tp_group().world_size)},
            dtype=config.head_dtype,
            num_logprobs=int(config.max_logprobs),
        )
        notes = [] if objection is None else [f"rows are scored by torch, not by the fused kernel: {objection}"]
        score_block, disagreement = _score_block(runner, form)
        if disagreement is not None:
            notes.append(f"the first rank scores the logits of all: {disagreement}")
        _install(runner, RowScorer(score_block, vocab_rows=vocab_rows))
        scratch_bytes = forms.scratch_bytes(
            form, device_type, vocab_rows=vocab_rows, num_logprobs=int(config.max_logprobs), entropy=True
        )
        return Installed(scratch_bytes=scratch_bytes, notes=notes)


def _score_block(runner: Any, form: ScoreRows) -> tuple[ScoreBlock, str | None]:
    """How this rank scores a block, and why it is not by its shard of the vocabulary where that might have been."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    gathered = score_from_logits(runner.model.compute_logits, form, answers=get_tp_group().is_first_rank)
    if get_tp_group().world_size == 1 or not get_pp_group().is_last_rank:
        return gathered, None
    from teacher_service.engine.vllm.fast.shard_check import find_disagreement
    from teacher_service.engine.vllm.fast.shards import ShardScorer

    in_shards = ShardScorer(runner.model, form)
    config, device = runner.model_config, runner.device
    reason = find_disagreement(in_shards, hidden_size=config.get_hidden_size(), dtype=config.dtype, device=device)
    if in_shards.all_succeeded(reason is None, device):  # all ranks score alike
        return in_shards, None
    return gathered, reason or "another rank can't score its shard"


def _install(runner: Any, score: RowScorer) -> None:
    if hasattr(runner, "prompt_logprobs_worker"):
        from teacher_service.engine.vllm.fast import v2

        v2.install(runner, score)
    else:
        from teacher_service.engine.vllm.fast import v1

        v1.install(runner, score)
