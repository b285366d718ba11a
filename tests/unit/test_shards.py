"""Scoring by shards of the vocabulary against the single form and a float64 log_softmax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from teacher_service.engine.vllm.fast.kernel import Scored, logprobs_of, score_rows
from teacher_service.engine.vllm.fast.scorer import Asked, ScoreRows
from teacher_service.engine.vllm.fast.shards import Shard, merge_packed, pack, score_shard, shards_of

R, V = 7, 1003
TOLERANCE = 1e-6
NUM_RANKS = [1, 2, 3, 4]


def width_of(vocab_rows: int, num_ranks: int) -> int:
    """Columns of a rank, where the whole is padded to a multiple of 64 as vLLM does, and of the ranks."""
    multiple = 64 * num_ranks
    return -(-vocab_rows // multiple) * 64


def in_shards(
    logits: Tensor, asked: Asked, *, num_ranks: int, width: int, form: ScoreRows = score_rows
) -> tuple[Scored, list[Tensor]]:
    """What the first rank makes of what all ranks send."""
    shards = shards_of(num_ranks=num_ranks, width=width, vocab_rows=logits.shape[-1])
    sent = [
        pack(score_shard(one, shard, asked, form)) for one, shard in zip(parts(logits, shards), shards, strict=True)
    ]
    return merge_packed(shards, torch.stack(sent), len(logits), asked)


def parts(logits: Tensor, shards: Sequence[Shard]) -> Iterator[Tensor]:
    return (logits[:, one.first_token : one.first_token + one.num_tokens] for one in shards)


def random_logits(scale: float, vocab_rows: int = V) -> Tensor:
    return scale * torch.randn(R, vocab_rows, generator=torch.Generator().manual_seed(0))


def small_logits() -> Tensor:
    """All logprobs lie in (-8, 0), where float32 is finer than 5e-7, and one token in a hundred is likely."""
    logits = random_logits(0.2)
    logits[:, ::100] += 3
    return logits


def ask(
    k: int,
    *,
    vocab_rows: int = V,
    temperatures: Tensor | None = None,
    given: Tensor | None = None,
    entropy: bool = True,
) -> Asked:
    """With a sampled token per row, and some candidates of rows 2 to 4 and of row 5."""
    generator = torch.Generator().manual_seed(1)
    sampled = torch.randint(0, vocab_rows, (R, 1), generator=generator) if given is None else given
    candidates = torch.randint(0, vocab_rows, (3, 5), generator=generator)
    edges = torch.tensor([[0, vocab_rows - 1]])
    return Asked(k, temperatures, entropy, [(slice(0, R), sampled), (slice(2, 5), candidates), (slice(5, 6), edges)])


def single(logits: Tensor, asked: Asked) -> tuple[Scored, list[Tensor]]:
    scored = score_rows(logits, asked.num_logprobs, asked.temperatures, entropy=asked.entropy)
    temperatures = torch.ones(len(logits)) if asked.temperatures is None else asked.temperatures
    return scored, [
        logprobs_of(logits[rows], ids, scored.log_total[rows], temperatures[rows]) for rows, ids in asked.given
    ]


def assert_equal(found: tuple[Scored, list[Tensor]], expected: tuple[Scored, list[Tensor]]) -> None:
    """All but the ids, whose order is open among ties."""
    close = {"rtol": 0, "atol": TOLERANCE}
    (ours, our_given), (theirs, their_given) = found, expected
    for name in ("topk", "log_tail", "log_total", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **close)
    torch.testing.assert_close(our_given, their_given, **close)


def assert_ids(scored: Scored, logits: Tensor, temperatures: Tensor | None = None) -> None:
    """Each id once, and its logprob is that of its token."""
    ids = scored.topk_ids.long()
    assert scored.topk_ids.dtype == torch.int32
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    expected = logprobs_of(logits, ids, scored.log_total, temperatures)
    torch.testing.assert_close(scored.topk, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("k", [0, 1, 64, 300, V])
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_shards_equal_the_single_form(num_ranks: int, k: int, tempered: bool) -> None:
    """Of a padded vocabulary; also where K is larger than a shard. Both are near the truth."""
    logits = small_logits()
    temperatures = torch.linspace(0.5, 2, R) if tempered else None
    asked = ask(k, temperatures=temperatures)
    found = in_shards(logits, asked, num_ranks=num_ranks, width=width_of(V, num_ranks))
    assert_equal(found, single(logits, asked))
    assert_ids(found[0], logits, temperatures)
    full = torch.log_softmax(logits.double() / (1 if temperatures is None else temperatures.double().unsqueeze(-1)), -1)
    torch.testing.assert_close(found[0].topk.double(), full.topk(k, -1).values, rtol=0, atol=TOLERANCE)
    rest = full.scatter(-1, found[0].topk_ids.long(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(found[0].log_tail.double(), rest, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scale", [10.0, 1000.0])
def test_large_logits_lose_nothing(scale: float) -> None:
    """Against float64, as near as float32 can write the answer itself: shares are small numbers, totals are not."""
    logits = random_logits(scale)
    asked = ask(8)
    scored, given = in_shards(logits, asked, num_ranks=4, width=256)
    full = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(scored.topk.double(), full.topk(8, -1).values, rtol=3e-7, atol=scale * 4e-7)
    torch.testing.assert_close(given[0].double(), full.gather(-1, asked.given[0][1]), rtol=3e-7, atol=scale * 4e-7)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("k", [0, 3, 40])
def test_shards_of_padding_alone(k: int, *, entropy: bool) -> None:
    """40 tokens over four ranks of 32 columns: the second holds 8, the last two none, and K is larger than any."""
    assert shards_of(num_ranks=4, width=32, vocab_rows=40) == [(0, 32), (32, 8), (64, 0), (96, 0)]
    logits = random_logits(1.0, 40) - 5
    asked = ask(k, vocab_rows=40, entropy=entropy)
    found = in_shards(logits, asked, num_ranks=4, width=32)
    assert_equal(found, single(logits, asked))
    assert_ids(found[0], logits)


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_ties_within_and_across_shards(num_ranks: int) -> None:
    """Half-precision logits are full of them: values are equal, and ids are distinct tokens of these values."""
    logits = random_logits(1.0).mul(4).round().div(4)
    logits[0] = 0.0
    logits[1, ::250] = 7.0
    asked = ask(64)
    found = in_shards(logits, asked, num_ranks=num_ranks, width=width_of(V, num_ranks))
    assert_equal(found, single(logits, asked))
    assert_ids(found[0], logits)
    assert set(found[0].topk_ids[1, :5].tolist()) == {0, 250, 500, 750, 1000}


@pytest.mark.parametrize("k", [0, 2, 6, 20])
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_ruled_out_tokens_leave_no_nan(num_ranks: int, k: int) -> None:
    """Logits of -inf: in some of a shard, in all of a shard, in all but one token. Padding never stands for a token."""
    logits = random_logits(1.0, 200)
    logits[0, ::3] = -torch.inf
    logits[1, :150] = -torch.inf
    logits[2, 60:] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 77] = 2.0
    asked = ask(k, vocab_rows=200)
    found = in_shards(logits, asked, num_ranks=num_ranks, width=width_of(200, num_ranks))
    expected = single(logits, asked)
    assert_equal(found, expected)
    assert not any(one.isnan().any() for one in (*found[0], *found[1]) if one is not None)
    assert_ids(found[0], logits)
    assert all(token < 200 for row in found[0].topk_ids.tolist() for token in row)


def test_what_a_form_says_of_a_row_without_probability_is_not_used() -> None:
    """A row that is ruled out in a whole shard: a kernel may then give any ids."""

    def form(logits: Tensor, k: int, temperatures: Tensor | None, *, entropy: bool) -> Scored:
        scored = score_rows(logits, k, temperatures, entropy=entropy)
        return scored._replace(topk_ids=scored.topk_ids.masked_fill(scored.log_total.isnan().unsqueeze(-1), 9999))

    logits = random_logits(1.0)
    logits[:, :997] = -torch.inf
    asked = ask(300)
    found = in_shards(logits, asked, num_ranks=4, width=256, form=form)
    assert_equal(found, single(logits, asked))
    assert_ids(found[0], logits)


def test_a_broken_row_stays_broken() -> None:
    """NaN logits on one rank are NaN in the answer, and only in their row."""
    logits = random_logits(1.0)
    logits[3, 700] = torch.nan
    scored, given = in_shards(logits, ask(4), num_ranks=4, width=256)
    for one in (scored.topk, scored.log_tail, scored.log_total, scored.entropy, given[0]):
        assert one is not None
        assert one[3].isnan().any()
        assert not one[torch.arange(R) != 3].isnan().any()


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_a_tiny_tail_is_not_rounded_away(num_ranks: int) -> None:
    """A tail of 1e-12 of which most lies in shards that have almost no share, and among entries that lose."""
    logits = torch.full((R, V), -20.0)
    logits[:, 5] = 14.0
    expected = torch.log_softmax(logits.double(), -1)[0, torch.arange(V) != 5].logsumexp(-1)
    scored, _ = in_shards(logits, ask(1), num_ranks=num_ranks, width=width_of(V, num_ranks))
    assert scored.log_tail.tolist() == pytest.approx([float(expected)] * R, abs=1e-5)


def test_a_sampled_token_has_the_value_of_its_entry() -> None:
    """To the bit: a student's loss compares the two."""
    logits = random_logits(3.0)
    best = logits.topk(4, -1).indices
    scored, given = in_shards(logits, ask(4, given=best), num_ranks=3, width=384)
    assert torch.equal(scored.topk_ids.long(), best)
    assert torch.equal(scored.topk, given[0])


def test_ids_survive_where_denormals_are_flushed() -> None:
    """As floats they are denormal, and vLLM's processes may round those to 0."""
    logits = random_logits(1.0)
    try:
        assert torch.set_flush_denormal(True)
        scored, _ = in_shards(logits, ask(300), num_ranks=4, width=256)
    finally:
        torch.set_flush_denormal(False)
    assert_ids(scored, logits)


@pytest.mark.parametrize(("entropy", "num_candidates", "expected"), [(False, 0, 524), (True, 0, 528), (True, 9, 564)])
def test_bytes_that_a_rank_sends_per_row(entropy: bool, num_candidates: int, expected: int) -> None:
    """At K = 64, whatever the vocabulary: 64 values and ids, tail, total, the sampled token, and what else is asked."""
    given = [(slice(0, R), torch.zeros((R, 1), dtype=torch.int64))]
    if num_candidates:
        given.append((slice(0, R), torch.zeros((R, num_candidates), dtype=torch.int64)))
    asked = Asked(64, None, entropy, given)
    packed = pack(score_shard(random_logits(1.0), Shard(0, V), asked, score_rows))
    assert packed.dtype == torch.float32
    assert packed.numel() * packed.element_size() / R == expected
