"""The divergence against a naive full-vocabulary reference, value and gradient."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import ShapeError
from trainer.losses import topk_divergence

S, V = 7, 23


def _pair(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(S, V, generator=generator, dtype=dtype) * 3
    teacher = torch.log_softmax(torch.randn(S, V, generator=generator, dtype=dtype) * 3, -1)
    return student.requires_grad_(), teacher


def _naive_bucket_kl(student: torch.Tensor, teacher: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """KL over K + 1 events, each tail summed term by term over the rest of the vocabulary."""
    q_full = torch.softmax(student / temperature, -1)
    rows = []
    for p, q in zip(teacher.exp(), q_full, strict=True):
        top = p.topk(k).indices.tolist()
        rest = [v for v in range(V) if v not in top]
        events = [(p[v], q[v]) for v in top]
        if rest:
            events.append((sum(p[v] for v in rest), sum(q[v] for v in rest)))
        rows.append(sum(a * (a.log() - b.log()) for a, b in events))
    return torch.stack(rows)


def _ours(student: torch.Tensor, teacher: torch.Tensor, k: int, **options: float) -> torch.Tensor:
    logprobs, ids = teacher.topk(k, -1)
    return topk_divergence(student, ids, logprobs, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_value_and_gradient_equal_the_naive_bucket_form(k: int, temperature: float) -> None:
    """Value and gradient are those of the K + 1 event KL, to float64 precision."""
    student, teacher = _pair(seed=k)
    weights = torch.arange(1.0, S + 1, dtype=torch.float64)
    ours = _ours(student, teacher, k, temperature=temperature)
    (ours_gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    naive = _naive_bucket_kl(student, teacher, k, temperature)
    (naive_gradient,) = torch.autograd.grad((naive * weights).sum(), student)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours_gradient, naive_gradient, rtol=1e-9, atol=1e-12)


def test_whole_vocabulary_equals_the_full_kl() -> None:
    """With K = V there is no tail, and the result is torch's own full KL."""
    student, teacher = _pair(seed=3)
    full = torch.nn.functional.kl_div(torch.log_softmax(student, -1), teacher, log_target=True, reduction="none").sum(
        -1
    )
    torch.testing.assert_close(_ours(student, teacher, V), full, rtol=1e-9, atol=1e-12)


def test_bucket_form_is_a_lower_bound_that_grows_with_k() -> None:
    """Coarsening never raises a KL, so each further token can only add to it."""
    student, teacher = _pair(seed=4)
    values = torch.stack([_ours(student, teacher, k).detach() for k in range(1, V + 1)])
    assert bool((values >= 0).all())
    assert bool((values.diff(dim=0) >= -1e-12).all())


def test_identical_distributions_give_zero_loss_and_zero_gradient() -> None:
    """A student that is its teacher has nothing to learn."""
    student, _ = _pair(seed=5)
    teacher = torch.log_softmax(student.detach(), -1)
    loss = _ours(student, teacher, 4)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss, torch.zeros(S, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros(S, V, dtype=torch.float64), rtol=0, atol=1e-12)


def test_tail_pulls_mass_back_to_the_teachers_support() -> None:
    """The gradient on a token outside the top-k is positive where the student's tail is too heavy."""
    student = torch.zeros(1, V, dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.cat([torch.full((1, 2), 8.0), torch.zeros(1, V - 2)], -1).double(), -1)
    (gradient,) = torch.autograd.grad(_ours(student, teacher, 2).sum(), student)
    assert bool((gradient[0, 2:] > 0).all())
    assert bool((gradient[0, :2] < 0).all())


def test_empty_tail_is_no_nan() -> None:
    """A one-hot teacher has a tail of log-mass -inf; loss and gradient stay finite."""
    student, _ = _pair(seed=6)
    ids, logprobs = torch.zeros(S, 1, dtype=torch.int32), torch.zeros(S, 1)
    loss = topk_divergence(student, ids, logprobs, log_tail_mass=torch.full((S,), -torch.inf))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(gradient).all())


def test_given_tail_mass_is_used() -> None:
    """The teacher's own tail mass wins over one minus the sum, which rounds a small tail away."""
    student, _ = _pair(seed=7)
    ids, logprobs = torch.zeros(S, 1, dtype=torch.int32), torch.zeros(S, 1)
    tail = torch.full((S,), -20.0)
    derived = topk_divergence(student, ids, logprobs)
    given = topk_divergence(student, ids, logprobs, log_tail_mass=tail)
    assert bool((given != derived).all())


def test_bfloat16_logits_are_scored_in_float32() -> None:
    """The arithmetic is float32, whatever the logits come as."""
    student, teacher = _pair(seed=8, dtype=torch.float32)
    half = student.detach().bfloat16()
    loss = _ours(half, teacher, 4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, _ours(half.float(), teacher, 4), rtol=0, atol=0)


def test_no_rows_give_an_empty_loss_with_a_graph() -> None:
    """A micro-batch in which nothing is learned still back-propagates zeros."""
    student = torch.zeros(0, V, requires_grad=True)
    loss = topk_divergence(student, torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2))
    loss.sum().backward()
    assert student.grad is not None
    assert loss.shape == (0,)


def test_id_beyond_the_students_vocabulary_is_refused() -> None:
    """A teacher id that the student has no logit for is an error, not a clamp."""
    student, _ = _pair(seed=9)
    with pytest.raises(ValueError, match=rf"0\.\.{V}, outside the student's {V} vocabulary rows"):
        topk_divergence(student, torch.tensor([[0, V]] * S), torch.full((S, 2), -1.0))


def test_shapes_must_agree() -> None:
    """S and K must agree between the arguments."""
    student, _ = _pair(seed=10)
    with pytest.raises(ShapeError, match=r"must both be \[S, K\], for 7 rows of student_logits"):
        topk_divergence(student, torch.zeros(S + 1, 2, dtype=torch.int32), torch.zeros(S + 1, 2))
    with pytest.raises(ShapeError, match="log_tail_mass"):
        topk_divergence(student, torch.zeros(S, 2, dtype=torch.int32), torch.zeros(S, 2), log_tail_mass=torch.zeros(2))


@pytest.mark.parametrize(("option", "value"), [("divergence", "kl"), ("tail", "drop"), ("temperature", 0.0)])
def test_unknown_options_are_refused(option: str, value: object) -> None:
    """An option that does not exist is an error."""
    student, teacher = _pair(seed=11)
    with pytest.raises(ValueError, match=option):
        _ours(student, teacher, 2, **{option: value})  # type: ignore[arg-type]
