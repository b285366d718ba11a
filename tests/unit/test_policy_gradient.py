"""Distillation by advantages: the estimate, its gradient, and what is written to the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from trainer.errors import NumericsError, ShapeError
from trainer.losses import teacher_advantages
from trainer.verl_adapter import batch_fields
from trainer.verl_adapter.teacher_fields import TEACHER_LOGPROBS


def test_policy_gradient_is_that_of_the_reverse_kl() -> None:
    """In expectation over the student's samples: minus the gradient of the full reverse KL, enumerated exactly."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.log_softmax(torch.randn(9, generator=generator, dtype=torch.float64), -1)
    logprobs = torch.log_softmax(student, -1)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), student, retain_graph=True)
    advantages = teacher_advantages(teacher[None], logprobs[None], torch.ones(1, 9))[0]
    assert not advantages.requires_grad
    # the policy-gradient loss, every token weighted by its probability
    (found,) = torch.autograd.grad(-(logprobs.exp().detach() * advantages * logprobs).sum(), student)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_unlearned_tokens_get_nothing() -> None:
    """Where the mask is 0 the advantage is 0, whatever stands there."""
    teacher = torch.tensor([[-1.0, -torch.inf, -3.0]])
    found = teacher_advantages(teacher, torch.full((1, 3), -2.0), torch.tensor([[1, 0, 1]]))
    assert found.tolist() == [[1.0, 0.0, -1.0]]


def test_infinite_logprobs_and_odd_shapes_are_refused() -> None:
    """The error says which token and both logprobs."""
    ones = torch.ones(1, 2)
    with pytest.raises(NumericsError, match=r"token 1 of response 0 has the logprob -inf .* -2\.0 under the student"):
        teacher_advantages(torch.tensor([[-1.0, -math.inf]]), -2 * ones, ones)
    with pytest.raises(ShapeError, match=r"teacher_logprobs \[1, 3\]"):
        teacher_advantages(torch.zeros(1, 3), ones, ones)


def _nested(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_scored_tokens_alone_are_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to GRPO's advantages as they are; masked tokens and unscored responses keep theirs."""
    fields = TensorDict(
        {
            "response_mask": torch.nested.as_nested_tensor(
                [torch.tensor([1, 0, 1]), torch.tensor([1, 1])], layout=torch.jagged
            ),
            "old_log_probs": _nested([[-1.0, -9.0, -2.0], [-1.0, -1.0]]),
            "advantages": _nested([[0.5, 0.5, 0.5], [-0.5, -0.5]]),
            TEACHER_LOGPROBS: torch.nested.as_nested_tensor(
                [torch.tensor([[-0.1, -3.0, -2.0], [-0.1, -3.0, -4.0], [-0.1, -3.0, -5.0]]), torch.empty(0, 3)],
                layout=torch.jagged,
            ),
        },
        batch_size=2,
    )
    put: dict[str, Any] = {}

    class Batch(SimpleNamespace):
        def __len__(self) -> int:
            return 2

    batch = Batch(keys=["a", "b"], partition_id="train")
    monkeypatch.setattr(batch_fields.tq, "kv_batch_get", lambda **_: fields)
    monkeypatch.setattr(batch_fields.tq, "kv_batch_put", lambda *, fields, **_: put.update(fields=fields) or batch)
    _, reverse_kl = batch_fields.add_teacher_advantages(batch, coefficient=0.1)
    # log p - log q of the scored tokens: -2 + 1, masked, -5 + 2
    found = [[round(value, 6) for value in row.tolist()] for row in put["fields"]["advantages"].unbind()]
    assert found == [[0.4, 0.5, 0.2], [-0.5, -0.5]]
    assert reverse_kl == pytest.approx(2.0)
