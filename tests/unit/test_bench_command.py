"""`bench` without a teacher: its settings, its sequences, its arithmetic, its words."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from protos.arrays import ScoreArrays
from protos.codec import WireDtype
from protos.manifest import Capability, Manifest
from teacher_service.__main__ import build_app
from teacher_service.bench.measure import Measurement, manifest_brief, random_calls
from teacher_service.bench.screen import Screen, introduction, remarks
from teacher_service.bench.settings import BenchSettings, fit
from teacher_service.bench.tally import AnswerCost, Row, Tally
from teacher_service.errors import SettingsError
from teacher_service.transports.caller import CallError, ScoreAnswer, check_endpoint
from teacher_service.types import Timings
from tests.support.teacher_stub import stub_manifest
from tests.unit.import_rules import loaded_heavy_modules

ROOT = Path(__file__).parents[2]
MANIFEST: Manifest = stub_manifest()  # 32 rows, at most 16 logprobs and 256 tokens, no capabilities


def bench_settings(**changes: Any) -> BenchSettings:
    given = {
        "endpoint": "127.0.0.1:15555",
        "sequences": 6,
        "prompt_tokens": 5,
        "response_tokens": 4,
        "num_logprobs": 3,
        "concurrency": (1, 2),
        "siblings": 1,
        "wire_dtype": WireDtype.FLOAT32,
        "temperature": 1.0,
        "timeout_s": 10.0,
        "warm_up": 0,
        "seed": 7,
        "json": None,
    }
    return BenchSettings(**given | changes)


def tally_of(latencies_s: list[float], **more: Any) -> Tally:
    """A level whose answers took 0.01 s in the queue, 0.02 s in the engine, 40 us to decode, and 320 bytes."""
    costs = [AnswerCost(one, queue_s=0.01, engine_s=0.02, decode_s=40e-6, payload_bytes=320) for one in latencies_s]
    return Tally(concurrency=2, costs=costs, **more)


def test_help_lists_the_command_and_loads_nothing_heavy() -> None:
    """The command line answers at once, on a machine that has no room for grpc or torch."""
    result = CliRunner().invoke(build_app(), ["--help"])
    assert result.exit_code == 0
    assert {"bench", "serve"} <= {line.split()[0] for line in result.output.splitlines() if line.strip()}
    assert loaded_heavy_modules("teacher_service.__main__", ROOT) == []


@pytest.mark.parametrize("endpoint", ["localhost:15555", "10.0.0.7:1", "[::1]:65535", "teacher-0.teachers.svc:15555"])
def test_host_and_port_make_an_endpoint(endpoint: str) -> None:
    """Names, addresses, and IPv6 in brackets."""
    check_endpoint(endpoint)


@pytest.mark.parametrize(
    "endpoint", ["", "localhost", ":15555", "localhost:", "localhost:0", "localhost:65536", "http://a:1", "::1:15555"]
)
def test_a_malformed_endpoint_ends_with_the_code_of_wrong_usage(endpoint: str) -> None:
    """In one line that says which form it must have."""
    result = CliRunner().invoke(build_app(), ["bench", "--endpoint", endpoint])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: --endpoint is {endpoint!r}; it must be HOST:PORT")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ("--endpoint",)),
        (["--endpoint", "a:1", "--sequences", "0"], ("--sequences is 0", "at least 1")),
        (["--endpoint", "a:1", "--num-logprobs", "-1"], ("--num-logprobs is -1", "at least 0")),
        (["--endpoint", "a:1", "--concurrency", "4", "--concurrency", "0"], ("--concurrency is 0", "at least 1")),
        (["--endpoint", "a:1", "--temperature", "0"], ("--temperature is 0.0", "> 0")),
        (["--endpoint", "a:1", "--timeout-s", "inf"], ("--timeout-s is inf", "finite")),
        (["--endpoint", "a:1", "--wire-dtype", "int8"], ("--wire-dtype is 'int8'", "float32, float16, bfloat16")),
        (["--endpoint", "a:1", "--json", "/no/such/folder/x"], ("--json is /no/such/folder/x", "folder")),
        (["--endpoint", "a:1", "--json", "/"], ("--json is /;", "a file")),
    ],
)
def test_a_value_out_of_range_names_flag_value_and_rule(arguments: list[str], parts: tuple[str, ...]) -> None:
    """Before anything is sent."""
    result = CliRunner().invoke(build_app(), ["bench", *arguments])
    assert result.exit_code == 2
    for part in parts:
        assert part in result.output


def test_what_the_teacher_takes_is_left_as_it_is() -> None:
    """Up to the last token and logprob."""
    settings = bench_settings(prompt_tokens=200, response_tokens=56, num_logprobs=16)
    assert fit(settings, MANIFEST) is settings


@pytest.mark.parametrize(
    ("asked", "fitted"),
    [((512, 512), (128, 128)), ((900, 100), (230, 26)), ((1, 5000), (1, 255)), ((5000, 1), (255, 1))],
)
def test_sequences_too_long_for_the_teacher_are_shortened_in_proportion(
    asked: tuple[int, int], fitted: tuple[int, int]
) -> None:
    """Both parts keep a token, the sum is the limit, and the screen says so."""
    settings = bench_settings(prompt_tokens=asked[0], response_tokens=asked[1])
    found = fit(settings, MANIFEST)
    assert (found.prompt_tokens, found.response_tokens) == fitted
    assert introduction(MANIFEST, found, settings)[2] == (
        f"note: asked were {asked[0]} and {asked[1]} tokens, this teacher takes 256 in all"
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_logprobs": 17}, ("--num-logprobs is 17", "at most 16", "--max-num-logprobs")),
        ({"temperature": 0.5}, ("--temperature is 0.5", "must be 1")),
        ({"wire_dtype": WireDtype.FLOAT16}, ("--wire-dtype is float16", "must be float32")),
        ({"wire_dtype": WireDtype.BFLOAT16}, ("--wire-dtype is bfloat16", "must be float32")),
    ],
)
def test_what_the_teacher_can_not_do_is_refused(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    """With value, limit and remedy."""
    with pytest.raises(SettingsError) as caught:
        fit(bench_settings(**changes), MANIFEST)
    for part in parts:
        assert part in caught.value.message


def test_what_the_teacher_can_do_is_accepted() -> None:
    """Capabilities open what they stand for."""
    able = dataclasses.replace(
        MANIFEST, capabilities=frozenset({Capability.TEMPERATURE, Capability.WIRE_FLOAT16}), received_digest=None
    )
    settings = bench_settings(temperature=0.5, wire_dtype=WireDtype.FLOAT16)
    assert fit(settings, able) is settings


def test_sequences_are_random_ids_of_the_vocabulary() -> None:
    """Of the sizes asked for, other ones each time, and the same again for the same seed and level."""
    settings = bench_settings(sequences=50)
    calls = list(random_calls(settings, num_sequences=50, vocab_rows=11))
    ids = np.stack([call.token_ids for call in calls])
    assert ids.shape == (50, 9)
    assert ids.dtype == np.int32
    assert set(ids.ravel().tolist()) == set(range(11))
    assert {(call.score_start, call.num_scored, call.num_logprobs) for call in calls} == {(5, 4, 3)}
    again = np.stack([call.token_ids for call in random_calls(settings, num_sequences=50, vocab_rows=11)])
    np.testing.assert_array_equal(ids, again)


def test_no_level_repeats_the_sequences_of_another() -> None:
    """A prefix cache must not answer for the engine."""
    settings = bench_settings(prompt_tokens=30)
    prompts = [
        call.token_ids[:30].tobytes()
        for level in range(4)
        for call in random_calls(settings, num_sequences=6, vocab_rows=32, level=level)
    ]
    assert len(set(prompts)) == 24


def test_siblings_share_a_prompt_and_stand_together() -> None:
    """Groups of three responses; the last is what is left."""
    settings = bench_settings(siblings=3, prompt_tokens=20, response_tokens=20)
    calls = list(random_calls(settings, num_sequences=8, vocab_rows=32))
    prompts = [call.token_ids[:20].tobytes() for call in calls]
    assert [prompts.index(one) for one in prompts] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert len({call.token_ids[20:].tobytes() for call in calls}) == 8


def test_a_row_is_what_its_answers_come_to() -> None:
    """Rates over the level's time, percentiles of latency, means per sequence and per scored token."""
    tally = tally_of([0.1] * 98 + [0.2, 0.5], elapsed_s=4.0, retries=3)
    tally.add_error(CallError("told", reason="ENGINE_ERROR"))
    row = tally.row(bench_settings())
    assert dataclasses.asdict(row) == {
        "concurrency": 2,
        "num_sequences": 100,
        "num_logprobs": 3,
        "sequences_per_s": 25.0,
        "tokens_per_s": 225.0,
        "scored_tokens_per_s": 100.0,
        "latency_p50_ms": pytest.approx(100.0),
        "latency_p95_ms": pytest.approx(100.0),
        "latency_p99_ms": pytest.approx(203.0),
        "latency_max_ms": pytest.approx(500.0),
        "mean_queue_ms": pytest.approx(10.0),
        "mean_engine_ms": pytest.approx(20.0),
        "payload_bytes_per_token": pytest.approx(80.0),
        "decode_us_per_token": pytest.approx(10.0),
        "retries": 3,
        "errors": {"ENGINE_ERROR": 1},
    }


def test_a_level_without_answers_has_no_latency() -> None:
    """Absent, and not zero."""
    row = Tally(concurrency=4, elapsed_s=1.0).row(bench_settings())
    absent = {one.name for one in dataclasses.fields(Row) if getattr(row, one.name) is None}
    assert absent == {
        *("latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "latency_max_ms", "mean_queue_ms", "mean_engine_ms"),
        *("payload_bytes_per_token", "decode_us_per_token"),
    }
    assert (row.sequences_per_s, row.num_sequences) == (0.0, 0)


def test_waiting_for_a_retry_is_part_of_the_latency() -> None:
    """It is time that a caller waits."""
    tally = Tally(concurrency=1)
    answer = ScoreAnswer(
        scores=ScoreArrays(sampled_logprobs=np.zeros(1, dtype=np.float32)),
        timings=Timings(queue_s=0.1, engine_s=0.2),
        latency_s=0.5,
        decode_s=0.0,
        payload_bytes=9,
    )
    tally.add_answer(answer, waited_s=2.0)
    assert tally.costs == [AnswerCost(2.5, queue_s=0.1, engine_s=0.2, decode_s=0.0, payload_bytes=9)]


def test_the_first_error_is_told_where_nothing_was_answered() -> None:
    """And none where anything was."""
    failed = Tally(concurrency=1)
    failed.add_error(CallError("first", reason="A"))
    failed.add_error(CallError("second", reason="B"))
    found = Measurement(settings=bench_settings(), levels=[failed])
    assert found.failure() == "first"
    found.levels.append(tally_of([0.1]))
    assert found.failure() is None


def test_results_are_json_even_where_nothing_was_answered() -> None:
    """The manifest in brief, what was asked for, and a row for each level."""
    found = Measurement(settings=bench_settings(), manifest=MANIFEST, levels=[Tally(concurrency=1)])
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert set(document) == {"manifest", "workload", "rows"}
    assert document["manifest"] == manifest_brief(MANIFEST)
    assert document["workload"]["seed"] == 7
    assert document["rows"][0]["latency_p50_ms"] is None


def test_the_table_holds_every_level_whole_and_without_colour_codes() -> None:
    """A file has no width to fit into, and no terminal to colour."""
    levels = [tally_of([0.1] * 5, elapsed_s=0.001) for _ in range(30)]
    out = io.StringIO()
    Screen(out=out, err=io.StringIO()).show(Measurement(settings=bench_settings(), levels=levels))
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert {len(line.split("  ")[-1].strip()) > 0 for line in lines if line.strip()} == {True}
    assert [line.count("45,000") for line in lines if line.startswith("tokens / s")] == [30]


def test_remarks_name_each_kind_of_error_once_and_a_busy_caller() -> None:
    """Both belong to reading the numbers."""
    tally = tally_of([0.1], elapsed_s=1.0, processor_s=0.95)
    for message in ("told", "told differently"):
        tally.add_error(CallError(message, reason="ENGINE_ERROR"))
    lines = remarks([tally, tally_of([0.1], elapsed_s=1.0, processor_s=0.5)])
    assert lines[0] == "concurrency 2: 2 x ENGINE_ERROR: told"
    assert lines[1].startswith("note: at concurrency 2 this side used its processor for more than 80% of the time")
    assert len(lines) == 2


def test_more_concurrency_than_sequences_is_remarked() -> None:
    """It can't be reached."""
    settings = bench_settings(sequences=6, concurrency=(1, 64))
    assert introduction(MANIFEST, settings, settings)[2] == (
        "note: 6 sequences can't fill a concurrency of 64; pass --sequences 256 or more"
    )


def test_a_failed_call_pickles_with_all_it_carries() -> None:
    """Between processes nothing is lost."""
    copy = pickle.loads(pickle.dumps(CallError("told", reason="OVERLOADED", retry_delay_s=1.5)))
    assert (copy.message, copy.reason, copy.retry_delay_s, str(copy)) == ("told", "OVERLOADED", 1.5, "told")
