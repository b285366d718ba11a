"""Rewards that differ between the responses of an untrained model."""

from __future__ import annotations


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_rest: object) -> float:
    """Digits in the response: an integer, so that ties happen."""
    return float(sum(one.isdigit() for one in solution_str))
