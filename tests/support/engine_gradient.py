"""One rank of verl's FSDP2 engine in float32: the gradient of the whole loss over one mini-batch.

Usage: engine_gradient.py MODEL OUTPUT, with RANK, WORLD_SIZE and DIST_INIT_METHOD in the environment. Rank 0 writes the
gradients by case and parameter, gathered over the ranks, as a dictionary of tensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.verl_adapter.cpu.environment import set_environment

NUM_ROWS, K, V = 8, 4, 32
UNSELECTED = (1, 2, 6)
"""Uneven over the halves that two ranks get."""
LENGTHS = ((3, 5), (6, 1), (2, 7), (4, 4), (5, 2), (3, 6), (2, 3), (7, 5))
"""Prompt and response tokens of each row."""
MASKED = {0: (2,), 3: (0, 1), 5: (3,)}
"""Response positions that are not learned, as after a tool's turn."""
AGG_MODES = ("token-mean", "seq-mean-token-mean")


def cases() -> Iterator[tuple[str, bool, str, int]]:
    """Name, whether GRPO takes part, aggregation, micro-batches."""
    for grpo in (False, True):
        for mode in AGG_MODES:
            for num_micro_batches in (1, 4):
                name = f"{'gkd_grpo' if grpo else 'gkd'}/{mode}/{num_micro_batches}"
                yield name, grpo, mode, num_micro_batches


def make_rows() -> list[dict[str, torch.Tensor]]:
    """The mini-batch, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (prompt_len, response_len) in enumerate(LENGTHS):
        ids = torch.randint(0, V, (prompt_len + response_len,), generator=generator)
        teacher = torch.log_softmax(2 * torch.randn(response_len, V, generator=generator), -1)
        logprobs, teacher_ids = teacher.topk(K, -1)
        tail = torch.log1p(-logprobs.exp().sum(-1, keepdim=True))
        mask = torch.ones(response_len, dtype=torch.int64)
        mask[list(MASKED.get(number, ()))] = 0
        scored = 0 if number in UNSELECTED else response_len
        rows.append(
            {
                "input_ids": ids,
                "position_ids": torch.arange(len(ids)),
                "prompts": ids[:prompt_len],
                "responses": ids[prompt_len:],
                "response_mask": mask,
                "loss_mask": mask,
                "old_log_probs": -3.5 + 0.3 * torch.randn(response_len, generator=generator),
                "advantages": torch.randn(1, generator=generator).expand(response_len).clone(),
                "teacher_ids": teacher_ids.int()[:scored],
                "teacher_logprobs": torch.cat([logprobs, tail, torch.zeros_like(tail)], -1)[:scored],
            }
        )
    return rows


def main() -> None:
    model, output = sys.argv[1:]
    set_environment()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.utils.distributed import initialize_global_process_group_ray
    from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.config.checkpoint import CheckpointConfig
    from verl.workers.engine import EngineRegistry

    from trainer.config import GKDConfig
    from trainer.config.gkd import ActorConfig
    from trainer.verl_adapter.batch_fields import mini_batch_counts
    from trainer.verl_adapter.loss import MINI_BATCH_COUNTS, GKDLoss

    initialize_global_process_group_ray(timeout_second=60)
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=model,
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            model_dtype="fp32",
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=0.0, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()

    rows = make_rows()
    selected = torch.tensor([int(row["response_mask"].sum()) * bool(len(row["teacher_ids"])) for row in rows])
    counts = mini_batch_counts(selected, mini_batch_size=NUM_ROWS, num_ranks=world_size)
    share = slice(rank * NUM_ROWS // world_size, (rank + 1) * NUM_ROWS // world_size)
    gradients = {}
    for name, grpo, mode, num_micro_batches in cases():
        mine = rows[share]
        fields = {
            key: torch.nested.as_nested_tensor([row[key] for row in mine], layout=torch.jagged) for key in mine[0]
        }
        data = TensorDict({**fields, MINI_BATCH_COUNTS: counts[share]}, batch_size=len(mine))
        tu.assign_non_tensor(
            data,
            global_batch_size=NUM_ROWS,
            micro_batch_size_per_gpu=len(mine) // num_micro_batches,
            use_dynamic_bsz=False,
            use_remove_padding=False,
            use_fused_kernels=False,
            temperature=1.0,
            calculate_entropy=False,
            distillation_use_topk=True,
            distillation_only=not grpo,
        )
        keys = ActorConfig(use_teacher_kl_loss=True, gkd_only_mode=not grpo, teacher_kl_coef=0.5)
        policy = FSDPActorConfig(
            strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, use_kl_loss=False
        )
        loss = GKDLoss(
            gkd=GKDConfig(actor=keys),
            loss_agg_mode=mode,
            loss_scale_factor=None,
            rollout_temperature=1.0,
            student_vocab_rows=V,
            policy=policy if grpo else None,
        )
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(data, loss)
            for key, parameter in engine.module.named_parameters():
                gradient = parameter.grad
                gradients[f"{name}/{key}"] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    if rank == 0:
        torch.save({key: value.detach().clone() for key, value in gradients.items()}, Path(output))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
