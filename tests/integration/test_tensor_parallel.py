"""A vocabulary that is spread over tensor-parallel ranks: each scores its shard, and K entries per row travel.

On a CPU the ranks are processes that share its cores, joined by vLLM's own communicator: exactness and bytes are shown
here, not speed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teacher_service.types import ScoreJob
from tests.integration import test_engines
from tests.integration.test_engine_options import TOLERANCE, largest_error, started
from tests.support import shard_ranks
from tests.support.engines import Started, job, random_tokens, score_all
from tests.support.models import VOCAB_ROWS
from tests.support.ranks import run_ranks
from tests.support.shard_ranks import CASES, Found

pytestmark = test_engines.pytestmark  # whatever starts vLLM needs the same
MAX_RECEIVED_BYTES = 2000
"""By the first rank, per row, at K = 64."""


@pytest.mark.parametrize("num_ranks", [2, 4])
async def test_ranks_equal_the_single_form(tmp_path: Path, num_ranks: int) -> None:
    """vLLM's LM head on real ranks: equal to 1e-6, whatever is padding; what travels is small; the check tells."""
    cases: dict[str, Found] = await run_ranks(shard_ranks.__name__, folder=tmp_path, world_size=num_ranks)
    assert cases.keys() == CASES.keys()
    for name, found in cases.items():
        assert found["error"] <= 1e-6, name
        assert found["wrong_ids"] == 0, name
        assert found["is_sharded"], name
    large = cases["in shards of 152k"]
    assert large["sent_bytes"] == 4 * (2 * 64 + 4)
    assert (num_ranks - 1) * large["sent_bytes"] <= MAX_RECEIVED_BYTES
    assert large["logit_bytes"] > 1000 * large["sent_bytes"]
    _assert_reasons(cases["padded"]["reasons"], num_ranks)


def _assert_reasons(reasons: dict[str, list[str | None]], num_ranks: int) -> None:
    """Of the check at start: sound models pass, also those that rule ids out; no rank waits for one that fails."""
    nothing = [None] * num_ranks
    assert reasons.pop("sound") == reasons.pop("ids ruled out") == nothing
    assert reasons.pop("one rank fails") == [*nothing[1:], "RuntimeError: out of memory, said the last rank"]
    assert reasons.keys() == {"logits of other tokens", "normalised"}
    for first, *others in reasons.values():
        assert first is not None
        assert "give other logits than the gathered logits" in first
        assert others == nothing[1:]


async def test_a_spread_teacher_equals_one_in_one_piece(float32_checkpoint: Path, reference: Started) -> None:
    """The whole engine over two ranks, one of which holds 64 tokens and the other 32 and padding."""
    jobs = [*_edges(), _candidates()]
    async with started(float32_checkpoint, tensor_parallel_size=2) as engine:
        assert await largest_error(engine, reference) <= TOLERANCE
        for ours, theirs in zip(
            await score_all(engine.engine, jobs), await score_all(reference.engine, jobs), strict=True
        ):
            for name in ("sampled_logprobs", "topk_logprobs", "log_tail_mass", "entropy", "candidate_logprobs"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert (a is None) == (b is None), name
                if a is not None:
                    np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0, err_msg=name)


def _edges() -> list[ScoreJob]:
    """K of nothing, of more than a shard and of all."""
    rng = np.random.default_rng(11)
    return [
        job(random_tokens(rng, 40), score_start=9, num_logprobs=k, return_entropy=True, request_id=f"{k}")
        for k in (0, 70, VOCAB_ROWS)
    ]


def _candidates() -> ScoreJob:
    rng = np.random.default_rng(12)
    candidates = rng.integers(0, VOCAB_ROWS, (31, 3)).astype(np.int32)
    return job(random_tokens(rng, 40), score_start=9, candidates=candidates, request_id="candidates")
