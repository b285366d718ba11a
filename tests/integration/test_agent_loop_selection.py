"""When the worker asks the teacher, and for which responses: its code between verl's steps, and a counting teacher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.config import GKDConfig
from trainer.config.gkd import ActorConfig, SelectStrategy, TeacherConfig
from trainer.errors import TeacherFailedError
from trainer.types import TeacherScores, TeacherTimings
from trainer.verl_adapter.cpu import vllm_metadata

K, N = 2, 4
WAIT_S = 10.0


@pytest.fixture(scope="module", autouse=True)
def _vllm_alias() -> None:
    """verl asks for the metadata of `vllm` at import."""
    vllm_metadata.install_vllm_alias()


class CountingTeachers:
    """Answer at once, and remember the first response token of each request, and who was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.names: list[str] = []
        self.affinities: set[str] = set()
        self.error: TeacherFailedError | None = None

    async def score(
        self, name: str, token_ids: Sequence[int], *, score_start: int, affinity: str
    ) -> tuple[TeacherScores, int]:
        """As `Teachers.score`, of ones."""
        self.asked.append(token_ids[score_start])
        self.names.append(name)
        self.affinities.add(affinity)
        if self.error is not None:
            raise self.error
        length = len(token_ids) - score_start
        scores = TeacherScores(
            sampled_logprobs=np.full(length, -1.0, np.float32),
            topk_token_ids=np.tile(np.arange(K, dtype=np.int32), (length, 1)),
            topk_logprobs=np.full((length, K), -1.0, np.float32),
            log_tail_mass=np.full(length, -1.3, np.float32),
            entropy=None,
            manifest_digest="d",
            endpoint="e",
            timings=TeacherTimings(total_s=0.0, queue_s=0.0, engine_s=0.0),
        )
        return scores, len(self.asked)


class Bench:
    """N responses of one prompt on a worker without verl's engine; response i has the token 10 + i."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        strategy: SelectStrategy,
        *,
        k: int = 1,
        only: bool = False,
        **teacher: Any,
    ) -> None:
        from trainer.verl_adapter import agent_loop
        from trainer.verl_adapter.prompt_group import PromptGroup

        self.teacher = CountingTeachers()
        self.tags: dict[str, dict[str, Any]] = {}
        self.rewards: dict[int, asyncio.Future[float]] = {}
        self.worker = agent_loop.GKDAgentLoopWorker.__new__(agent_loop.GKDAgentLoopWorker)
        actor = ActorConfig(use_teacher_kl_loss=True, gkd_only_mode=only, gkd_select_strategy=strategy, gkd_select_k=k)
        self.worker._gkd = GKDConfig(actor=actor, teacher=TeacherConfig(num_logprobs=K, **teacher))
        self.worker._groups = {"u": PromptGroup(N)}
        self.worker._teachers = self.teacher
        self.worker.config = SimpleNamespace(gkd_run_id="run")
        bench = self

        class Plain:
            async def _run_agent_loop(self, _params: object, _trajectory: object, **kwargs: Any) -> Any:
                output = SimpleNamespace(
                    prompt_ids=[1], response_ids=[10 + kwargs["session_id"], 5], reward_score=None, extra_fields={}
                )
                await self._agent_loop_postprocess(output, False, **kwargs)  # type: ignore[attr-defined]
                return output

            async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> None:
                # verl's order, which tests/integration/test_upstream.py holds it to
                await self._compute_score([output], kwargs)
                await self._compute_teacher_logprobs(  # type: ignore[attr-defined]
                    output, output.prompt_ids, output.response_ids, validate, sample_kwargs=kwargs
                )

            async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
                outputs[-1].reward_score = await bench.rewards[kwargs["session_id"]]

        async def keep_tag(key: str, partition_id: str, tag: dict[str, Any]) -> None:
            assert partition_id == "train"
            self.tags[key] = tag

        monkeypatch.setattr(agent_loop.tq, "async_kv_put", keep_tag)
        for name in ("_run_agent_loop", "_agent_loop_postprocess", "_compute_score"):
            monkeypatch.setattr(agent_loop._PlainWorker, name, getattr(Plain, name))

    def start(self, **changes: object) -> list[asyncio.Task[Any]]:
        """All N responses, each waiting for its reward."""
        self.rewards = {i: asyncio.get_running_loop().create_future() for i in range(N)}
        kwargs = {"uid": "u", "global_steps": 3, "raw_prompt": [{"role": "user", "content": "q"}], **changes}
        return [
            asyncio.create_task(self.worker._run_agent_loop({}, {}, agent_name="a", session_id=i, **kwargs))
            for i in range(N)
        ]

    def reward(self, *values: float) -> None:
        """Hand out the rewards in order."""
        for i, value in enumerate(values):
            self.rewards[i].set_result(value)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # what is waited for knows nothing of the test
            await asyncio.sleep(0)


async def _all(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.gather(*tasks, return_exceptions=True)


def _scored(outputs: list[Any]) -> list[int]:
    return [i for i, one in enumerate(outputs) if len(one.extra_fields["teacher_ids"])]


async def test_all_are_asked_for_before_any_reward_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher works while the rewards are computed."""
    bench = Bench(monkeypatch, "all")
    tasks = bench.start()
    await _until(lambda: len(bench.teacher.asked) == N)
    assert not any(task.done() for task in tasks)
    bench.reward(0, 0, 0, 0)
    assert _scored(await _all(tasks)) == [0, 1, 2, 3]


async def test_random_ones_are_asked_for_before_any_reward_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """k of n, and the same ones for the same step and prompt; another step draws anew."""
    draws = []
    for step in (3, 3, *range(4, 24)):
        bench = Bench(monkeypatch, "random", k=2)
        tasks = bench.start(global_steps=step)
        await _until(lambda teacher=bench.teacher: len(teacher.asked) == 2)
        bench.reward(0, 0, 0, 0)
        outputs = await _all(tasks)
        assert len(bench.teacher.asked) == 2
        draws.append(tuple(_scored(outputs)))
    assert draws[0] == draws[1]
    assert len(set(draws)) > 1


@pytest.mark.parametrize(("strategy", "expected"), [("best", [1, 2]), ("worst", [0, 3])])
async def test_ranked_ones_wait_for_every_reward(
    monkeypatch: pytest.MonkeyPatch, strategy: SelectStrategy, expected: list[int]
) -> None:
    """The documented example: rewards .3, .8, .5, .2 and k = 2. Nobody else costs teacher time."""
    bench = Bench(monkeypatch, strategy, k=2)
    tasks = bench.start()
    bench.reward(0.3, 0.8, 0.5)
    for _ in range(50):
        await asyncio.sleep(0)
    assert bench.teacher.asked == []
    bench.rewards[3].set_result(0.2)
    outputs = await _all(tasks)
    assert _scored(outputs) == expected
    assert sorted(bench.teacher.asked) == [10 + i for i in expected]
    unselected = next(one for i, one in enumerate(outputs) if i not in expected)
    assert unselected.extra_fields["teacher_ids"].shape == (0, K)
    assert unselected.extra_fields["teacher_logprobs"].shape == (0, K + 2)


async def test_a_failed_sibling_never_hangs_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reward fails: the others are ranked without it, and its error is not swallowed."""
    bench = Bench(monkeypatch, "best", k=1)
    tasks = bench.start()
    bench.rewards[1].set_exception(RuntimeError("no reward"))
    bench.rewards[0].set_result(0.1)
    bench.rewards[2].set_result(0.2)
    bench.rewards[3].set_result(0.3)
    results = await _all(tasks)
    assert isinstance(results[1], RuntimeError)
    assert bench.teacher.asked == [13]


async def test_distillation_alone_asks_for_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody hands out rewards, and nobody waits for one."""
    bench = Bench(monkeypatch, "all", only=True)
    outputs = await _all(bench.start())
    assert _scored(outputs) == [0, 1, 2, 3]
    assert all(one.reward_score is None for one in outputs)


async def test_a_teacher_error_stays_with_its_response_and_tells_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The response is not dropped without a word, and the trainer need not wait for the others."""
    bench = Bench(monkeypatch, "all", only=True)
    bench.teacher.error = TeacherFailedError("broken", endpoint="e", reason="R")
    before = time.time()
    outputs = await _all(bench.start())
    for error in (one.extra_fields["gkd_teacher_error"] for one in outputs):
        assert before <= error.pop("ended_at_s") <= time.time()
        assert error == {"teacher": "teacher", "message": "broken"}
    assert bench.tags == {f"u_{i}_0": {"gkd_teacher_lost": "broken"} for i in range(N)}
    assert _scored(outputs) == []


async def test_under_degrade_the_trainer_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't hold a step to min_coverage otherwise."""
    bench = Bench(monkeypatch, "all", on_failure="degrade")
    bench.teacher.error = TeacherFailedError("broken", endpoint="e", reason="R")
    tasks = bench.start()
    bench.reward(0, 0, 0, 0)
    assert _scored(await _all(tasks)) == []
    assert bench.tags == {f"u_{i}_0": {"gkd_teacher_lost": "broken"} for i in range(N)}


async def test_the_column_chooses_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's data source has its own teacher, the rest has another; siblings share an affinity."""
    bench = Bench(monkeypatch, "all", only=True, routes={"math": "m:1", "*": "r:1"})
    await _all([*bench.start(data_source="math")])
    await _all([*bench.start(data_source="code")])
    assert bench.teacher.names == ["math"] * N + ["*"] * N
    assert bench.teacher.affinities == {"u"}


async def test_a_row_without_a_route_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error names the value and the routes."""
    bench = Bench(monkeypatch, "all", only=True, routes={"math": "m:1"})
    results = await _all(bench.start(data_source="code"))
    assert all("data_source='code'" in str(one) and "math" in str(one) for one in results)
    assert bench.teacher.asked == []
