"""Siblings that wait for each other's reward."""

from __future__ import annotations

import asyncio

from trainer.verl_adapter.prompt_group import PromptGroup


async def test_rewards_are_given_out_once_all_are_there() -> None:
    """Nobody goes on early, everybody goes on in the end."""
    group = PromptGroup(2)
    waiting = asyncio.create_task(group.rewards())
    group.settle(0, 0.5)
    await asyncio.sleep(0)
    assert not waiting.done()
    group.settle(1, 1.5)
    assert await waiting == {0: 0.5, 1: 1.5}


async def test_a_failed_sibling_releases_the_others() -> None:
    """It settles without a reward, and is absent."""
    group = PromptGroup(3)
    group.settle(0, 0.5)
    group.settle(2)
    group.settle(1, 1.5)
    assert await group.rewards() == {0: 0.5, 1: 1.5}


async def test_only_the_first_word_counts() -> None:
    """A response that has its reward can't lose it when its session ends."""
    group = PromptGroup(1)
    group.settle(0, 0.5)
    group.settle(0)
    assert await group.rewards() == {0: 0.5}
