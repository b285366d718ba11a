"""The trainer's reductions against naive ones."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.metrics import (
    LOSS_SUMS,
    ROLLOUT_PROBS,
    BatchCalls,
    TeacherCall,
    loss_metrics,
    merge,
    metrics_per_teacher,
    pearson_correlation,
    waited_s,
)
from trainer.metrics import teacher_metrics as _teacher_metrics


def _call(
    asked_at_s: float,
    scored_at_s: float,
    scored_tokens: int,
    tail_mass: float,
    *,
    teacher: str = "t",
    inflight: int = 1,
) -> TeacherCall:
    return TeacherCall(
        teacher=teacher,
        asked_at_s=asked_at_s,
        scored_at_s=scored_at_s,
        latency_s=scored_at_s - asked_at_s,
        scored_tokens=scored_tokens,
        tail_mass=tail_mass,
        num_inflight=inflight,
    )


def _batch(
    *calls: TeacherCall, prefix: str = "", failed: tuple[str, ...] = (), num_responses: int = 2, waited: float = 0.5
) -> BatchCalls:
    return BatchCalls(
        calls={f"{prefix}{number}": call for number, call in enumerate(calls)},
        failed={f"{prefix}failed{number}": name for number, name in enumerate(failed)},
        num_responses=num_responses,
        waited_s=waited,
    )


def teacher_metrics(*calls: TeacherCall, num_responses: int = 2) -> dict[str, float]:
    return _teacher_metrics(_batch(*calls, num_responses=num_responses))


def test_only_the_wait_after_the_last_response_counts() -> None:
    """A long call hidden behind generation costs the step nothing; the last answer's delay is what it waits for."""
    calls = (_call(0.0, 9.0, 10, 0.1), _call(10.0, 10.5, 30, 0.5))
    assert waited_s([9.0, 10.5], generated_at_s=10.0, wanted_at_s=0.0) == pytest.approx(0.5)
    metrics = teacher_metrics(*calls)
    assert metrics["timing/teacher_knowledge"] == pytest.approx(0.5)
    assert metrics["timing/teacher_latency/max"] == pytest.approx(9.0)
    assert metrics["timing/teacher_latency/mean"] == pytest.approx(4.75)


def test_what_came_before_the_step_wanted_it_is_not_waited_for() -> None:
    """Not scores that were there before the last response, nor calls that an asynchronous step never saw."""
    assert waited_s([9.0], generated_at_s=10.0, wanted_at_s=0.0) == 0
    assert waited_s([9.0], generated_at_s=1.0, wanted_at_s=20.0) == 0
    assert waited_s([9.0], generated_at_s=1.0, wanted_at_s=8.0) == pytest.approx(1.0)
    assert waited_s([], generated_at_s=1.0, wanted_at_s=8.0) == 0


def test_the_batches_of_a_step_add_up() -> None:
    """Calls and waits of all of them."""
    merged = merge([_batch(_call(0, 1, 5, 0), prefix="a"), _batch(_call(0, 1, 7, 0), prefix="b", failed=("t",))])
    metrics = _teacher_metrics(merged)
    assert metrics["gkd/scored_tokens"] == 12
    assert metrics["timing/teacher_knowledge"] == pytest.approx(1.0)
    assert metrics["gkd/select_ratio"] == 0.5
    assert metrics["gkd/teacher_coverage"] == pytest.approx(2 / 3)


def test_teachers_are_told_apart() -> None:
    """One that failed altogether has no latency, and says so by its coverage."""
    calls = (_call(0, 1, 10, 0.1, teacher="math"), _call(0, 3, 30, 0.5, teacher="math"))
    assert metrics_per_teacher(_batch(*calls, failed=("math", "code", "code"))) == {
        "gkd/teacher/code/scored_tokens": 0,
        "gkd/teacher/code/coverage": 0,
        "gkd/teacher/math/scored_tokens": 40,
        "gkd/teacher/math/coverage": pytest.approx(2 / 3),
        "gkd/teacher/math/latency_mean_s": 2,
        "gkd/teacher/math/latency_max_s": 3,
        "gkd/teacher/math/tail_mass": pytest.approx(0.4),
    }


def test_the_busiest_moment_is_told() -> None:
    """The most calls under way when one was answered."""
    assert teacher_metrics(_call(0, 1, 1, 0, inflight=3), _call(0, 1, 1, 0, inflight=7))["gkd/teacher_inflight"] == 7


def test_tokens_add_up_and_weigh_the_tail() -> None:
    """Scored tokens are summed; the tail mass is a mean over tokens, not over responses."""
    metrics = teacher_metrics(_call(0.0, 1.0, 10, 0.1), _call(0.0, 1.0, 30, 0.5))
    assert metrics["gkd/scored_tokens"] == 40
    assert metrics["gkd/teacher_tail_mass"] == pytest.approx(0.4)


def test_ratio_counts_responses() -> None:
    """Two of eight were scored."""
    calls = (_call(0.0, 1.0, 10, 0.1), _call(0.0, 1.0, 30, 0.5))
    assert teacher_metrics(*calls, num_responses=8)["gkd/select_ratio"] == 0.25


def test_no_calls_give_no_times() -> None:
    """What was not measured is absent; that nothing was scored is known."""
    assert teacher_metrics(num_responses=4) == {"gkd/select_ratio": 0.0, "gkd/scored_tokens": 0.0}


def test_a_wait_in_vain_is_a_wait() -> None:
    """A step none of whose calls was answered has waited for all of them."""
    metrics = _teacher_metrics(_batch(failed=("t", "t"), waited=6.0))
    assert metrics["timing/teacher_knowledge"] == 6.0
    assert metrics["gkd/teacher_coverage"] == 0.0


def test_loss_sums_become_means_over_tokens() -> None:
    """Any common multiple of the sums gives the same means; without tokens there are none."""
    sums = {"tokens": 4.0, "gkd/top1_agreement": 3.0, "gkd/teacher_entropy": 2.0, "gkd/student_entropy": 8.0}
    expected = {"gkd/top1_agreement": 0.75, "gkd/teacher_entropy": 0.5, "gkd/student_entropy": 2.0}
    assert loss_metrics(sums) == expected
    assert loss_metrics({name: value / 3 for name, value in sums.items()}) == pytest.approx(expected)
    assert loss_metrics(dict.fromkeys(sums, 0.0)) == {}


def test_loss_sums_hold_the_correlation_too() -> None:
    """The probabilities' sums travel with the others."""
    prefix = ROLLOUT_PROBS.removeprefix(LOSS_SUMS)
    probs = {"n": 2.0, "x": 1.0, "y": 3.0, "xx": 1.0, "yy": 5.0, "xy": 2.0}
    metrics = loss_metrics({"tokens": 0.0} | {prefix + name: value for name, value in probs.items()})
    assert metrics == {"training/rollout_actor_probs_pearson_corr": pytest.approx(1.0)}


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
