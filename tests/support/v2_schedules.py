"""Random schedules for `v2_batches.Driver`: everything that vLLM's scheduler may do to a request, by seed.

Legend: P tokens of a prompt, S scored ones, K top-k entries, C candidates, H hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from teacher_service.engine.vllm.fast.parameters import Parameters
from tests.support.v2_batches import STEP_TOKENS, Driver, H, Install, Part, Progress, Request, V

EVENTS = frozenset({
    "prefix hit", "hit up to the first scored row", "chunk of one token", "prompt ends with one token",
    "step without tokens of a request", "decode step beside a prompt", "ours and vLLM's own in a step",
    "several blocks of rows", "preempted with rows scored", "resumed with a hit", "resumed after its answer",
    "vLLM's own preempted in its prompt", "vLLM's own resumed after its answer", "aborted with rows scored",
    "ours where vLLM's own was", "vLLM's own where ours was",
})  # fmt: skip
"""What the schedules of many seeds must have brought about."""
LONGEST, LONGEST_AMONG_OTHERS = 100, 24
"""Tokens of a prompt; the latter where vLLM's own code scores requests too: interpreted, a row takes it 15 ms."""


def run(seed: int, install: Install) -> Counter[str]:
    """Drive one schedule to its end; returns how often each event happened.

    Raises:
        AssertionError: an answer was wrong, early, late, or left something behind.
    """
    schedule = _Schedule(seed, install)
    while schedule.go_on():
        pass
    return schedule.events


class _Schedule:
    """Requests that wait and run, and the driver that computes them."""

    def __init__(self, seed: int, install: Install) -> None:
        self.events = Counter[str]()
        self._rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self._driver = Driver(install, torch.randn(H, V, generator=generator))
        is_mixed = seed % 4 == 0
        self._waiting = [
            Progress(_random_request(self._rng, generator, f"seed {seed} request {number}", is_mixed=is_mixed))
            for number in range(int(self._rng.integers(5, 11)))
        ]
        self._running: list[Progress] = []
        self._preempted: set[Progress] = set()
        self._was_ours: dict[int, bool] = {}

    def go_on(self) -> bool:
        """One step, or none where nothing was chosen; returns whether requests are left."""
        self._disturb()
        while self._waiting and self._driver.has_room and self._rng.random() < 0.6:
            self._admit(self._waiting.pop(0))
        parts = self._choose()
        if parts:
            self._note(parts)
            self._driver.step(parts)
            self._count("several blocks of rows", self._driver.num_blocks > 1)
        for done in [one for one in self._running if one.is_done]:
            self._remove(done)
        if not (self._waiting or self._running):
            self._driver.assert_empty()
        return bool(self._waiting or self._running)

    def _admit(self, progress: Progress) -> None:
        hit = self._hit(progress)
        index = self._driver.admit(progress, hit=hit)
        self._running.append(progress)
        is_ours, is_back = _is_ours(progress), progress.is_answered
        self._count("resumed after its answer", is_ours and is_back)
        self._count("vLLM's own resumed after its answer", not is_ours and is_back)
        self._count("prefix hit", hit > 0)
        self._count("resumed with a hit", is_ours and hit > 0 and progress in self._preempted)
        parameters = progress.request.parameters
        self._count("hit up to the first scored row", parameters is not None and 0 < hit == parameters.score_start - 1)
        earlier = self._was_ours.get(index)
        self._count("ours where vLLM's own was", is_ours and earlier is False)
        self._count("vLLM's own where ours was", not is_ours and earlier is True)
        self._was_ours[index] = is_ours

    def _hit(self, progress: Progress) -> int:
        """Tokens taken from the cache: before the first scored row; none where vLLM's own code scores the prompt."""
        request = progress.request
        if request.parameters is not None:
            longest = request.parameters.score_start - 1
        else:
            longest = len(progress.tokens) - 1 if request.num_logprobs is None else 0
        return int(self._rng.choice([0, longest, self._rng.integers(0, longest + 1)]))

    def _disturb(self) -> None:
        """Preempt a request, which then waits at the head of the queue, or abort one."""
        if not self._running or self._rng.random() > 0.3:
            return
        progress = self._running[int(self._rng.integers(len(self._running)))]
        self._remove(progress)
        is_unanswered, in_prompt = not progress.is_answered, 0 < progress.computed < len(progress.request.prompt)
        if self._rng.random() < 0.2:
            self._count("aborted with rows scored", is_unanswered and progress.num_scored > 0)
            return
        self._count("preempted with rows scored", is_unanswered and progress.num_scored > 0)
        self._count("vLLM's own preempted in its prompt", in_prompt and _is_scored_by_vllm(progress))
        self._preempted.add(progress)
        self._waiting.insert(0, progress)

    def _choose(self) -> list[Part]:
        """Some of the running requests in random order, each with one token, with some or with all."""
        parts: list[Part] = []
        budget = STEP_TOKENS
        for at in self._rng.permutation(len(self._running)):
            progress = self._running[at]
            most = min(progress.num_left, budget)
            if most > 0 and self._rng.random() < 0.8:
                parts.append(Part(progress, int(self._rng.choice([1, most, self._rng.integers(1, most + 1)]))))
                budget -= parts[-1].num_tokens
        return parts

    def _remove(self, progress: Progress) -> None:
        self._running.remove(progress)
        self._driver.remove(progress)

    def _note(self, parts: list[Part]) -> None:
        ours = [_is_ours(part.progress) for part in parts]
        decodes = [part.progress.computed >= len(part.request.prompt) for part in parts]
        singles = [part for part, decodes_now in zip(parts, decodes, strict=True) if part.num_tokens == 1 > decodes_now]
        self._count("ours and vLLM's own in a step", any(ours) and not all(ours))
        self._count("decode step beside a prompt", any(decodes) and not all(decodes))
        self._count("chunk of one token", bool(singles))
        self._count("prompt ends with one token", any(part.answers for part in singles))
        chosen = {id(part.progress) for part in parts}
        self._count(
            "step without tokens of a request",
            any(one.num_scored > 0 and not one.is_answered and id(one) not in chosen for one in self._running),
        )

    def _count(self, event: str, happened: bool) -> None:
        assert event in EVENTS, event
        self.events[event] += happened


def _is_ours(progress: Progress) -> bool:
    return progress.request.parameters is not None


def _is_scored_by_vllm(progress: Progress) -> bool:
    return not _is_ours(progress) and progress.request.num_logprobs is not None


def _random_request(rng: np.random.Generator, generator: torch.Generator, name: str, *, is_mixed: bool) -> Request:
    """Ours, or one that only generates; where it is mixed, also one whose prompt vLLM's own code scores."""
    longest = LONGEST_AMONG_OTHERS if is_mixed else LONGEST
    prompt_len = int(rng.choice([2, rng.integers(2, longest), rng.integers(2, longest)]))
    kind = rng.choice(["ours", "vLLM's own", "generates"], p=[0.45, 0.4, 0.15] if is_mixed else [0.8, 0, 0.2])
    outputs = rng.integers(0, V, int(rng.integers(1, 5))).astype(np.int32)
    return Request(
        id=f"{name}, {kind}",
        prompt=rng.integers(0, V, prompt_len).astype(np.int32),
        num_logprobs=None if kind == "generates" else int(rng.choice([0, 1, 8, V])),
        parameters=_random_parameters(rng, prompt_len) if kind == "ours" else None,
        outputs=outputs,
        hidden=torch.randn(prompt_len + len(outputs), H, generator=generator),
    )


def _random_parameters(rng: np.random.Generator, prompt_len: int) -> Parameters:
    start = int(rng.choice([1, prompt_len - 1, rng.integers(1, prompt_len)]))
    num_candidates = int(rng.choice([0, 1, 4]))
    shape = (prompt_len - start, num_candidates)
    return Parameters(
        score_start=start,
        temperature=float(rng.choice([1.0, 1.0, 0.7, 2.0])),
        entropy=bool(rng.random() < 0.5),
        candidates=rng.integers(0, V, shape).astype(np.int32) if num_candidates else None,
    )
