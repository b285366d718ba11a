"""Inputs at the ends of what is allowed: impossible tokens, a spread of 1e4, one-hot and flat teachers, padding."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from tests.conformance.reference import (
    FORMS,
    TAILS,
    Divergence,
    Form,
    central_differences,
    reference_divergence,
    value_and_gradient,
)

EXTREMES = settings(deadline=None, derandomize=True)


class Problem(NamedTuple):
    """One call of the function."""

    student: Tensor
    token_ids: Tensor
    logprobs: Tensor
    options: dict[str, Any]

    @property
    def compares_something(self) -> bool:
        """Whether no row is conditioned on tokens that are impossible to the student."""
        possible = self.student.gather(-1, self.token_ids) > -torch.inf
        return self.options["tail"] != "renormalize" or bool(possible.any(-1).all())

    @property
    def tail_is_resolved(self) -> bool:
        """Whether rounding leaves enough of one minus the sum to compare what is made of it."""
        if self.options["tail"] != "bucket" or self.token_ids.shape[1] == self.student.shape[1]:
            return True
        return bool(((1 - self.logprobs.double().exp().sum(-1)) > 1e-6).all())

    @property
    def reads_log_zero(self) -> Tensor:
        """`[S]` which rows hold a probability of 0."""
        return (self.student == -torch.inf).any(-1) | (self.logprobs == -torch.inf).any(-1)

    def of(self, function: Divergence) -> Divergence:
        """The function of the student's logits alone."""
        return partial(function, topk_token_ids=self.token_ids, topk_logprobs=self.logprobs, **self.options)


@st.composite
def _logits(draw: st.DrawFn, shape: tuple[int, int]) -> Tensor:
    """From nearly uniform to a spread of 1e4."""
    scale = draw(st.sampled_from([1e-4, 1.0, 20.0, 1e4]))
    values = draw(arrays(np.float32, shape, elements=st.floats(-0.5, 0.5, width=32)))
    return torch.from_numpy(values).double() * scale


@st.composite
def _student_logits(draw: st.DrawFn, shape: tuple[int, int]) -> Tensor:
    """Some entries and a suffix of padding are -inf; one token is always possible."""
    logits = draw(_logits(shape))
    padded_from = draw(st.integers(1, shape[1]))
    impossible = torch.zeros(shape, dtype=torch.bool)
    if draw(st.booleans()):
        impossible = torch.from_numpy(draw(arrays(np.bool_, shape)))
    impossible[:, padded_from:] = True
    impossible[:, draw(st.integers(0, padded_from - 1))] = False
    return logits.masked_fill(impossible, -torch.inf)


@st.composite
def _teacher_logits(draw: st.DrawFn, student: Tensor) -> Tensor:
    """One-hot, the student's own, or like a student's, with impossible tokens or without."""
    kind = draw(st.sampled_from(["one-hot", "student's", "possible", "impossible"]))
    shape = (student.shape[0], student.shape[1])
    if kind == "one-hot":
        one = torch.tensor([draw(st.integers(0, shape[1] - 1)) for _ in range(shape[0])])
        return torch.full(shape, -torch.inf).double().scatter(-1, one.unsqueeze(-1), 0.0)
    if kind == "student's":
        return student
    return draw(_logits(shape) if kind == "possible" else _student_logits(shape))


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Problem:
    """The K tokens are the teacher's likeliest, or (a tail of nearly 1) its unlikeliest."""
    dtype = draw(st.sampled_from(dtypes))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 8)))
    temperature = draw(st.sampled_from([0.5, 1.0, 2.0]))
    student = draw(_student_logits(shape)).to(dtype)
    teacher = torch.log_softmax(draw(_teacher_logits(student.double())) / temperature, -1)
    tail = draw(st.sampled_from(TAILS))
    k, largest = draw(st.integers(1, shape[1])), draw(st.booleans())
    logprobs, ids = teacher.topk(k, -1, largest=largest)
    if tail == "renormalize" and bool((logprobs == -torch.inf).all(-1).any()):
        logprobs, ids = teacher.topk(k, -1)  # a teacher can't be conditioned on what it excludes
    options = {**draw(_forms())._asdict(), "temperature": temperature, "tail": tail}
    return Problem(student, ids, logprobs.to(torch.promote_types(dtype, torch.float32)), options)


@st.composite
def _forms(draw: st.DrawFn) -> Form:
    divergence = draw(st.sampled_from(sorted({form.divergence for form in FORMS})))
    beta = draw(st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]))
    return Form(divergence, beta=beta, skew_alpha=draw(st.sampled_from([0.0, 0.01, 0.5, 0.99])))


@settings(EXTREMES, max_examples=300)
@given(problem=problems((torch.float64, torch.float32, torch.bfloat16)))
def test_nothing_is_inf_or_nan(divergence: Divergence, problem: Problem) -> None:
    """Value and gradient are finite, a true divergence is >= 0, and nothing pulls at a logit of -inf."""
    value, gradient = value_and_gradient(problem.of(divergence), problem.student)
    assert gradient.dtype == problem.student.dtype
    assert bool(value.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert bool((gradient[problem.student == -torch.inf] == 0).all())
    if problem.options["tail"] != "none":
        assert bool((value >= 0).all())


@settings(EXTREMES, max_examples=100)
@given(problem=problems((torch.float64,)).filter(lambda problem: problem.compares_something))
def test_gradient_is_that_of_the_value(divergence: Divergence, problem: Problem) -> None:
    """Central differences of the function's own value."""
    student, token_ids, logprobs, options = problem
    value, gradient = value_and_gradient(problem.of(divergence), student)
    differences = central_differences(partial(divergence, **options), student, token_ids, logprobs)
    tolerance = 1e-5 * (1 + value.abs().unsqueeze(-1))
    assert bool(((gradient - differences).abs() <= tolerance).all())


@settings(EXTREMES, max_examples=150)
@given(
    problem=problems((torch.float64,)).filter(lambda problem: problem.compares_something and problem.tail_is_resolved)
)
def test_value_and_gradient_are_the_references(divergence: Divergence, problem: Problem) -> None:
    """The readings of log 0 included, to a hundredth of a nat: an implementation may stay clear of the very limit."""
    value, gradient = value_and_gradient(problem.of(divergence), problem.student)
    expected, expected_gradient = value_and_gradient(problem.of(reference_divergence), problem.student)
    tolerance = 1e-9 * (1 + expected.abs())
    tolerance[problem.reads_log_zero] = 1e-2
    assert bool(((value - expected).abs() <= tolerance).all())
    assert bool(((gradient - expected_gradient).abs() <= tolerance.unsqueeze(-1)).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_derived_tail_of_a_one_hot_teacher_is_eps_where_it_divides(
    divergence: Divergence, form: Form, dtype: torch.dtype
) -> None:
    """A student with mass outside such a top-k pays log(q / eps) for it, no more."""
    student = torch.tensor([[0.0, 1.0, 2.0, -1.0], [30.0, 0.0, -1.0, -torch.inf], [1.0, -torch.inf, -torch.inf, 9.0]])
    ids, logprobs = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1, dtype=dtype)
    problem = Problem(student.to(dtype), ids, logprobs, form._asdict())
    value, gradient = value_and_gradient(problem.of(divergence), problem.student)
    expected, expected_gradient = value_and_gradient(
        problem.of(partial(reference_divergence, arithmetic=dtype)), problem.student.double()
    )
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)
