"""Which of a prompt's responses the teacher scores. Pure: no verl, no clock, no global random state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from trainer.errors import SelectionError


def select_random(*, num_responses: int, k: int, seed: int, group: str) -> frozenset[int]:
    """Draw k of a group's responses, the same ones for the same seed and group on every machine.

    Each response gets a rank by hashing it with the seed and the group, so that a draw needs no state to resume.

    Args:
        num_responses: n; the responses are numbered 0 to n - 1.
        k: how many to draw; at most n are.
        seed: of the run.
        group: what tells this group from others, e.g. step and prompt.

    Raises:
        SelectionError: k < 1.
    """
    _check(k)

    def rank(response: int) -> bytes:
        return hashlib.sha256(f"{seed}|{response}|{group}".encode()).digest()

    return frozenset(sorted(range(num_responses), key=rank)[:k])


def select_by_reward(rewards: Mapping[int, float], *, k: int, best: bool) -> frozenset[int]:
    """The k responses of highest (`best`) or lowest reward; among equals, the lower number comes first.

    Args:
        rewards: reward by number of response; a response that failed is absent.
        k: how many; all, where there are fewer.
        best: highest rather than lowest.

    Raises:
        SelectionError: k < 1, or a reward is NaN and has no rank.
    """
    _check(k)
    for response, reward in rewards.items():
        if math.isnan(reward):
            raise SelectionError(f"the reward of response {response} is NaN, so best and worst are undefined")
    sign = -1.0 if best else 1.0
    return frozenset(sorted(rewards, key=lambda response: (sign * rewards[response], response))[:k])


def _check(k: int) -> None:
    if k < 1:
        raise SelectionError(f"k is {k}; at least 1 response must be selected")
