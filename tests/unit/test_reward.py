"""The reward of question-and-answer rows."""

from __future__ import annotations

import pytest

from trainer.verl_adapter.dataset import DATA_SOURCE
from trainer.verl_adapter.reward import compute_score


@pytest.mark.parametrize(("response", "score"), [("12345", 1.0), (" 12345\n", 1.0), ("12354", 0.0), ("", 0.0)])
def test_a_right_answer_is_the_ground_truth_but_for_white_space(response: str, score: float) -> None:
    """Exact match."""
    assert compute_score(DATA_SOURCE, response, "12345") == score


def test_other_sources_keep_verls_reward() -> None:
    """A source that verl knows is scored by verl, and one that nobody knows is refused by verl."""
    assert compute_score("openai/gsm8k", "#### 72", "72") == 1.0
    with pytest.raises(NotImplementedError, match="nobody"):
        compute_score("nobody", "a", "a")
