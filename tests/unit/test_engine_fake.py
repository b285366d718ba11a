"""The analytic teacher: what it says it predicts is what it answers, and its faults are those asked for."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from protos.arrays import check_score_arrays
from teacher_service.engine.factory import build_engine
from teacher_service.engine.fake import FakeEngine, expected_logprobs
from teacher_service.engine.options import EngineOptions
from teacher_service.errors import EngineDeadError, EngineError, EngineStartError
from teacher_service.types import Capability, ScoreJob

V = 16


def job(
    token_ids: list[int],
    *,
    score_start: int = 1,
    num_logprobs: int = 3,
    temperature: float = 1.0,
    request_id: str = "r",
    candidates: list[list[int]] | None = None,
    return_entropy: bool = False,
) -> ScoreJob:
    return ScoreJob(
        request_id=request_id,
        token_ids=np.asarray(token_ids, dtype=np.int32),
        score_start=score_start,
        num_logprobs=num_logprobs,
        temperature=temperature,
        candidate_token_ids=None if candidates is None else np.asarray(candidates, dtype=np.int32),
        return_entropy=return_entropy,
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("score_start", [1, 5, 39])
async def test_every_position_is_predicted_from_its_own_prefix(score_start: int, temperature: float) -> None:
    """Token i is scored by the distribution after i tokens: the alignment that every layer above must keep."""
    token_ids = [(7 * i) % V for i in range(40)]
    scores = await FakeEngine(vocab_rows=V).score(
        job(token_ids, score_start=score_start, num_logprobs=V, temperature=temperature)
    )
    assert scores.topk_token_ids is not None
    assert scores.topk_logprobs is not None
    for row, position in enumerate(range(score_start, 40)):
        expected = expected_logprobs([position], vocab_rows=V, temperature=temperature)[0]
        assert scores.sampled_logprobs[row] == pytest.approx(expected[token_ids[position]], rel=1e-6)
        assert scores.topk_token_ids[row, 0] == position % V
        np.testing.assert_allclose(scores.topk_logprobs[row], expected[scores.topk_token_ids[row]], rtol=1e-6)


def test_a_shift_by_one_can_not_go_unnoticed() -> None:
    """Neighbouring prefix lengths differ in every logprob and in the most likely token."""
    logprobs = expected_logprobs(range(1, 200), vocab_rows=V)
    assert (np.abs(logprobs[1:] - logprobs[:-1]) > 1e-3).all()
    assert (logprobs[1:].argmax(axis=1) != logprobs[:-1].argmax(axis=1)).all()


def test_prefixes_a_vocabulary_apart_differ_too() -> None:
    """Lengths n and n + V share their most likely token, but not its probability."""
    logprobs = expected_logprobs(range(1, 100), vocab_rows=V)
    assert (np.abs(logprobs[V:] - logprobs[:-V]).max(axis=1) > 1e-3).all()


def test_temperature_changes_every_logprob() -> None:
    """A temperature that a layer drops shows in every value."""
    cold, hot = (expected_logprobs(range(1, 50), vocab_rows=V, temperature=t) for t in (1.0, 1.5))
    assert (np.abs(cold - hot) > 1e-3).mean() > 0.95


def test_expected_logprobs_are_a_distribution() -> None:
    """They are normalised at any temperature."""
    for temperature in (0.1, 1.0, 10.0):
        logprobs = expected_logprobs(range(1, 30), vocab_rows=V, temperature=temperature)
        np.testing.assert_allclose(np.exp(logprobs).sum(axis=1), 1.0, rtol=1e-12)


async def test_tail_entropy_and_candidates_agree_with_the_full_distribution() -> None:
    """Each is the plain formula on the expected logprobs."""
    candidates = [[0, 15], [3, 3]]
    scores = await FakeEngine(vocab_rows=V).score(
        job([1, 2, 3], candidates=candidates, return_entropy=True, num_logprobs=4)
    )
    for row, position in enumerate((1, 2)):
        expected = expected_logprobs([position], vocab_rows=V)[0]
        rest = np.sort(expected)[: V - 4]
        assert scores.log_tail_mass is not None
        assert scores.entropy is not None
        assert scores.candidate_logprobs is not None
        assert scores.log_tail_mass[row] == pytest.approx(np.log(np.exp(rest).sum()), rel=1e-6)
        assert scores.entropy[row] == pytest.approx(-(np.exp(expected) * expected).sum(), rel=1e-6)
        np.testing.assert_allclose(scores.candidate_logprobs[row], expected[candidates[row]], rtol=1e-6)


@pytest.mark.parametrize("num_logprobs", [0, 1, V])
async def test_answers_keep_the_contract(num_logprobs: int) -> None:
    """Shapes, dtypes and absent arrays are right at both ends of K; at K = V nothing is left outside."""
    scores = await FakeEngine(vocab_rows=V).score(job([1, 2, 3], num_logprobs=num_logprobs))
    check_score_arrays(scores, num_scored=2, num_logprobs=num_logprobs, vocab_rows=V)
    if num_logprobs == V:
        np.testing.assert_array_equal(scores.log_tail_mass, np.float32([-np.inf, -np.inf]))


async def test_info_names_all_capabilities_and_limits() -> None:
    """The analytic teacher can do whatever an engine can."""
    info = await FakeEngine(vocab_rows=V, max_model_len=99, max_num_logprobs=1000).start()
    assert (info.name, info.vocab_rows, info.max_request_tokens, info.max_num_logprobs) == ("fake", V, 99, V)
    assert info.capabilities == {
        Capability.TEMPERATURE,
        Capability.CANDIDATES,
        Capability.ENTROPY,
        Capability.EXACT_TAIL_MASS,
    }
    assert info.weights_digest is None


async def test_one_failing_job_leaves_the_others_alone() -> None:
    """Only the sequence with the failing token fails."""
    engine = FakeEngine(vocab_rows=V, failing_token_id=9)
    bad, good = await asyncio.gather(
        engine.score(job([1, 9], request_id="bad")),
        engine.score(job([1, 2], request_id="good")),
        return_exceptions=True,
    )
    assert isinstance(bad, EngineError)
    assert not isinstance(good, BaseException)
    assert engine.finished == ["good"]


async def test_nan_is_answered_where_asked_for() -> None:
    """The sequence with the NaN token gets NaN in every array."""
    scores = await FakeEngine(vocab_rows=V, nan_token_id=9).score(job([1, 9], return_entropy=True))
    for values in (scores.sampled_logprobs, scores.topk_logprobs, scores.log_tail_mass, scores.entropy):
        assert values is not None
        assert np.isnan(values).all()


async def test_death_fails_running_jobs_and_names_its_cause() -> None:
    """Jobs in the engine fail with EngineDeadError, and wait_dead returns what killed it."""
    engine = FakeEngine(vocab_rows=V)
    engine.scoring_gate.clear()
    running = asyncio.create_task(engine.score(job([1, 2])))
    waiting = asyncio.create_task(engine.wait_dead())
    await engine.wait_running(1)
    cause = RuntimeError("pulled the plug")
    engine.die(cause)
    assert await waiting is cause
    with pytest.raises(EngineDeadError, match="pulled the plug"):
        await running
    with pytest.raises(EngineDeadError):
        await engine.score(job([1, 2]))


async def test_a_deadly_sequence_kills_the_engine() -> None:
    """The sequence with the deadly token fails and takes the engine along."""
    engine = FakeEngine(vocab_rows=V, deadly_token_id=9)
    with pytest.raises(EngineDeadError, match="token 9"):
        await engine.score(job([1, 9]))
    assert "token 9" in str(await engine.wait_dead())


async def test_a_cancelled_job_leaves_the_engine() -> None:
    """Cancelling takes the job out; the next one is scored."""
    engine = FakeEngine(vocab_rows=V)
    engine.scoring_gate.clear()
    held = asyncio.create_task(engine.score(job([1, 2], request_id="held")))
    await engine.wait_running(1)
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held
    assert (engine.running, engine.cancelled) == (set(), ["held"])
    engine.scoring_gate.set()
    await engine.score(job([1, 2], request_id="next"))
    assert engine.finished == ["next"]


async def test_loading_can_be_held_and_can_fail() -> None:
    """`start` waits at the loading gate and raises the error it was given."""
    engine = FakeEngine(start_error=EngineStartError("no such model"))
    engine.loading_gate.clear()
    loading = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    assert not loading.done()
    engine.loading_gate.set()
    with pytest.raises(EngineStartError, match="no such model"):
        await loading


async def test_the_factory_builds_it_without_a_model() -> None:
    """`fake` needs no model; the others name what is missing."""
    assert (await build_engine("fake", EngineOptions(max_model_len=77)).start()).max_request_tokens == 77
    with pytest.raises(EngineStartError, match="no model"):
        build_engine("transformers", EngineOptions())
