"""One rank of four, over which the vocabulary is split as Megatron splits it: two by two, then over all.

Usage: vocabulary_ranks.py OUTPUT, with RANK, WORLD_SIZE and DIST_INIT_METHOD in the environment. Every rank checks its
part; rank 0 writes the largest relative errors against the dense form, by case.
"""

from __future__ import annotations

import itertools
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.losses import DIVERGENCES, TAILS
from trainer.verl_adapter.cpu.environment import set_environment

S, K, V, COLUMNS = 9, 6, 37, 40
"""V tokens exist; the ranks hold COLUMNS, the last three of which are padding."""
SPLITS, TEMPERATURE = (2, 4), 0.7
Errors = dict[str, float]


def main() -> None:
    (output,) = sys.argv[1:]
    set_environment()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["DIST_INIT_METHOD"], rank=rank, world_size=world_size)
    from megatron.core import parallel_state

    errors: Errors = {}
    for size in SPLITS:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        part = parallel_state.get_tensor_model_parallel_rank()
        found = _compare_forms(part, size, parallel_state.get_tensor_model_parallel_group())
        found |= _compare_megatron_path(part, size)
        found |= _compare_sequence_parallel(part, size, parallel_state.get_tensor_model_parallel_group())
        errors |= {f"{size}/{name}": error for name, error in found.items()}
        parallel_state.destroy_model_parallel()
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, errors)
    if rank == 0:
        torch.save({name: max(one[name] for one in everyone) for name in errors}, Path(output))
    dist.destroy_process_group()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def _compare_forms(rank: int, world_size: int, group: dist.ProcessGroup) -> Errors:
    """Value, gradient and statistics of every divergence and tail, in float64."""
    from trainer.losses import DivergenceForm, TopK, VocabShard, compare_with_statistics

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(S, COLUMNS, generator=generator, dtype=torch.float64)
    teacher = torch.log_softmax(3 * torch.randn(S, V, generator=generator, dtype=torch.float64), -1)
    logprobs, ids = teacher.topk(K, -1)
    sampled = torch.randint(0, V, (S,), generator=generator)
    rows = torch.tensor([7, 0, 3, 8])
    width = COLUMNS // world_size
    mine = slice(rank * width, (rank + 1) * width)
    shard = VocabShard(start=rank * width, vocab_size=V, group=group)
    errors: Errors = {}
    for divergence, tail, temperature in itertools.product(DIVERGENCES, TAILS, (1.0, 2.0)):
        form = DivergenceForm(divergence=divergence, beta=0.3, skew_alpha=0.2, temperature=temperature, tail=tail)
        top = TopK(ids[rows], logprobs[rows])
        weights = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
        dense = logits[:, :V].clone().requires_grad_()
        value, statistics = compare_with_statistics(form, dense, top, rows=rows, sampled_token_ids=sampled[rows])
        (value * weights).sum().backward()
        part = logits[:, mine].clone().requires_grad_()
        found, found_statistics = compare_with_statistics(
            form, part, top, rows=rows, sampled_token_ids=sampled[rows], shard=shard
        )
        (found * weights).sum().backward()
        name = f"{divergence}/{tail}/{temperature}"
        errors[f"{name}/value"] = _relative(found, value)
        expected = torch.nn.functional.pad(dense.grad, (0, COLUMNS - V))[:, mine]
        errors[f"{name}/gradient"] = float((part.grad - expected).abs().max() / dense.grad.abs().max())
        for field, one, other in zip(statistics._fields, found_statistics, statistics, strict=True):
            errors[f"{name}/{field}"] = _relative(one, other)
    return errors


class _Problem:
    """A micro-batch, and the loss and gradient of its whole logits, undivided and unpadded."""

    def __init__(self) -> None:
        from tests.support.verl_batch import Row, pack_rows
        from trainer.config import GKDConfig
        from trainer.config.gkd import ActorConfig
        from trainer.verl_adapter.loss import GKDLoss

        generator = torch.Generator().manual_seed(1)
        lengths = ((2, 3), (4, 1), (3, 6))
        rows = [Row.random(prompt, length, vocab_rows=V, k=K, generator=generator) for prompt, length in lengths]
        rows[2].mask[1] = 0
        num_tokens = int(sum(row.mask.sum() for row in rows))
        self.data = pack_rows(rows, batch_num_tokens=num_tokens, global_batch_size=len(rows))
        keys = ActorConfig(use_teacher_kl_loss=True, gkd_only_mode=True, gkd_divergence="jsd", teacher_kl_coef=0.5)
        self.loss = GKDLoss(
            gkd=GKDConfig(actor=keys),
            loss_agg_mode="token-mean",
            loss_scale_factor=None,
            rollout_temperature=TEMPERATURE,
            student_vocab_rows=V,
        )
        self.logits = torch.cat([row.logits for row in rows]).detach().requires_grad_()
        self.offsets = self.data["input_ids"].offsets()
        outputs = self.loss(student_logits=(self.logits / TEMPERATURE).unsqueeze(0), data=self.data)
        self.expected, self.expected_metrics = self.aggregate({key: one.squeeze(0) for key, one in outputs.items()})
        self.expected.backward()

    def aggregate(self, outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics of per-token outputs `[T]`."""
        nested = {key: torch.nested.nested_tensor_from_jagged(one, self.offsets) for key, one in outputs.items()}
        return self.loss(model_output=nested, data=self.data)

    def errors(self, found: Tensor, metrics: dict[str, Any], gradient: Tensor, expected_gradient: Tensor) -> Errors:
        """Of a loss, its metrics, and a part of its gradient."""
        scale = self.logits.grad.abs().max()
        errors = {
            "loss": _relative(found, self.expected),
            "gradient": float((gradient - expected_gradient).abs().max() / scale),
        }
        for name, metric in self.expected_metrics.items():
            if not isinstance(metric, float):
                one, other = float(metrics[name].aggregate()), float(metric.aggregate())
                errors[name] = abs(one - other) / max(1.0, abs(other))
        return errors


def _compare_megatron_path(rank: int, world_size: int) -> Errors:
    """The loss through Megatron's packing and verl's LM-head hook, against the loss on whole rows of logits."""
    from verl.models.mcore.util import (
        postprocess_bshd_engine,
        postprocess_thd_engine,
        preprocess_bshd_engine,
        preprocess_thd_engine,
    )
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    problem = _Problem()
    data, offsets = problem.data, problem.offsets
    width = COLUMNS // world_size
    mine = slice(rank * width, (rank + 1) * width)
    padded = torch.nn.functional.pad(problem.logits.detach(), (0, COLUMNS - V), value=5.0)
    errors: Errors = {}
    for data_format in ("thd", "bshd"):
        part = padded[:, mine].clone().requires_grad_()
        engine = SimpleNamespace(engine_config=SimpleNamespace(entropy_from_logits_with_chunking=False))
        hook = partial(
            MegatronEngineWithLMHead._lm_head_logits_processor,
            engine,
            calculate_sum_pi_squared=False,
            calculate_entropy=False,
            distillation_use_topk=True,
            distillation_only=True,
            logits_processor_func=problem.loss,
            batch=data,
            data_format=data_format,
        )
        temperature = torch.nested.nested_tensor_from_jagged(torch.full((part.shape[0],), TEMPERATURE), offsets)
        pack = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
        logits, layout, *_ = pack(torch.nested.nested_tensor_from_jagged(part, offsets), pre_process=True)
        label = pack(data["input_ids"], pre_process=True, need_roll=True)[0]
        packed = hook(logits, label, pack(temperature, pre_process=True)[0])
        if data_format == "thd":
            rows = {
                key: postprocess_thd_engine(one, layout, data["input_ids"], len(data)) for key, one in packed.items()
            }
        else:
            rows = {key: postprocess_bshd_engine(one, layout) for key, one in packed.items()}
        found, metrics = problem.aggregate({key: one.values() for key, one in rows.items()})
        found.backward()
        expected = torch.nn.functional.pad(problem.logits.grad, (0, COLUMNS - V))[:, mine]
        for name, error in problem.errors(found, metrics, part.grad, expected).items():
            errors[f"{data_format}/{name}"] = error
    return errors


def _compare_sequence_parallel(rank: int, world_size: int, group: dist.ProcessGroup) -> Errors:
    """The loss on the rank's share of the tokens, as FSDP's Ulysses deals them out, and verl's gathering of it."""
    from verl.utils.ulysses import gather_outputs_and_unpad, set_ulysses_sequence_parallel_group, slice_input_tensor

    problem = _Problem()
    set_ulysses_sequence_parallel_group(group)
    leaf = problem.logits.detach().clone().requires_grad_()
    share = slice_input_tensor(leaf / TEMPERATURE, dim=0)
    outputs = problem.loss(student_logits=share.unsqueeze(0), data=problem.data)
    padding = share.shape[0] * world_size - leaf.shape[0]
    gathered = {
        key: gather_outputs_and_unpad(one.squeeze(0), gather_dim=0, unpad_dim=0, padding_size=padding)
        for key, one in outputs.items()
    }
    found, metrics = problem.aggregate(gathered)
    found.backward()
    set_ulysses_sequence_parallel_group(None)
    # verl multiplies by the number of ranks in gathering, as FSDP averages their gradients
    gradient = leaf.grad / world_size
    dist.all_reduce(gradient, group=group)
    errors = problem.errors(found, metrics, gradient, problem.logits.grad)
    return {f"ulysses/{name}": error for name, error in errors.items()}


if __name__ == "__main__":
    main()
