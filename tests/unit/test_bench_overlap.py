"""The overlap benchmark's arithmetic, and the lengths of its responses."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import overlap
from trainer.verl_adapter.cpu import vllm_metadata


def _step(**changes: float) -> dict[str, float]:
    return {
        "timing_s/step": 10.0,
        "timing_s/gen": 6.0,
        "timing_s/update_actor": 3.0,
        "timing/teacher_knowledge": 2.0,
        "timing/teacher_latency/mean": 2.5,
        "training/off_policy/trajectory_staleness/mean": 0.0,
    } | changes


def test_a_row_holds_means() -> None:
    """Every step counts, the slow ones too."""
    steps = [_step(), _step(**{"timing_s/step": 12.0}), _step(**{"timing_s/step": 14.0})]
    made = overlap.row("sync", 0.5, steps, generation_s=4.0)
    assert made == {
        "schedule": "sync",
        "injected_latency_ratio": 0.5,
        "step_s": 12.0,
        "generation_s": 4.0,
        "request_latency_s": 2.5,
        "exposed_teacher_s": 2.0,
        "update_s": 3.0,
        "staleness": 0.0,
        "num_steps": 3,
    }


def test_generation_is_the_wait_without_the_teachers_part() -> None:
    """6 s of waiting, 2 of them for the teacher."""
    assert overlap.generation_s([_step()]) == 4.0


def test_rows_are_compared_with_the_serial_one_of_their_ratio() -> None:
    """And stay as they are where that was not measured."""
    rows = [
        overlap.row("serial", 1.0, [_step(**{"timing/teacher_knowledge": 4.0})], generation_s=4.0),
        overlap.row("separate_async", 1.0, [_step(**{"timing_s/step": 5.0})], generation_s=4.0),
        overlap.row("sync", 2.0, [_step()], generation_s=4.0),
    ]
    serial, separate, alone = overlap.compare(rows)
    assert (serial["speedup"], serial["teacher_latency_s"]) == (1.0, 4.0)
    assert (separate["speedup"], separate["teacher_latency_s"]) == (2.0, 4.0)
    assert alone == rows[2]


def test_lengths_have_a_long_tail() -> None:
    """They depend on the text alone; most are short, and the longest is reached."""
    vllm_metadata.install_vllm_alias()
    from benchmarks.overlap_rollout import SHORTEST, response_tokens

    lengths = np.array([response_tokens(f"{i}", 384) for i in range(2000)])
    assert response_tokens("7", 384) == lengths[7]
    assert lengths.min() >= SHORTEST
    assert lengths.max() <= 384
    assert lengths.max() > 350
    assert np.median(lengths) == pytest.approx((SHORTEST * 384) ** 0.5, rel=0.1)
