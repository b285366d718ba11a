"""The scaling benchmark: what a row says of a timeline, and that a lost call is counted."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable

import pytest

from benchmarks import scale
from benchmarks.scale_load import DIP_WINDOW_S, Load, Run, Timeline
from protos.arrays import ScoreArrays
from teacher_service.engine.fake import FakeEngine
from teacher_service.types import ScoreJob
from tests.support.service import running_service
from tests.support.waiting import until
from trainer.teacher import TeacherClient
from trainer.teacher.canary import canary_token_ids

ENDPOINTS = ("a:1", "b:1", "c:1", "d:1")


def _answers(endpoint: str, start_s: float, end_s: float, per_s: float) -> list[tuple[float, str]]:
    """Evenly spaced."""
    count = round((end_s - start_s) * per_s)
    return [(start_s + (number + 0.5) / per_s, endpoint) for number in range(count)]


def _timeline(*parts: list[tuple[float, str]]) -> Timeline:
    return Timeline(answers=sorted(itertools.chain(*parts)))


def _run(event: str, timeline: Timeline, endpoints: tuple[str, ...] = ENDPOINTS) -> Run:
    """Measured from 10 s on; the event at 20 s, a pause until 30 s, the end at 40 s."""
    event_s, resume_s, end_s = {"none": (20, 20, 20), "killed": (20, 40, 40), "paused": (20, 30, 40)}[event]
    return Run(
        event=event,
        endpoints=endpoints,
        timeline=timeline,
        start_s=10,
        event_s=event_s,
        resume_s=resume_s,
        end_s=end_s,
        cpu_share=0.5,
    )


def test_efficiency_compares_with_as_many_single_replicas() -> None:
    """Two replicas of 8 and 12 a second, where one alone gave 12.5; what came in the warm-up counts for nothing."""
    done = _run("none", _timeline(_answers("a:1", 0, 20, 8), _answers("b:1", 0, 20, 12)), ENDPOINTS[:2])
    assert scale.row(done, single_per_s=12.5) == {
        "replicas": 2,
        "event": "none",
        "sequences_per_s": 20.0,
        "efficiency": 0.8,
        "fairness": 0.667,
        "lost": 0,
        "retries": 0,
        "cpu_share": 0.5,
    }


def test_a_replica_without_an_answer_is_as_unfair_as_can_be() -> None:
    """Also where none gave one."""
    assert _timeline(_answers("a:1", 10, 20, 8)).fairness(("a:1", "b:1"), 10, 20) == 0
    assert Timeline().fairness(("a:1", "b:1"), 10, 20) == 0


def test_a_killed_replica_costs_its_share() -> None:
    """Three of four go on at once: no dip, three quarters kept, and the efficiency counts the three."""
    left = [_answers(name, 10, 40, 10) for name in ENDPOINTS[:3]]
    made = scale.row(_run("killed", _timeline(*left, _answers("d:1", 10, 20, 10))), single_per_s=10)
    assert (made["sequences_per_s"], made["efficiency"], made["kept"], made["fairness"]) == (30.0, 1.0, 0.75, 1.0)
    assert made["dip_s"] == 0
    assert not {"resumed", "back_after_s"} & made.keys()


def test_a_standstill_is_a_dip_and_part_of_what_was_kept() -> None:
    """Nothing for 4 of 20 s: the dip lasts as long, within the window that it is looked for with."""
    left = [_answers(name, *span, 10) for name in ENDPOINTS[:3] for span in ((10, 20), (24, 40))]
    made = scale.row(_run("killed", _timeline(*left, _answers("d:1", 10, 20, 10))), single_per_s=10)
    assert made["kept"] == 0.6
    assert float(made["dip_s"]) == pytest.approx(4, abs=DIP_WINDOW_S)


def test_a_paused_replica_is_seen_to_come_back() -> None:
    """2 s after SIGCONT."""
    left = [_answers(name, 10, 40, 10) for name in ENDPOINTS[:3]]
    back = [_answers("d:1", *span, 10) for span in ((10, 20), (32, 40))]
    made = scale.row(_run("paused", _timeline(*left, *back)), single_per_s=10)
    assert (made["sequences_per_s"], made["resumed"], made["back_after_s"]) == (30.0, 0.95, 2.0)


def test_a_replica_that_stays_away_has_no_time_of_return() -> None:
    """The lost calls are counted over all reasons."""
    timeline = _timeline(*[_answers(name, 10, 40, 10) for name in ENDPOINTS[:3]], _answers("d:1", 10, 20, 10))
    timeline.lost = Counter(UNREACHABLE=2, WRONG=1)
    made = scale.row(_run("paused", timeline), single_per_s=10)
    assert "back_after_s" not in made
    assert (made["resumed"], made["lost"]) == (0.75, 3)


def test_the_table_shows_what_does_not_apply() -> None:
    """As a dash."""
    timeline = _timeline(*[_answers(name, 10, 20, 10) for name in ENDPOINTS])
    table = scale.table([scale.row(_run("none", timeline), single_per_s=10)])
    assert [next(iter(column.cells)) for column in table.columns if column.header in ("event", "dip s")] == [
        "none",
        "-",
    ]


class ShiftedEngine(FakeEngine):
    """Answers for one position before each."""

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        shifted = dataclasses.replace(job, token_ids=job.token_ids[1:], score_start=job.score_start - 1)
        return await super().score(shifted)


@pytest.mark.parametrize(
    ("engine", "lost"),
    [
        (lambda token_id: FakeEngine(), set()),
        (lambda token_id: FakeEngine(failing_token_id=token_id), {"ENGINE_ERROR"}),
        (lambda token_id: ShiftedEngine(), {"WRONG"}),
    ],
)
async def test_the_load_tells_answers_from_lost_calls(engine: Callable[[int], FakeEngine], lost: set[str]) -> None:
    """Right answers, errors and wrong answers of a real service; a random sequence holds all tokens, or nearly."""
    async with running_service(FakeEngine()) as healthy, TeacherClient(endpoints=[healthy.addresses.grpc]) as client:
        in_canary = canary_token_ids(client.manifest)
    token_id = next(one for one in range(len(in_canary) + 1) if one not in in_canary)
    async with (
        running_service(engine(token_id)) as service,
        TeacherClient(endpoints=[service.addresses.grpc]) as client,
    ):
        load = Load(client, retry_after_s=0.01)
        async with load.running(2) as timeline:
            await until(lambda: len(timeline.answers) + timeline.lost.total() >= 1)
    assert timeline.lost.keys() == lost
    if not lost:
        assert {endpoint for _, endpoint in timeline.answers} == {service.addresses.grpc}


def test_a_single_replica_comes_first_and_the_killed_one_last() -> None:
    """Every efficiency needs the first, and nothing can follow the last."""
    assert scale.plans([8, 2]) == [(1, "none"), (2, "none"), (8, "none"), (4, "paused"), (4, "killed")]
