"""A function with the signature of `topk_divergence` against the definition in docs/conformance.md."""

from __future__ import annotations

import inspect
import json
import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from tests.conformance.make_golden import GOLDEN, golden
from tests.conformance.reference import (
    FORMS,
    TAILS,
    Divergence,
    Form,
    central_differences,
    full_divergence,
    reference_divergence,
    value_and_gradient,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Of the largest entry; for float64, also of each entry by itself."""
CLOSED_TAILS = ("bucket", "renormalize")
"""With which the result is a divergence."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
ALL_FORMS = pytest.mark.parametrize("form", FORMS, ids=str)
ALL_TAILS = pytest.mark.parametrize("tail", TAILS)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])


def _random(num_rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64) * scale


def _topk(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logprobs, ids = torch.log_softmax(teacher_logits / temperature, -1).topk(k, -1)
    return ids, logprobs


def _assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    tolerance, largest = TOLERANCE[dtype], float(expected.abs().max())
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-12 * max(1.0, largest))
    else:
        atol = max(tolerance * largest, torch.finfo(dtype).eps)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


# Golden vectors ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_file() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return content


@DTYPES
@ALL_TAILS
@ALL_FORMS
def test_golden_vectors(
    divergence: Divergence, golden_file: dict[str, Any], form: Form, tail: str, dtype: torch.dtype
) -> None:
    """Value and gradient are those written down, for each temperature and K."""
    student = torch.tensor(golden_file["student_logits"], dtype=dtype)
    upstream = torch.tensor(golden_file["upstream"], dtype=dtype)
    wanted = {**form._asdict(), "tail": tail}
    cases = [case for case in golden_file["cases"] if wanted.items() <= case.items()]
    assert len(cases) == len(golden_file["batches"])
    for case in cases:
        batch = golden_file["batches"][case["batch"]]
        function = partial(
            divergence,
            topk_token_ids=torch.tensor(batch["topk_token_ids"]),
            topk_logprobs=torch.tensor(batch["topk_logprobs"], dtype=dtype),
            temperature=batch["temperature"],
            **wanted,
        )
        value, gradient = value_and_gradient(function, student, upstream)
        _assert_close(value, torch.tensor(case["value"], dtype=torch.float64), dtype)
        _assert_close(gradient, torch.tensor(case["gradient"], dtype=torch.float64), dtype)


def test_golden_file_is_what_the_reference_says(golden_file: dict[str, Any]) -> None:
    """Making it anew changes no number by more than rounding."""

    def compare(written: object, made: object) -> None:
        if isinstance(made, dict) and isinstance(written, dict):
            assert written.keys() == made.keys()
            compare(list(written.values()), list(made.values()))
        elif isinstance(made, list) and isinstance(written, list):
            assert len(written) == len(made)
            for one, other in zip(written, made, strict=True):
                compare(one, other)
        elif isinstance(made, float) and isinstance(written, float):
            assert math.isclose(written, made, rel_tol=1e-12, abs_tol=1e-12)
        else:
            assert written == made

    compare(golden_file, golden())


# What the definition implies -----------------------------------------------------------------------------------------


@DTYPES
@TEMPERATURES
@ALL_TAILS
@ALL_FORMS
def test_whole_vocabulary_equals_the_full_divergence(
    divergence: Divergence, form: Form, tail: str, temperature: float, dtype: torch.dtype
) -> None:
    """With K = V nothing is outside, and all tails are the full divergence, in value and gradient."""
    student = _random(5, 40, seed=1).to(dtype)
    logits = _random(5, 40, seed=2)
    ids, logprobs = _topk(logits, 40, temperature)
    function = partial(
        divergence,
        topk_token_ids=ids,
        topk_logprobs=logprobs.to(dtype),
        **form._asdict(),
        tail=tail,
        temperature=temperature,
    )
    value, gradient = value_and_gradient(function, student)
    teacher = torch.log_softmax(logits / temperature, -1)
    full, full_gradient = value_and_gradient(lambda z: full_divergence(z, teacher, form, temperature), student.double())
    _assert_close(value, full, dtype)
    _assert_close(gradient, full_gradient, dtype)


@st.composite
def _distributions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Student and teacher logits; the teacher's are moderate, so that one minus a sum still says what a tail is."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(2, 9)))
    student = draw(arrays(np.float64, shape, elements=st.floats(-20, 20)))
    teacher = draw(arrays(np.float64, shape, elements=st.floats(-5, 5)))
    return torch.from_numpy(student), torch.from_numpy(teacher)


@ALL_FORMS
@settings(deadline=None, max_examples=25, derandomize=True)
@given(logits=_distributions(), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_bucket_is_a_lower_bound_that_grows_with_k(
    divergence: Divergence, form: Form, logits: tuple[Tensor, Tensor], temperature: float
) -> None:
    """Merging events never raises a divergence, so a further token can only add to it."""
    student, teacher = logits
    teacher = teacher * temperature
    values = []
    for k in range(1, student.shape[1] + 1):
        ids, logprobs = _topk(teacher, k, temperature)
        values.append(divergence(student, ids, logprobs, **form._asdict(), temperature=temperature, tail="bucket"))
    full = full_divergence(student, torch.log_softmax(teacher / temperature, -1), form, temperature)
    for smaller, larger in pairwise([*values, full]):
        assert bool((larger - smaller >= -1e-9 * (1 + full)).all())


@DTYPES
@pytest.mark.parametrize("tail", CLOSED_TAILS)
@ALL_FORMS
def test_never_negative(divergence: Divergence, form: Form, tail: str, dtype: torch.dtype) -> None:
    """Also where both sides are so alike that a plain sum would be all rounding."""
    logits = _random(64, 32, seed=3)
    noise = _random(64, 32, seed=4, scale=1.0)
    for scale in (0.0, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0):
        student = (logits + scale * noise).to(dtype)
        for k in (1, 4, 32):
            ids, logprobs = _topk(logits, k)
            value = divergence(student, ids, logprobs.to(dtype), **form._asdict(), tail=tail)
            assert bool((value >= 0).all()), f"{value.min()} at noise {scale}, K={k}"


@DTYPES
@ALL_TAILS
@ALL_FORMS
def test_identical_distributions(divergence: Divergence, form: Form, tail: str, dtype: torch.dtype) -> None:
    """A student that is its teacher has no loss, and nothing to learn where all its mass is compared."""
    student = _random(8, 20, seed=5).to(dtype)
    for k in (1, 6, 20):
        ids, logprobs = _topk(student.double() * 2, k, temperature=1.0)
        function = partial(
            divergence, topk_token_ids=ids, topk_logprobs=logprobs.to(dtype), **form._asdict(), temperature=0.5
        )
        value, gradient = value_and_gradient(partial(function, tail=tail), student)
        smallest = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=smallest)
        if tail in CLOSED_TAILS or k == 20:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=smallest)


@ALL_TAILS
@pytest.mark.parametrize(
    ("form", "same_as"),
    [
        (Form("jsd", beta=0.0), Form("forward_kl")),
        (Form("jsd", beta=1.0), Form("reverse_kl")),
        (Form("skew_forward_kl", skew_alpha=0.0), Form("forward_kl")),
        (Form("skew_reverse_kl", skew_alpha=0.0), Form("reverse_kl")),
    ],
    ids=str,
)
def test_ends_are_the_two_kls(divergence: Divergence, form: Form, same_as: Form, tail: str) -> None:
    """JSD by special case at both ends, a skewed KL without skew."""
    student = _random(5, 20, seed=6)
    ids, logprobs = _topk(_random(5, 20, seed=7), 6)
    results = [
        value_and_gradient(
            partial(divergence, topk_token_ids=ids, topk_logprobs=logprobs, **which._asdict(), tail=tail), student
        )
        for which in (form, same_as)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@TEMPERATURES
@ALL_TAILS
@ALL_FORMS
def test_gradient_is_that_of_the_value(divergence: Divergence, form: Form, tail: str, temperature: float) -> None:
    """Central differences of the function's own value."""
    student = _random(3, 12, seed=8)
    for k in (1, 5, 12):
        ids, logprobs = _topk(_random(3, 12, seed=9), k, temperature)
        function = partial(divergence, **form._asdict(), tail=tail, temperature=temperature)
        _, gradient = value_and_gradient(partial(function, topk_token_ids=ids, topk_logprobs=logprobs), student)
        differences = central_differences(function, student, ids, logprobs)
        torch.testing.assert_close(gradient, differences, rtol=1e-6, atol=1e-8)


@ALL_TAILS
@ALL_FORMS
def test_rows_are_independent(divergence: Divergence, form: Form, tail: str) -> None:
    """Their order and company change neither value nor gradient; each gradient is scaled by its own upstream."""
    student, upstream = _random(9, 20, seed=10), _random(1, 9, seed=11)[0]
    ids, logprobs = _topk(_random(9, 20, seed=12), 6)

    def some(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        function = partial(divergence, topk_token_ids=ids[rows], topk_logprobs=logprobs[rows], **form._asdict())
        return value_and_gradient(partial(function, tail=tail), student[rows], weights)

    value, gradient = some(torch.arange(9), torch.ones(9))
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    for rows in (order, order[:1], order[1:4], order[4:]):
        weights = upstream[rows]
        expected = value[rows], gradient[rows] * weights.unsqueeze(-1)
        torch.testing.assert_close(some(rows, weights), expected, rtol=1e-12, atol=1e-14)


@TEMPERATURES
@ALL_TAILS
@ALL_FORMS
def test_bfloat16_logits_are_scored_in_float32(
    divergence: Divergence, form: Form, tail: str, temperature: float
) -> None:
    """The value is that of the logits in float32, and so is the gradient, rounded to the logits' type."""
    student = _random(5, 40, seed=13).bfloat16()
    ids, logprobs = _topk(_random(5, 40, seed=14), 6, temperature)
    function = partial(
        divergence,
        topk_token_ids=ids,
        topk_logprobs=logprobs.float(),
        **form._asdict(),
        tail=tail,
        temperature=temperature,
    )
    (value, gradient), (exact, exact_gradient) = (
        value_and_gradient(function, student),
        value_and_gradient(function, student.float()),
    )
    assert value.dtype == exact.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.float(), exact_gradient, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)


# The optional argument -----------------------------------------------------------------------------------------------


@DTYPES
@ALL_FORMS
def test_given_tail_mass(divergence: Divergence, form: Form, dtype: torch.dtype) -> None:
    """A tail too light for one minus the sum is taken from `log_tail_mass`; skipped where that isn't supported."""
    if "log_tail_mass" not in inspect.signature(divergence).parameters:
        pytest.skip("the function takes no log_tail_mass")
    student = _random(4, 12, seed=15).to(dtype)
    ids = torch.arange(2).expand(4, 2)
    teacher = torch.log_softmax(torch.tensor([[0.0, -2.0, tail] for tail in (-3.0, -12.0, -20.0, -40.0)]).double(), -1)
    logprobs, log_tail_mass = teacher[:, :2].to(dtype), teacher[:, 2].to(dtype)
    results = [
        value_and_gradient(
            partial(
                function,
                topk_token_ids=ids,
                topk_logprobs=logprobs,
                log_tail_mass=log_tail_mass,
                **form._asdict(),
            ),
            student,
        )
        for function in (divergence, partial(reference_divergence, arithmetic=dtype))
    ]
    (value, gradient), (expected, expected_gradient) = results
    _assert_close(value, expected, dtype)
    _assert_close(gradient, expected_gradient.double(), dtype)
