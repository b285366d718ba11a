"""The trainer's reductions against naive ones."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.metrics import TeacherCall, pearson_correlation, teacher_metrics


def _call(generated_at_s: float, scored_at_s: float, scored_tokens: int, tail_mass: float) -> TeacherCall:
    return TeacherCall(
        generated_at_s=generated_at_s,
        scored_at_s=scored_at_s,
        latency_s=scored_at_s - generated_at_s,
        scored_tokens=scored_tokens,
        tail_mass=tail_mass,
    )


def test_only_the_wait_after_the_last_response_counts() -> None:
    """A long call hidden behind generation costs the step nothing; the last answer's delay is what it waits for."""
    metrics = teacher_metrics([_call(0.0, 9.0, 10, 0.1), _call(10.0, 10.5, 30, 0.5)])
    assert metrics["timing/teacher_knowledge"] == pytest.approx(0.5)
    assert metrics["timing/teacher_latency/max"] == pytest.approx(9.0)
    assert metrics["timing/teacher_latency/mean"] == pytest.approx(4.75)


def test_tokens_add_up_and_weigh_the_tail() -> None:
    """Scored tokens are summed; the tail mass is a mean over tokens, not over responses."""
    metrics = teacher_metrics([_call(0.0, 1.0, 10, 0.1), _call(0.0, 1.0, 30, 0.5)])
    assert metrics["gkd/scored_tokens"] == 40
    assert metrics["gkd/teacher_tail_mass"] == pytest.approx(0.4)


def test_no_calls_give_no_metrics() -> None:
    """What was not measured is absent."""
    assert teacher_metrics([]) == {}


def test_pearson_equals_numpys() -> None:
    """Sums, or any multiple of them, give numpy's correlation."""
    rng = np.random.default_rng(0)
    x = rng.random(100)
    y = x + 0.3 * rng.random(100)
    sums = {"n": 100.0, "x": x.sum(), "y": y.sum(), "xx": (x * x).sum(), "yy": (y * y).sum(), "xy": (x * y).sum()}
    expected = np.corrcoef(x, y)[0, 1]
    assert pearson_correlation(sums) == pytest.approx(expected, rel=1e-12)
    assert pearson_correlation({name: value / 7 for name, value in sums.items()}) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("constant", [{"n": 0.0}, {"n": 2.0, "x": 2.0, "xx": 2.0, "y": 1.0, "yy": 1.0, "xy": 1.0}])
def test_pearson_without_variation_is_absent(constant: dict[str, float]) -> None:
    """No tokens, or a side that does not vary, has no correlation."""
    assert pearson_correlation({"x": 0.0, "y": 0.0, "xx": 0.0, "yy": 0.0, "xy": 0.0, **constant}) is None
