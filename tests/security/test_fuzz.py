"""Requests that no client of ours would send: every one is answered with a documented status, and the service lives."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.engine.fake import FakeEngine
from tests.support.service import (
    UNLIMITED,
    outcome_of_stream_answer,
    raw_stream,
    running_service,
    score_request,
)

NUM_MUTATIONS = 10_000
NUM_ALONE = 2_000
"""Of them by a call of their own; the others on one stream, which is faster."""
NUM_CONCURRENT = 32
TIMEOUT_S = 60.0
SEED = 20261126
DOCUMENTED = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"}
"""Of the contract, what a request itself can bring about in a service that has loaded its model and has time."""


EXTREMES = (b"\xff" * 9 + b"\x01", b"\x80" * 5, b"\x00\x00\xc0\x7f", b"\xff\xff\xff\x7f")
"""The largest varint, one without an end, a float32 NaN, the largest int32."""


def seeds() -> list[bytes]:
    """Real requests, with each field in use."""
    candidates = pb.Candidates(count=2, token_ids=b"\1\0\0\0\2\0\0\0" * 4)
    return [
        one.SerializeToString()
        for one in (
            score_request(range(12), 5, 4),
            score_request(range(8), 4, 2, temperature=0.7, return_entropy=True, candidates=candidates),
            score_request([31] * 40, 1, 32, idempotency_key="key", wire_dtype=1),
            score_request([1, 2], 1),
        )
    ]


def mutated(payload: bytes, rng: random.Random) -> bytes:
    """A few edits: bits, bytes, cuts, repeats, insertions of numbers at the borders of their ranges."""
    edited = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(edited) + 1)
        match rng.randrange(6):
            case 0 if at < len(edited):
                edited[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(edited):
                edited[at] = rng.randrange(256)
            case 2:
                del edited[at : at + rng.randint(1, 8)]
            case 3:
                edited[at:at] = edited[at : at + rng.randint(1, 16)]
            case 4:
                edited[at:at] = rng.choice(
                    (b"\xff" * 9 + b"\x01", b"\x80" * 5, b"\x00\x00\xc0\x7f", b"\xff\xff\xff\x7f")
                )
            case _:
                edited[at:at] = rng.randbytes(rng.randint(1, 6))
    return bytes(edited)


def on_a_stream(number: int, payload: bytes) -> bytes:
    """A ScoreStreamRequest that holds these bytes as its request, whatever they are."""
    head = pb.ScoreStreamRequest(id=f"{number}").SerializeToString()
    tag = pb.ScoreStreamRequest.DESCRIPTOR.fields_by_name["request"].number << 3 | 2
    # lengths below 2**14 take two bytes of a varint
    return head + bytes((tag, len(payload) & 0x7F | 0x80, len(payload) >> 7)) + payload


async def test_ten_thousand_mutated_requests_over_grpc() -> None:
    """Only documented statuses, never INTERNAL or UNKNOWN, and a service that scores as before."""
    rng, real = random.Random(SEED), seeds()  # noqa: S311 - the same mutations each time
    payloads = [mutated(rng.choice(real), rng) for _ in range(NUM_MUTATIONS)]
    alone, streamed = iter(payloads[:NUM_ALONE]), payloads[NUM_ALONE:]
    seen = Counter[str]()
    async with (
        asyncio.timeout(TIMEOUT_S),
        running_service(FakeEngine(), log_level="warning") as service,
        grpc.aio.insecure_channel(service.addresses.grpc, options=UNLIMITED) as channel,
    ):
        score = channel.unary_unary("/teacher.v1.TeacherService/Score")

        async def ask() -> None:
            for payload in alone:
                call = score(payload, timeout=TIMEOUT_S)
                code = (await call.code()).name
                assert code in DOCUMENTED, (payload.hex(), await call.details())
                seen[code] += 1

        async def send() -> None:
            for number, payload in enumerate(streamed):
                await stream.write(on_a_stream(number, payload))
            await stream.done_writing()

        await asyncio.gather(*(ask() for _ in range(NUM_CONCURRENT)))
        stream = raw_stream(service, TIMEOUT_S)
        sending = asyncio.create_task(send())
        async for answered in stream:
            outcome = outcome_of_stream_answer(pb.ScoreStreamResponse.FromString(answered))
            assert outcome.code in DOCUMENTED, outcome
            seen[outcome.code] += 1
        await sending
        answer = await service.stub.Score(score_request(range(12), 5, 4), timeout=TIMEOUT_S)
        assert answer.scored_count == 7
        assert (await service.http.get("/readyz")).status_code == 200
        assert "failed unexpectedly" not in service.log.getvalue()
    assert seen.total() == NUM_MUTATIONS
    # both ends of the scale were reached
    assert min(seen["OK"], seen["INVALID_ARGUMENT"]) > NUM_MUTATIONS // 100, seen


JSON_TYPE = {"content-type": "application/json"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
TOKEN_IDS = st.lists(st.integers(-2, 40), max_size=24) | JSON
GOOD = st.fixed_dictionaries(
    {"token_ids": st.lists(st.integers(0, 31), min_size=4, max_size=9), "score_start": st.integers(1, 3)},
    optional={"num_logprobs": st.integers(0, 32), "return_entropy": st.booleans()},
)
BODIES = (
    GOOD
    | JSON
    | st.fixed_dictionaries(
        {"token_ids": TOKEN_IDS, "score_start": st.integers(-2, 30) | JSON},
        optional={
            "num_logprobs": st.integers(-2, 300) | JSON,
            "temperature": st.floats(-1, 3) | JSON,
            "candidate_token_ids": st.lists(st.lists(st.integers(0, 33), max_size=3), max_size=24) | JSON,
            "return_entropy": st.booleans() | JSON,
            "idempotency_key": st.text(max_size=4) | JSON,
            "unknown": JSON,
        },
    )
)
HTTP_DOCUMENTED = {200, 400, 413, 422, 429}
"""What the OpenAPI page lists for POST /v1/score, less what a request can't bring about: 401, 415, 500, 503, 504."""


@pytest.fixture(scope="module")
def http_bodies() -> list[object]:
    """Random bodies, the same each time."""
    found: list[object] = []

    @settings(max_examples=150, database=None, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(BODIES)
    def collect(body: object) -> None:
        found.append(body)

    collect()
    return found


async def test_random_json_bodies_over_http(http_bodies: list[object]) -> None:
    """No 5xx, every problem a problem+json with a reason, and a service that scores as before."""
    seen = Counter[int]()
    async with running_service(FakeEngine(), log_level="warning") as service:
        for body in http_bodies:
            answer = await service.http.post("/v1/score", content=json.dumps(body), headers=JSON_TYPE)
            assert answer.status_code in HTTP_DOCUMENTED, (body, answer.text)
            assert answer.status_code == 200 or answer.json()["reason"].isupper()
            seen[answer.status_code] += 1
        good = await service.http.post("/v1/score", json={"token_ids": [1, 2, 3], "score_start": 1})
        assert good.status_code == 200
        assert "failed unexpectedly" not in service.log.getvalue()
    assert min(seen[200], seen[400]) > 3, seen
