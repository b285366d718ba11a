"""Which replica gets the next attempt: by hand, and by simulation with a clock of its own."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from trainer.teacher.balancer import Balancer, Load, PeakEwma
from trainer.teacher.breaker import Breaker

WORK = 1000


def loads(*names: str, pace: float = 1e-4) -> dict[str, Load]:
    """Idle replicas of equal speed."""
    made = {name: Load() for name in names}
    for load in made.values():
        load.pace.observe(pace, 0.0)
    return made


def pick(balancer: Balancer, loads: dict[str, Load], affinity: str | None = None, now_s: float = 0.0) -> str:
    """Pick, and leave the attempt under way."""
    name = balancer.pick(loads, work=WORK, affinity=affinity, now_s=now_s)
    assert name is not None
    loads[name].begin(WORK)
    return name


def test_attempts_under_way_spread_evenly() -> None:
    """Of equals, the one with less to do is picked."""
    replicas = loads("a:1", "b:1", "c:1")
    balancer = Balancer()
    assert Counter(pick(balancer, replicas) for _ in range(6)) == {"a:1": 2, "b:1": 2, "c:1": 2}


def test_idle_replicas_take_turns() -> None:
    """One call after the other does not always land on one, though it may look faster by a little."""
    replicas = loads("a:1", "b:1")
    replicas["b:1"].pace.observe(1.1e-4, 0.0)
    balancer = Balancer()
    picked = [balancer.pick(replicas, work=WORK, affinity=None, now_s=0.0) for _ in range(6)]
    assert picked == ["a:1", "b:1"] * 3


def test_work_counts_not_calls() -> None:
    """One long sequence weighs more than two short ones."""
    replicas = loads("a:1", "b:1")
    replicas["a:1"].begin(10 * WORK)
    for _ in range(2):
        replicas["b:1"].begin(WORK)
    assert pick(Balancer(), replicas) == "b:1"


def test_without_replicas_there_is_no_choice() -> None:
    """The pool waits then."""
    assert Balancer().pick({}, work=WORK, affinity=None, now_s=0.0) is None


def test_a_replica_that_nothing_is_known_of_is_taken_for_a_usual_one() -> None:
    """A new replica gets its share, not all traffic."""
    replicas = loads("a:1", "b:1") | {"new:1": Load()}
    balancer = Balancer()
    assert Counter(pick(balancer, replicas) for _ in range(9)) == {"a:1": 3, "b:1": 3, "new:1": 3}


def test_an_estimate_jumps_up_and_comes_down_slowly() -> None:
    """Slowness is believed at once; ten seconds later a third of it is left."""
    estimate = PeakEwma()
    assert estimate.at(0.0) == 0.0
    estimate.observe(1.0, 0.0)
    estimate.observe(8.0, 1.0)
    assert estimate.at(1.0) == 8.0
    assert estimate.at(11.0) == pytest.approx(8.0 / 2.718, rel=1e-3)
    estimate.observe(1.0, 1.1)
    assert 7.5 < estimate.at(1.1) < 8.0


def test_an_attempt_that_is_still_unanswered_only_raises_the_estimate() -> None:
    """Taking back a call after a short time says nothing good about a replica."""
    load = loads("a:1")["a:1"]
    load.unanswered(0.001, WORK, 0.0)
    assert load.pace.at(0.0) == 1e-4
    load.unanswered(10.0, WORK, 0.0)
    assert load.pace.at(0.0) == 1e-2


def test_a_replica_that_missed_a_deadline_is_asked_again_after_seconds() -> None:
    """Its estimate would take a minute to decay; one that all share, while nobody calls, is no reason to forget."""
    replicas = loads("a:1", "b:1")
    balancer = Balancer()
    replicas["a:1"].unanswered(30.0, WORK, 0.0)
    for second in range(1, 5):
        replicas["b:1"].pace.observe(1e-4, float(second))
        assert balancer.pick(replicas, work=WORK, affinity=None, now_s=second) == "b:1"
    assert balancer.pick(replicas, work=WORK, affinity=None, now_s=60.0) == "b:1"
    replicas["b:1"].pace.observe(1e-4, 60.0)
    assert balancer.pick(replicas, work=WORK, affinity=None, now_s=60.0) == "a:1"


def test_siblings_stay_together() -> None:
    """Calls of one affinity go to one replica, those of many spread over all."""
    replicas = loads("a:1", "b:1", "c:1", "d:1")
    balancer = Balancer()
    home = {
        affinity: {balancer.pick(replicas, work=WORK, affinity=affinity, now_s=0.0) for _ in range(8)}
        for affinity in map(str, range(400))
    }
    assert all(len(names) == 1 for names in home.values())
    shares = Counter(next(iter(names)) for names in home.values())
    assert all(60 < shares[name] < 140 for name in replicas), shares


def test_a_replica_that_leaves_or_comes_moves_only_its_own_share() -> None:
    """Rendezvous hashing: prefix caches elsewhere stay warm."""
    balancer, names = Balancer(), [f"r{i}:1" for i in range(5)]

    def homes(names: list[str]) -> dict[str, str | None]:
        replicas = loads(*names)
        return {key: balancer.pick(replicas, work=WORK, affinity=key, now_s=0.0) for key in map(str, range(500))}

    before, after = homes(names), homes(names[:-1])
    moved = {key for key in before if before[key] != after[key]}
    assert moved == {key for key, name in before.items() if name == "r4:1"}
    assert 50 < len(moved) < 150


def test_siblings_part_where_waiting_for_their_replica_is_clearly_worse() -> None:
    """A group stays together for a few calls, and does not queue behind itself while others are idle."""
    replicas = loads("a:1", "b:1", "c:1")
    balancer = Balancer()
    picked = [pick(balancer, replicas, affinity="prompt") for _ in range(12)]
    assert len(set(picked[:5])) == 1
    assert len(set(picked)) == 3


class Simulation:
    """Replicas that serve one attempt after the other, under a number of callers that never rest."""

    def __init__(
        self, names: list[str], *, seconds: Callable[[str], float], fails: Callable[[str, float], bool]
    ) -> None:
        self.seconds, self.fails = seconds, fails
        self.loads = {name: Load() for name in names}
        self.breakers = {name: Breaker() for name in names}
        self.free_at_s = dict.fromkeys(names, 0.0)
        self.balancer = Balancer()
        self.answered: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()

    def run(self, *, num_callers: int, until_s: float) -> None:
        """Let the callers call until the clock stands there."""
        order = itertools.count()
        ready: list[tuple[float, int, Callable[[float], None] | None]] = [
            (0.001 * i, next(order), None) for i in range(num_callers)
        ]
        while ready and ready[0][0] < until_s:
            now_s, _, finish = heapq.heappop(ready)
            if finish is not None:
                finish(now_s)
            self._probe(now_s)
            admitting = {name: self.loads[name] for name in self.loads if self.breakers[name].is_closed}
            name = self.balancer.pick(admitting, work=WORK, affinity=None, now_s=now_s)
            if name is None:
                heapq.heappush(ready, (now_s + 0.05, next(order), None))
                continue
            ends_s, finish = self._attempt(name, now_s)
            heapq.heappush(ready, (ends_s, next(order), finish))

    def _probe(self, now_s: float) -> None:
        for name, breaker in self.breakers.items():
            if breaker.probe_at_s is None or now_s < breaker.probe_at_s:
                continue
            if self.fails(name, now_s):
                breaker.failed(breaker.begin(), now_s)
            else:
                breaker.succeeded(breaker.begin())
                self.loads[name].forget()

    def _attempt(self, name: str, now_s: float) -> tuple[float, Callable[[float], None]]:
        self.attempts[name] += 1
        load, breaker = self.loads[name], self.breakers[name]
        permit, outstanding = breaker.begin(), load.begin(WORK)
        is_failure = self.fails(name, now_s)
        if is_failure:
            ends_s = now_s + 0.001
        else:
            ends_s = self.free_at_s[name] = max(self.free_at_s[name], now_s) + self.seconds(name)

        def finish(at_s: float) -> None:
            load.end(WORK)
            if is_failure:
                breaker.failed(permit, at_s)
            else:
                breaker.succeeded(permit)
                load.answered(at_s - now_s, outstanding, at_s)
                self.answered[name] += 1

        return ends_s, finish


NAMES = ["a:1", "b:1", "c:1", "d:1"]


def never(_name: str, _now_s: float) -> bool:
    return False


@pytest.mark.parametrize("num_callers", [4, 16, 64])
def test_equals_share_equally(num_callers: int) -> None:
    """Four equal replicas answer a quarter each, and are kept busy."""
    rng = random.Random(0)  # noqa: S311 no secret
    simulation = Simulation(NAMES, seconds=lambda _: 0.1 * rng.uniform(0.5, 1.5), fails=never)
    simulation.run(num_callers=num_callers, until_s=100.0)
    total = simulation.answered.total()
    assert total > 0.75 * 4 * 1000
    assert all(0.2 < simulation.answered[name] / total < 0.3 for name in NAMES), simulation.answered


@pytest.mark.parametrize("num_callers", [8, 32])
def test_a_slow_replica_gets_as_much_as_it_can_do(num_callers: int) -> None:
    """One of four is ten times slower: the others work on at nearly full speed."""
    rng = random.Random(0)  # noqa: S311 no secret
    simulation = Simulation(
        NAMES, seconds=lambda name: (1.0 if name == "a:1" else 0.1) * rng.uniform(0.5, 1.5), fails=never
    )
    simulation.run(num_callers=num_callers, until_s=100.0)
    total = simulation.answered.total()
    assert simulation.answered["a:1"] / total < 0.05
    assert total > 0.8 * 3 * 1000


def test_a_replica_that_fails_fast_draws_no_traffic() -> None:
    """One of four fails within a millisecond, always idle: it sees a handful of attempts, the others do all work."""
    simulation = Simulation(NAMES, seconds=lambda _: 0.1, fails=lambda name, _: name == "a:1")
    simulation.run(num_callers=16, until_s=100.0)
    assert simulation.answered.total() > 0.9 * 3 * 1000
    assert simulation.attempts["a:1"] < 100
    assert simulation.answered["a:1"] == 0


def test_a_replica_that_is_well_again_gets_its_share_again() -> None:
    """Failing for the first half, it is in full use within the longest ejection."""
    simulation = Simulation(NAMES, seconds=lambda _: 0.1, fails=lambda name, now_s: name == "a:1" and now_s < 50.0)
    simulation.run(num_callers=16, until_s=130.0)
    before = simulation.answered.copy()
    simulation = Simulation(NAMES, seconds=lambda _: 0.1, fails=lambda name, now_s: name == "a:1" and now_s < 50.0)
    simulation.run(num_callers=16, until_s=150.0)
    late = simulation.answered - before
    assert 0.2 < late["a:1"] / late.total() < 0.3
