"""The teacher benchmark: rows say what was measured, and what was not measured is left out."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from benchmarks import teacher, teacher_bound, teacher_meter, teacher_paths
from benchmarks.teacher import Cell, Measured
from benchmarks.teacher_meter import Sample

CELL = Cell(sweep="main", vocab_size=256, num_sequences=16, repeats=3, paths=("floor", "grpc", "openai"))
TOKENS, SCORED = 1000, 750


def _sample(seconds: float, **others: float) -> Sample:
    given = {"engine_cpu_s": 0.3} | others
    return Sample(seconds=seconds, num_tokens=TOKENS, num_scored=SCORED, **given)  # type: ignore[arg-type] # as given


def _measured(seconds: Sequence[float], floors: Sequence[float] = (), **others: float) -> Measured:
    return Measured(
        samples=[_sample(one, **others) for one in seconds],
        floors=[_sample(one) for one in floors],
        bounds=[_sample(2 * one) for one in floors],
    )


def test_a_share_is_the_median_of_the_ratios_within_a_repeat() -> None:
    """Ratios 0.5, 0.25 and 0.1: their median, and not the ratio of the medians 2 and 10."""
    made = teacher.row(CELL, "grpc", _measured([4.0, 8.0, 20.0], [2.0, 2.0, 2.0]))
    assert (made["share_of_floor"], made["share_of_math_bound"]) == (0.25, 0.5)
    assert made["tokens_per_s"] == TOKENS / 8


def test_what_is_per_token_counts_response_tokens() -> None:
    """Bytes and CPU time of both sides; the peak is that of the largest run."""
    measured = _measured([1.0], [1.0], server_cpu_s=0.015, payload_bytes=750 * 516, peak_bytes=3e6)
    measured.samples.append(dataclasses.replace(measured.samples[0], peak_bytes=5_000_000))
    made = teacher.row(CELL, "grpc", dataclasses.replace(measured, floors=[], bounds=[]))
    assert made == {
        "path": "grpc",
        "vocab_size": 256,
        "num_layers": 2,
        "num_logprobs": 64,
        "num_siblings": 1,
        "concurrency": 16,
        "sweep": "main",
        "tokens_per_s": 1000.0,
        "payload_bytes_per_token": 516.0,
        "server_cpu_us_per_token": 20.0,
        "engine_cpu_us_per_token": 400.0,
        "peak_rss_mb_above_idle": 5.0,
    }


def test_what_does_not_apply_is_left_out_and_shown_as_such() -> None:
    """A path without a server has no payload; a cell without a floor has no share."""
    made = teacher.row(CELL, "in_process", _measured([1.0]))
    absent = {"payload_bytes_per_token", "server_cpu_us_per_token", "share_of_floor", "share_of_math_bound"}
    assert not absent & made.keys()
    table = teacher.table([made, made | {"sweep": "memory"}])
    assert table.row_count == 2
    assert [next(iter(column.cells)) for column in table.columns if column.header == "share of floor"] == ["-"]


def test_the_gain_of_siblings_is_paired_with_the_run_without_shared_prompts() -> None:
    """The first cell of the group is that run; its own gain is 1."""
    group = [dataclasses.replace(CELL, sweep="num_siblings", num_siblings=n) for n in (1, 4)]
    done = {group[0]: {"grpc": _measured([1.0] * 3)}, group[1]: {"grpc": _measured([1.0] * 3, engine_cpu_s=0.15)}}
    assert [one["engine_cpu_gain"] for one in teacher.rows_of(done)] == [1.0, 2.0]


def test_sequences_share_the_prompts_of_their_siblings_and_of_nobody_else() -> None:
    """Two runs differ in each prompt's first token alone, so that no prefix of one is known from the other."""
    cell = dataclasses.replace(CELL, num_siblings=4, prompt_tokens=8, response_tokens=4)
    batch, again = (cell.batch(8, first_token=number) for number in (1, 2))
    assert len({tuple(one[:8]) for one in batch.token_ids}) == 2
    assert len({tuple(one) for one in batch.token_ids}) == 8
    assert (batch.num_tokens, batch.num_scored) == (96, 32)
    for one, other in zip(batch.token_ids, again.token_ids, strict=True):
        assert np.flatnonzero(one != other).tolist() == [0]


def test_slow_paths_get_the_first_of_the_same_sequences() -> None:
    """Except in the cell that measures memory."""
    few, all_of_them = (CELL.batch(CELL.count(name), first_token=1) for name in ("openai", "grpc"))
    assert (len(few.token_ids), len(all_of_them.token_ids)) == (4, 16)
    assert all(map(np.array_equal, few.token_ids, all_of_them.token_ids))
    assert dataclasses.replace(CELL, sweep="memory").count("openai") == 16


def test_sweeps_belong_to_their_vocabularies() -> None:
    """The largest has the memory cell, first; the smallest and the middle one have siblings."""
    found = {
        size: [
            group[0].sweep
            for group in teacher.cells(
                size, num_sequences=16, repeats=5, paths=teacher_paths.PATHS, sweeps=teacher.SWEEPS
            )
        ]
        for size in teacher.VOCAB_SIZES
    }
    assert list(found.values()) == [
        ["main", "num_siblings"],
        ["main", "num_logprobs", "num_siblings", "concurrency"],
        ["memory", "main"],
    ]


def test_every_concurrency_is_reached() -> None:
    """With 512 in flight there are 512 sequences, and fewer repeats for that."""
    groups = teacher.cells(32_000, num_sequences=16, repeats=5, paths=["grpc"], sweeps=["concurrency"])
    assert [(cell.concurrency, cell.num_sequences, cell.repeats) for cell in next(groups)] == [
        (1, 64, 3), (8, 64, 3), (64, 64, 3), (512, 512, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("num_logprobs", [0, 3])
def test_every_form_of_the_bound_computes_the_same(num_logprobs: int) -> None:
    """Rows that don't fill the last block, a vocabulary that does not fill the last group."""
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(5, 4, generator=generator), torch.randn(1000, 4, generator=generator)
    logits = states @ weight.T
    values, ids = logits.topk(num_logprobs)
    for form in teacher_bound.FORMS:
        small = dataclasses.replace(form, logits_bytes=2 * 4 * 1000)
        result = teacher_bound.compute(states, lambda rows: rows @ weight.T, num_logprobs, small)
        torch.testing.assert_close(result[0], logits.logsumexp(-1))
        torch.testing.assert_close(result[1], values)
        assert torch.equal(result[2], ids)


def test_vllm_rows_become_arrays() -> None:
    """By rank; a sampled token outside the top-k is no part of it."""
    logprobs = {"7": (-3.0, 9), "4": (-0.5, 1), "2": (-1.5, 2)}
    row = {token: {"logprob": logprob, "rank": rank} for token, (logprob, rank) in logprobs.items()}
    scores = teacher_paths.arrays_of_rows([row, row], np.array([7, 2], np.int32), 2)
    assert scores.sampled_logprobs.tolist() == [-3.0, -1.5]
    assert scores.topk_token_ids is not None
    assert scores.topk_logprobs is not None
    assert scores.topk_token_ids.tolist() == [[4, 2]] * 2
    assert scores.topk_logprobs.tolist() == [[-0.5, -1.5]] * 2
    assert scores.log_tail_mass == pytest.approx(np.log(1 - np.exp(-0.5) - np.exp(-1.5)), rel=1e-5)


def test_numbers_of_runs_never_repeat_a_prompt() -> None:
    """The smallest vocabulary has more tokens than a model has runs."""
    runs = list(itertools.islice(itertools.count(1), 500))
    assert len({number % min(teacher.VOCAB_SIZES) for number in runs}) == len(runs)


async def test_no_more_are_in_flight_than_the_batch_allows() -> None:
    """And all of them are asked."""
    inflight, most, asked = 0, 0, 0

    async def ask(_ids: object, _start: int, _k: int) -> teacher_meter.Answer:
        nonlocal inflight, most, asked
        inflight += 1
        most = max(most, inflight)
        await asyncio.sleep(0)
        inflight -= 1
        asked += 1
        return teacher_meter.Answer(scores=None, payload_bytes=10)

    processes = teacher_meter.Processes(os.getpid(), [], are_served=True)
    path = teacher_meter.ScoringPath(name="grpc", processes=processes, ask=ask)
    sample = await path.run(dataclasses.replace(CELL, concurrency=3).batch(16, first_token=1))
    assert (asked, most, sample.payload_bytes, sample.server_cpu_s) == (16, 3, 160, 0)
    assert sample.engine_cpu_s > 0
