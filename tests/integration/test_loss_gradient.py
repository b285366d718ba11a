"""The gradient of the whole loss through verl's own FSDP2 engine: ranks and micro-batches must not matter."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples.sort_digits.models import STUDENT_SIZE, build_model, save_model
from tests.support import engine_gradient
from tests.support.engine_gradient import NUM_ROWS, cases, make_rows
from tests.support.ranks import run_ranks

COEFFICIENT, CLIP, DUAL_CLIP = 0.5, 0.2, 3.0
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student in float32."""
    folder = tmp_path_factory.mktemp("student")
    save_model(build_model(STUDENT_SIZE, seed=0), folder, dtype=torch.float32)
    return folder


def _per_token(row: dict[str, Tensor], logits: Tensor, *, grpo: bool) -> tuple[Tensor, Tensor | None]:
    """Policy loss `[S]` of a row, and its divergence `[S]` where it is selected; by the formulas, token by token."""
    prompt_len, length = len(row["prompts"]), len(row["responses"])
    kl: list[Tensor] = []
    pg: list[Tensor] = []
    for j in range(length):
        q = torch.softmax(logits[prompt_len + j - 1], -1)
        if grpo:
            ratio = q[row["responses"][j]] / row["old_log_probs"][j].exp()
            a = row["advantages"][j]
            clipped = torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
            pg.append(-torch.maximum(clipped, DUAL_CLIP * a) if a < 0 else -clipped)
        if len(row["teacher_ids"]):
            ids, p = row["teacher_ids"][j].long(), row["teacher_logprobs"][j, :-2].double().exp()
            rest_p, rest_q = 1 - p.sum(), 1 - q[ids].sum()
            kl.append((p * (p / q[ids]).log()).sum() + rest_p * (rest_p / rest_q).log())
    zeros = torch.zeros(length, dtype=logits.dtype)
    return torch.stack(pg) if grpo else zeros, torch.stack(kl) if kl else None


def _mean(values: list[Tensor], masks: list[Tensor], mode: str, num_sequences: int) -> Tensor:
    if mode == "token-mean":
        return torch.stack([(v * m).sum() for v, m in zip(values, masks, strict=True)]).sum() / sum(
            int(m.sum()) for m in masks
        )
    return torch.stack([(v * m).sum() / m.sum() for v, m in zip(values, masks, strict=True)]).sum() / num_sequences


def _naive(model: Path) -> Gradients:
    """One row at a time through the plain Hugging Face model, in float64, by autograd."""
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    rows = make_rows()
    gradients: Gradients = {}
    for name, grpo, mode, num_micro_batches in cases():
        if num_micro_batches != 1:
            continue
        logits = [student(input_ids=row["input_ids"].unsqueeze(0)).logits[0] for row in rows]
        parts = [_per_token(row, one, grpo=grpo) for row, one in zip(rows, logits, strict=True)]
        masks = [row["response_mask"].double() for row in rows]
        selected = [(kl, mask) for (_, kl), mask in zip(parts, masks, strict=True) if kl is not None]
        loss = COEFFICIENT * _mean([kl for kl, _ in selected], [mask for _, mask in selected], mode, len(selected))
        if grpo:
            loss = loss + _mean([pg for pg, _ in parts], masks, mode, NUM_ROWS)
        student.zero_grad()
        loss.backward()
        gradients |= {f"{name}/{key}": one.grad.clone() for key, one in student.named_parameters()}
    return gradients


async def test_gradient_is_that_of_the_formulas_on_any_ranks_and_micro_batches(model: Path, tmp_path: Path) -> None:
    """Uneven lengths, masked and unselected tokens: 1 or 2 ranks, 1 or 4 micro-batches give the naive gradient.

    For distillation alone and with GRPO, averaged over tokens and over sequences. 1e-5 of the gradient's largest
    entry, in float32.
    """
    one, two = await asyncio.gather(
        *(
            run_ranks(engine_gradient.__name__, f"{model}", folder=tmp_path, world_size=world_size)
            for world_size in (1, 2)
        )
    )
    naive = _naive(model)
    assert one.keys() == two.keys()
    for name, grpo, mode, num_micro_batches in cases():
        reference = f"{'gkd_grpo' if grpo else 'gkd'}/{mode}/1"
        keys = [key.removeprefix(f"{reference}/") for key in naive if key.startswith(f"{reference}/")]
        expected = torch.cat([naive[f"{reference}/{key}"].flatten() for key in keys])
        assert float(expected.abs().max()) > 1e-2
        for world_size, gradients in ((1, one), (2, two)):
            ours = torch.cat([gradients[f"{name}/{key}"].flatten() for key in keys])
            error = float((ours - expected).abs().max() / expected.abs().max())
            assert error < 1e-5, (name, world_size, num_micro_batches, error)
