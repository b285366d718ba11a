"""Admission: order of arrival, budgets, refusal, and places that never leak."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_service.admission import Admission, AdmissionLimits, Demand, MemoryBudget, Phase
from teacher_service.admission.throughput import Throughput
from teacher_service.errors import (
    DrainingError,
    EngineDeadError,
    NotReadyError,
    OverloadedError,
    OverMemoryBudgetError,
    TeacherServiceError,
)
from teacher_service.types import Price

FREE = Price(held_bytes=0)


def open_admission(
    *,
    requests: int = 100,
    tokens: int = 100,
    queued_requests: int = 100,
    queued_tokens: int = 1000,
    memory: MemoryBudget | None = None,
) -> Admission:
    admission = Admission(
        AdmissionLimits(
            max_inflight_requests=requests,
            max_inflight_tokens=tokens,
            max_queued_requests=queued_requests,
            max_queued_tokens=queued_tokens,
        )
    )
    if memory is not None:
        admission.bound_memory(memory)
    admission.phase = Phase.SERVING
    return admission


class Job:
    """Holds a place until it is told to leave."""

    def __init__(
        self, admission: Admission, num_tokens: int, *, client: str = "", account: str = "", price: Price = FREE
    ) -> None:
        self.entered = asyncio.Event()
        self.leave = asyncio.Event()
        demand = Demand(num_tokens=num_tokens, client=client, account=account, price=price)
        self.task = asyncio.create_task(self._run(admission, demand))

    async def _run(self, admission: Admission, demand: Demand) -> None:
        async with admission.admit(demand):
            self.entered.set()
            await self.leave.wait()

    async def finish(self) -> None:
        """Leave, and wait until it has left."""
        self.leave.set()
        await self.task


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def state(admission: Admission) -> tuple[int, int, int, int]:
    return (
        admission.inflight_requests,
        admission.inflight_tokens,
        admission.queued_requests,
        admission.queued_tokens,
    )


async def test_the_token_budget_bounds_what_is_inside() -> None:
    """60 of 100 tokens are taken: 40 still fit, 41 wait until the 60 leave."""
    admission = open_admission(tokens=100)
    first, small, large = Job(admission, 60), Job(admission, 40), Job(admission, 41)
    await settle()
    assert [job.entered.is_set() for job in (first, small, large)] == [True, True, False]
    assert state(admission) == (2, 100, 1, 41)
    await first.finish()
    await settle()
    assert large.entered.is_set()
    await small.finish()
    await large.finish()
    assert state(admission) == (0, 0, 0, 0)


async def test_the_request_budget_bounds_what_is_inside() -> None:
    """Two sequences at a time, however short."""
    admission = open_admission(requests=2)
    jobs = [Job(admission, 1) for _ in range(3)]
    await settle()
    assert [job.entered.is_set() for job in jobs] == [True, True, False]
    for job in jobs:
        await job.finish()


async def test_a_small_sequence_never_overtakes_a_large_one() -> None:
    """The large one at the head waits for 90 tokens; the small one that would fit stays behind it."""
    admission = open_admission(tokens=100)
    first, large, small = Job(admission, 50), Job(admission, 90), Job(admission, 1)
    await settle()
    assert not small.entered.is_set()
    await first.finish()
    await settle()
    assert large.entered.is_set()
    assert small.entered.is_set()
    await large.finish()
    await small.finish()


@pytest.mark.parametrize(("queued_requests", "queued_tokens"), [(1, 1000), (100, 25)])
async def test_a_full_queue_refuses_and_names_value_limit_and_delay(queued_requests: int, queued_tokens: int) -> None:
    """Either bound of the queue refuses the second that waits; the first is not touched."""
    admission = open_admission(requests=1, queued_requests=queued_requests, queued_tokens=queued_tokens)
    inside, waiting = Job(admission, 20), Job(admission, 20)
    await settle()
    with pytest.raises(OverloadedError, match=r"the queue holds 1 sequences \(20 tokens\)") as caught:
        async with admission.admit(Demand(num_tokens=20)):
            pytest.fail("admitted beyond the bounds")
    assert caught.value.retry_delay_s == 1.0
    assert caught.value.metadata["value"] == "40"
    assert caught.value.metadata["limit"] == f"{queued_tokens}"
    await inside.finish()
    await waiting.finish()
    assert state(admission) == (0, 0, 0, 0)


async def test_no_queue_at_all_still_admits_what_fits() -> None:
    """With max_queued_requests 0 nothing waits, and what finds room enters."""
    admission = open_admission(requests=1, queued_requests=0)
    job = Job(admission, 5)
    await settle()
    assert job.entered.is_set()
    await job.finish()


async def test_a_cancelled_waiter_frees_its_place_for_those_behind() -> None:
    """A large sequence that gives up was all that kept a small one out."""
    admission = open_admission(tokens=100)
    first, large, small = Job(admission, 50), Job(admission, 90), Job(admission, 10)
    await settle()
    large.task.cancel()
    await settle()
    assert small.entered.is_set()
    assert state(admission) == (2, 60, 0, 0)
    await first.finish()
    await small.finish()


async def test_a_waiter_cancelled_as_it_is_granted_gives_the_place_back() -> None:
    """Grant and cancellation in the same turn of the loop leave nothing behind."""
    admission = open_admission(requests=1)
    async with admission.admit(Demand(num_tokens=5)):
        second, third = Job(admission, 5), Job(admission, 5)
        await settle()
    # leaving the block granted the second, which has not run since
    second.task.cancel()
    await settle()
    assert not second.entered.is_set()
    assert third.entered.is_set()
    await third.finish()
    assert state(admission) == (0, 0, 0, 0)


async def test_waiters_enter_in_order_of_arrival() -> None:
    """One place, three that wait: each leaving lets the next in line in, and no other."""
    admission = open_admission(requests=1)
    jobs = [Job(admission, 5) for _ in range(4)]
    for turn, job in enumerate(jobs):
        await settle()
        assert [one.entered.is_set() for one in jobs] == [i <= turn for i in range(4)]
        await job.finish()


async def test_a_waiter_cancelled_before_the_grant_is_skipped() -> None:
    """Cancellation and then a free place in the same turn: the place goes to the next in line."""
    admission = open_admission(requests=1)
    first, second, third = Job(admission, 5), Job(admission, 5), Job(admission, 5)
    await settle()
    second.task.cancel()
    await first.finish()
    await settle()
    assert third.entered.is_set()
    await third.finish()
    assert state(admission) == (0, 0, 0, 0)


async def test_failing_work_frees_its_place() -> None:
    """An exception inside leaves the budget as it was."""
    admission = open_admission()
    with pytest.raises(KeyError):
        async with admission.admit(Demand(num_tokens=5)):
            raise KeyError
    assert state(admission) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("phase", "error"),
    [(Phase.LOADING, NotReadyError), (Phase.DRAINING, DrainingError), (Phase.DEAD, EngineDeadError)],
)
async def test_closed_phases_refuse_at_once(phase: Phase, error: type[TeacherServiceError]) -> None:
    """Only SERVING takes work; nothing is queued in the other phases."""
    admission = open_admission()
    admission.phase = phase
    with pytest.raises(error):
        async with admission.admit(Demand(num_tokens=1)):
            pytest.fail("admitted while closed")
    assert state(admission) == (0, 0, 0, 0)


async def test_what_waits_when_the_drain_begins_is_still_admitted() -> None:
    """Work that was taken is finished."""
    admission = open_admission(requests=1)
    first, second = Job(admission, 5), Job(admission, 5)
    await settle()
    admission.phase = Phase.DRAINING
    await first.finish()
    await settle()
    assert second.entered.is_set()
    await second.finish()


STEPS = st.lists(
    st.tuples(st.sampled_from(["arrive", "finish", "cancel"]), st.integers(0, 30), st.integers(1, 40)), max_size=60
)


@settings(deadline=None, max_examples=60)
@given(steps=STEPS)
def test_any_history_keeps_the_bounds_and_leaves_nothing(steps: list[tuple[str, int, int]]) -> None:
    """Arrivals, ends and cancellations in any order: bounds hold at every step, and all comes back to zero."""
    asyncio.run(play(steps))


async def play(steps: list[tuple[str, int, int]]) -> None:
    memory = MemoryBudget(main_bytes=100)
    admission = open_admission(requests=3, tokens=60, queued_requests=4, queued_tokens=90, memory=memory)
    jobs: list[Job] = []
    actions: dict[str, Callable[[Job], object]] = {
        "finish": lambda job: job.leave.set(),
        "cancel": lambda job: job.task.cancel(),
    }
    for step, which, num_tokens in steps:
        if step == "arrive":
            price = Price(held_bytes=2 * num_tokens, peak_bytes=which)
            jobs.append(Job(admission, num_tokens, client=f"client-{which % 4}", price=price))
        elif jobs:
            actions[step](jobs[which % len(jobs)])
        if which % 3:
            await settle()
        inside, tokens, waiting, waiting_tokens = state(admission)
        assert 0 <= inside <= 3
        assert 0 <= tokens <= 60
        assert 0 <= waiting <= 4
        assert 0 <= waiting_tokens <= 90
        assert 0 <= admission.reserved_bytes <= 100
    for job in jobs:
        job.leave.set()
    for result in await asyncio.gather(*(job.task for job in jobs), return_exceptions=True):
        assert result is None or isinstance(result, (OverloadedError, OverMemoryBudgetError, asyncio.CancelledError))
    assert state(admission) == (0, 0, 0, 0)
    assert admission.reserved_bytes == 0


async def test_held_memory_adds_up_and_peaks_do_not() -> None:
    """Of 100 bytes two hold 30 each beside a peak of 40: a third with a peak of 40 and 1 held waits for one of them."""
    admission = open_admission(memory=MemoryBudget(main_bytes=100))
    first, second, third = (Job(admission, 1, price=Price(held_bytes=held, peak_bytes=40)) for held in (30, 30, 1))
    await settle()
    assert [job.entered.is_set() for job in (first, second, third)] == [True, True, False]
    assert (admission.reserved_bytes, admission.budget_bytes) == (100, 100)
    await first.finish()
    await settle()
    assert third.entered.is_set()
    assert admission.reserved_bytes == 30 + 1 + 40
    await second.finish()
    await third.finish()
    assert admission.reserved_bytes == 0


@pytest.mark.parametrize(
    ("budget", "price", "needed", "limit"),
    [
        (MemoryBudget(main_bytes=100), Price(held_bytes=61, peak_bytes=40), 101, 100),
        (MemoryBudget(main_bytes=100, device_bytes=10), Price(held_bytes=101), 101, 100),
        (MemoryBudget(main_bytes=100, device_bytes=10), Price(held_bytes=1, peak_bytes=11), 11, 10),
        (MemoryBudget(main_bytes=99), Price(held_bytes=50, held_device_bytes=10, peak_bytes=40), 100, 99),
        (MemoryBudget(main_bytes=100, device_bytes=9), Price(held_bytes=1, held_device_bytes=6, peak_bytes=4), 10, 9),
    ],
)
async def test_what_can_never_fit_is_refused_with_the_limit(
    budget: MemoryBudget, price: Price, needed: int, limit: int
) -> None:
    """At once, also where the engine is empty: waiting would not help."""
    admission = open_admission(memory=budget)
    with pytest.raises(OverMemoryBudgetError) as caught:
        async with admission.admit(Demand(num_tokens=1, price=price)):
            pytest.fail("admitted")
    assert caught.value.metadata == {"field": "request", "value": f"{needed}", "limit": f"{limit}"}
    assert caught.value.retry_delay_s is None
    assert state(admission) == (0, 0, 0, 0)


async def test_a_device_has_its_own_memory_for_peaks() -> None:
    """Peaks on a device take nothing of main memory."""
    admission = open_admission(memory=MemoryBudget(main_bytes=100, device_bytes=1000))
    jobs = [Job(admission, 1, price=Price(held_bytes=50, peak_bytes=1000)) for _ in range(2)]
    await settle()
    assert all(job.entered.is_set() for job in jobs)
    for job in jobs:
        await job.finish()


async def test_what_is_held_on_a_device_adds_up_below_the_largest_peak() -> None:
    """Two answers of 30 bytes and one peak of 40 fill a device of 100; a third answer waits."""
    admission = open_admission(memory=MemoryBudget(main_bytes=100, device_bytes=100))
    price = Price(held_bytes=1, held_device_bytes=30, peak_bytes=40)
    first, second, third = (Job(admission, 1, price=price) for _ in range(3))
    await settle()
    assert [job.entered.is_set() for job in (first, second, third)] == [True, True, False]
    assert admission.reserved_bytes == 2
    await first.finish()
    await settle()
    assert third.entered.is_set()
    await second.finish()
    await third.finish()


async def test_a_client_with_a_backlog_does_not_hold_up_another() -> None:
    """Twenty of one client wait; the first of another client is the next but one, not the last."""
    admission = open_admission(requests=1)
    order: list[str] = []

    async def run(client: str) -> None:
        async with admission.admit(Demand(num_tokens=10, client=client)):
            order.append(client)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(run("greedy")) for _ in range(20)]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(run("modest")) for _ in range(3)]
    await asyncio.gather(*tasks)
    assert order[:8].count("modest") == 3
    assert order.count("greedy") == 20


async def test_clients_share_by_tokens_not_by_sequences() -> None:
    """One sends 100 tokens at a time, the other 10: they get as many tokens, not as many turns."""
    admission = open_admission(requests=1, queued_tokens=100_000, queued_requests=1000)
    served = {"long": 0, "short": 0}
    history: list[tuple[int, int]] = []

    async def run(client: str, num_tokens: int) -> None:
        async with admission.admit(Demand(num_tokens=num_tokens, client=client)):
            served[client] += num_tokens
            history.append((served["long"], served["short"]))
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(run("long", 100)) for _ in range(20)]
    tasks += [asyncio.create_task(run("short", 10)) for _ in range(200)]
    await asyncio.gather(*tasks)
    assert max(abs(a - b) for a, b in history if a < 2000 and b < 2000) <= 110 + 100


async def test_a_full_queue_makes_room_for_who_has_less_in_it() -> None:
    """The last of the client with most waiting is refused with a delay; one who has no less is refused itself."""
    admission = open_admission(requests=1, queued_requests=4)
    inside = Job(admission, 5, client="greedy")
    greedy = [Job(admission, 5, client="greedy") for _ in range(4)]
    await settle()
    modest = Job(admission, 5, client="modest")
    await settle()
    with pytest.raises(OverloadedError) as caught:
        await greedy[-1].task
    assert caught.value.retry_delay_s == 1.0
    assert state(admission) == (1, 5, 4, 20)
    with pytest.raises(OverloadedError):
        await Job(admission, 5, client="greedy").task
    await asyncio.gather(*(job.finish() for job in (inside, *greedy[:-1], modest)))
    assert state(admission) == (0, 0, 0, 0)


async def test_a_queue_full_of_tokens_makes_room_too() -> None:
    """By tokens: two of 40 wait, limit 100; 30 of another take the place of one."""
    admission = open_admission(requests=1, queued_tokens=100)
    inside = Job(admission, 5, client="greedy")
    greedy = [Job(admission, 40, client="greedy") for _ in range(2)]
    await settle()
    modest = Job(admission, 30, client="modest")
    await settle()
    with pytest.raises(OverloadedError):
        await greedy[-1].task
    assert admission.queued_tokens == 70
    await asyncio.gather(*(job.finish() for job in (inside, greedy[0], modest)))


async def test_an_evicted_waiter_that_is_cancelled_as_well_leaves_nothing() -> None:
    """Refused and cancelled in the same turn of the loop: counted once."""
    admission = open_admission(requests=1, queued_requests=2)
    inside = Job(admission, 5)
    greedy = [Job(admission, 5, client="greedy") for _ in range(2)]
    await settle()
    modest = Job(admission, 5, client="modest")
    await asyncio.sleep(0)
    greedy[-1].task.cancel()
    await asyncio.gather(greedy[-1].task, return_exceptions=True)
    assert admission.queued_requests == 2
    await asyncio.gather(*(job.finish() for job in (inside, greedy[0], modest)))
    assert state(admission) == (0, 0, 0, 0)


async def test_the_retry_delay_follows_the_work_ahead_and_the_rate_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens took 2 busy seconds: with 10 inside and 30 waiting, 60 more should be through after 2 s."""
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    admission = open_admission(requests=1, queued_tokens=30)
    done = Job(admission, 100)
    await settle()
    now_s += 2.0
    await done.finish()
    now_s += 50.0  # idle time does not count
    inside, waiting = Job(admission, 10), Job(admission, 30)
    await settle()
    with pytest.raises(OverloadedError) as caught:
        async with admission.admit(Demand(num_tokens=60)):
            pytest.fail("admitted")
    assert caught.value.retry_delay_s == pytest.approx(2.0)
    await asyncio.gather(inside.finish(), waiting.finish())


def test_throughput_forgets() -> None:
    """Ten times as fast for longer than its memory: the old rate is gone. Work that was dropped costs time alone."""
    rate = Throughput()
    assert rate.tokens_per_s is None
    rate.began(0.0)
    rate.passed(100, 1.0)
    assert rate.tokens_per_s == pytest.approx(100)
    for second in range(2, 80):
        rate.passed(1000, float(second))
    assert rate.tokens_per_s == pytest.approx(1000, rel=0.01)
    rate.passed(0, 80.0)
    assert rate.tokens_per_s == pytest.approx(900, rel=0.01)


async def test_an_account_without_a_share_left_is_passed_over() -> None:
    """Its sequences wait for its own to leave; those of others go by, in the queue and past it."""
    admission = Admission(
        AdmissionLimits(
            max_inflight_requests=3,
            max_inflight_tokens=100,
            max_queued_requests=10,
            max_queued_tokens=100,
            max_client_inflight_requests=1,
        )
    )
    admission.phase = Phase.SERVING
    first = Job(admission, 1, account="a", client="a/1")
    await first.entered.wait()
    second, third = (Job(admission, 1, account="a", client=f"a/{number}") for number in (2, 3))
    other = Job(admission, 1, account="b")
    await other.entered.wait()
    assert (admission.inflight_requests, admission.queued_requests) == (2, 2)
    first.leave.set()
    await second.entered.wait()
    assert not third.entered.is_set()
    second.leave.set()
    await third.entered.wait()
    for one in (third, other):
        one.leave.set()
    await asyncio.gather(*(one.task for one in (first, second, third, other)))
    assert (admission.inflight_requests, admission.inflight_tokens, admission.queued_requests) == (0, 0, 0)
