"""The loss as verl's engine calls it: packed logits in, one normalised number out."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.support.verl_batch import Row, pack_rows
from trainer.config import GKDConfig
from trainer.config.gkd import ActorConfig
from trainer.verl_adapter.loss import GKDLoss

V, K = 11, 3


def _loss(coefficient: float = 1.0, rollout_temperature: float = 1.0, loss_agg_mode: str = "token-mean") -> GKDLoss:
    actor = ActorConfig(use_teacher_kl_loss=True, gkd_only_mode=True, teacher_kl_coef=coefficient)
    return GKDLoss(
        gkd=GKDConfig(actor=actor),
        loss_agg_mode=loss_agg_mode,
        loss_scale_factor=None,
        rollout_temperature=rollout_temperature,
        student_vocab_rows=V,
    )


def _batch(seed: int = 0, lengths: tuple[tuple[int, int], ...] = ((2, 3), (4, 1), (3, 5))) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    return [Row.random(prompt, response, vocab_rows=V, k=K, generator=generator) for prompt, response in lengths]


def _run(loss: GKDLoss, rows: list[Row], num_tokens: int, num_rows: int) -> tuple[torch.Tensor, dict[str, object]]:
    data = pack_rows(rows, batch_num_tokens=num_tokens, global_batch_size=num_rows)
    logits = torch.cat([row.logits for row in rows]).unsqueeze(0)
    outputs = loss(student_logits=logits, data=data)
    assert isinstance(outputs, dict)
    offsets = data["input_ids"].offsets()
    model_output = {
        name: torch.nested.nested_tensor_from_jagged(values.squeeze(0), offsets) for name, values in outputs.items()
    }
    value, metrics = loss(model_output=model_output, data=data)
    return value, metrics


def _naive(rows: list[Row]) -> torch.Tensor:
    """Mean over learned tokens of the K + 1 event KL, walking row by row, token by token."""
    terms = []
    for row in rows:
        for j in range(row.response_len):
            q = torch.softmax(row.logits[row.prompt_len + j - 1].double(), -1)
            p = row.teacher_logprobs[j].double().exp()
            ids = row.teacher_ids[j].long()
            if row.mask[j]:
                rest_p, rest_q = 1 - p.sum(), 1 - q[ids].sum()
                terms.append((p * (p / q[ids]).log()).sum() + rest_p * (rest_p / rest_q).log())
    return torch.stack(terms).mean()


def _num_tokens(rows: list[Row]) -> int:
    return int(sum(row.mask.sum() for row in rows))


def test_value_and_gradient_equal_a_token_by_token_walk() -> None:
    """Packing, masking, alignment and normalisation together give the plain mean over learned tokens."""
    rows = _batch()
    rows[2].mask[1] = 0
    value, _ = _run(_loss(), rows, _num_tokens(rows), len(rows))
    expected = _naive(rows)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(value, [row.logits for row in rows])
    naive = torch.autograd.grad(expected, [row.logits for row in rows])
    for one, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_shift_by_one_changes_the_loss() -> None:
    """The check above can fail: teacher rows moved by one position give another value."""
    rows = _batch()
    value, _ = _run(_loss(), rows, _num_tokens(rows), len(rows))
    rows[2].teacher_logprobs = rows[2].teacher_logprobs.roll(1, 0)
    rows[2].teacher_ids = rows[2].teacher_ids.roll(1, 0)
    shifted, _ = _run(_loss(), rows, _num_tokens(rows), len(rows))
    assert (value - shifted).detach().abs() > 1e-2


def test_micro_batches_add_up_to_the_whole() -> None:
    """Uneven micro-batches normalised by the global token count sum to the loss of the whole batch."""
    rows = _batch()
    tokens = _num_tokens(rows)
    whole, _ = _run(_loss(), rows, tokens, len(rows))
    parts = sum(_run(_loss(), part, tokens, len(rows))[0] for part in (rows[:1], rows[1:]))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_coefficient_scales_the_loss_but_not_its_metric() -> None:
    """`actor/teacher_kl_loss` is the divergence itself; the loss is it times its coefficient."""
    rows = _batch()
    plain, plain_metrics = _run(_loss(), rows, _num_tokens(rows), len(rows))
    scaled, metrics = _run(_loss(coefficient=0.25), rows, _num_tokens(rows), len(rows))
    torch.testing.assert_close(scaled, plain * 0.25)
    assert metrics["actor/teacher_kl_coef"] == 0.25
    assert metrics["actor/teacher_kl_loss"].aggregate() == plain_metrics["actor/teacher_kl_loss"].aggregate()  # type: ignore[attr-defined]


def test_sampling_temperature_is_undone() -> None:
    """verl hands over logits divided by the sampling temperature; the divergence is that of the undivided ones."""
    rows = _batch()
    plain, _ = _run(_loss(), rows, _num_tokens(rows), len(rows))
    for row in rows:
        row.logits = row.logits.detach() / 0.7
    divided, _ = _run(_loss(rollout_temperature=0.7), rows, _num_tokens(rows), len(rows))
    torch.testing.assert_close(divided, plain, rtol=1e-5, atol=1e-6)


def test_nothing_learned_gives_zero_with_a_graph() -> None:
    """A micro-batch of mask 0 contributes a zero that still reaches the logits."""
    rows = _batch()
    for row in rows:
        row.mask[:] = 0
    value, _ = _run(_loss(), rows, 5, len(rows))
    value.backward()
    assert value.item() == 0
    assert rows[0].logits.grad is not None
    assert float(rows[0].logits.grad.abs().sum()) == 0


def test_probabilities_of_rollout_and_trainer_are_compared() -> None:
    """The sums give the correlation of both sides' probabilities: 1 where the rollout used these very weights."""
    rows = _batch()
    _, metrics = _run(_loss(), rows, _num_tokens(rows), len(rows))
    sums = {name.rsplit("/", 1)[1]: metric.aggregate() for name, metric in metrics.items() if "rollout_probs" in name}  # type: ignore[attr-defined]
    assert sums["n"] == _num_tokens(rows)
    assert sums["x"] == pytest.approx(sums["y"], rel=1e-5)
    assert sums["xy"] == pytest.approx(sums["xx"], rel=1e-5)


def test_loss_survives_pickling() -> None:
    """Ray carries the loss to the workers."""
    assert pickle.loads(pickle.dumps(_loss(coefficient=0.5))).gkd.actor.teacher_kl_coef == 0.5
