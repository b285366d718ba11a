"""The reward of plain question-and-answer rows; every other row keeps verl's."""

from __future__ import annotations

from typing import Any

from verl.utils.reward_score import default_compute_score

from trainer.verl_adapter.dataset import DATA_SOURCE


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **options: Any,  # verl's reward managers pass options of their own
) -> Any:
    """1.0 where the response is the answer but for white space around it, else 0.0; verl's own for its own sources."""
    if data_source == DATA_SOURCE:
        return float(solution_str.strip() == ground_truth.strip())
    return default_compute_score(data_source, solution_str, ground_truth, extra_info, **options)
