"""Every bad input is refused with its reason, value and limit through every door, and the service lives on."""

from __future__ import annotations

import asyncio
import json

import grpc
import numpy as np
import pytest

from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.engine.fake import FakeEngine
from tests.support.service import (
    DOORS,
    Door,
    Service,
    by_http_protobuf,
    by_json,
    by_stream,
    by_unary,
    running_service,
    score_request,
)
from tests.support.waiting import TIMEOUT_S

MAX_MODEL_LEN = 64
MAX_REQUEST_BYTES = 4096
VOCAB_ROWS = 32
GOOD = score_request(range(8), 5, num_logprobs=1)


def candidates(num_rows: int, *ids: int) -> pb.Candidates:
    return pb.Candidates(count=len(ids), token_ids=np.array([ids] * num_rows, dtype="<i4").tobytes())


# name -> request, reason, value and limit as the metadata must tell them
TEMPERATURES = "[0.0001, 10000]"
BAD_REQUESTS = {
    "empty sequence": (score_request([], 1), "EMPTY_SEQUENCE", "0", "2..64"),
    "score_start zero": (score_request(range(8), 0), "SCORE_START_OUT_OF_RANGE", "0", "[1, 8)"),
    "score_start negative": (score_request(range(8), -3), "SCORE_START_OUT_OF_RANGE", "-3", "[1, 8)"),
    "score_start at the end": (score_request(range(8), 8), "SCORE_START_OUT_OF_RANGE", "8", "[1, 8)"),
    "score_start beyond": (score_request(range(8), 2**31 - 1), "SCORE_START_OUT_OF_RANGE", "2147483647", "[1, 8)"),
    "one token": (score_request([1], 1), "SCORE_START_OUT_OF_RANGE", "1", "[1, 1)"),
    "token id negative": (score_request([1, -1, 2], 1), "TOKEN_ID_OUT_OF_RANGE", "-1", "[0, 32)"),
    "token id too large": (score_request([1, 2, VOCAB_ROWS], 1), "TOKEN_ID_OUT_OF_RANGE", "32", "[0, 32)"),
    "sequence too long": (score_request([1] * 65, 1), "SEQUENCE_TOO_LONG", "65", "64"),
    "k above the maximum": (score_request(range(8), 5, 17), "NUM_LOGPROBS_OUT_OF_RANGE", "17", "[0, 16]"),
    "k negative": (score_request(range(8), 5, -1), "NUM_LOGPROBS_OUT_OF_RANGE", "-1", "[0, 16]"),
    "temperature zero": (score_request(range(8), 5, temperature=0.0), "INVALID_TEMPERATURE", "0.0", TEMPERATURES),
    "temperature negative": (
        score_request(range(8), 5, temperature=-1.0),
        "INVALID_TEMPERATURE",
        "-1.0",
        TEMPERATURES,
    ),
    "temperature nan": (
        score_request(range(8), 5, temperature=np.nan),
        "INVALID_TEMPERATURE",
        "nan",
        TEMPERATURES,
    ),
    "temperature tiny": (
        score_request(range(8), 5, temperature=2**-20),
        "INVALID_TEMPERATURE",
        f"{2**-20}",
        TEMPERATURES,
    ),
    "temperature inf": (
        score_request(range(8), 5, temperature=np.inf),
        "INVALID_TEMPERATURE",
        "inf",
        TEMPERATURES,
    ),
    "candidates of too few rows": (
        score_request(range(8), 5, candidates=candidates(2, 1, 2)),
        "INVALID_CANDIDATES",
        "2 rows of [2] ids",
        "[3, C]",
    ),
    "candidate out of range": (
        score_request(range(8), 5, candidates=candidates(3, 1, 99)),
        "INVALID_CANDIDATES",
        "99",
        "[0, 32)",
    ),
    "idempotency key too long": (
        score_request(range(8), 5, idempotency_key="k" * 129),
        "INVALID_IDEMPOTENCY_KEY",
        "129",
        "[1, 128]",
    ),
}


def engine() -> FakeEngine:
    return FakeEngine(vocab_rows=VOCAB_ROWS, max_model_len=MAX_MODEL_LEN, max_num_logprobs=16)


async def assert_still_answers(service: Service) -> None:
    """A good request works through every door; the analytic teacher's favourite is the prefix length."""
    for door in DOORS:
        outcome = await door(service, GOOD)
        assert (outcome.reason, outcome.topk_token_ids) == ("OK", [5, 6, 7])


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_each_bad_request_is_refused_with_value_and_limit(door: Door) -> None:
    """Reason, value and limit are the same through every door, and a good request works after all of them."""
    async with running_service(engine(), max_request_bytes=MAX_REQUEST_BYTES) as service:
        for name, (request, reason, value, limit) in BAD_REQUESTS.items():
            outcome = await door(service, request)
            told = (outcome.reason, outcome.code, outcome.metadata.get("value"), outcome.metadata.get("limit"))
            assert told == (reason, "INVALID_ARGUMENT", value, limit), name
            assert outcome.retry_delay_s is None, name
        await assert_still_answers(service)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_a_body_over_the_limit_is_refused_with_its_size(door: Door) -> None:
    """The refusal names size and limit and no retry delay: sending it again can't help."""
    async with running_service(engine(), max_request_bytes=MAX_REQUEST_BYTES) as service:
        outcome = await door(service, score_request([1] * MAX_REQUEST_BYTES, 1))
        assert (outcome.reason, outcome.code, outcome.metadata["limit"]) == (
            "REQUEST_TOO_LARGE",
            "RESOURCE_EXHAUSTED",
            "4096",
        )
        assert int(outcome.metadata["value"]) > MAX_REQUEST_BYTES
        assert outcome.retry_delay_s is None
        await assert_still_answers(service)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_garbage_bytes_are_a_malformed_request(door: Door) -> None:
    """Bytes that are no message are the caller's mistake, never an internal error."""
    async with running_service(engine()) as service:
        outcome = await door(service, b"\xff\x00garbage")
        assert (outcome.reason, outcome.code) == ("MALFORMED_REQUEST", "INVALID_ARGUMENT")
        await assert_still_answers(service)


async def test_garbage_for_get_manifest_is_a_malformed_request() -> None:
    """GetManifest has no fields, but its bytes are checked like any other's."""
    async with running_service(engine()) as service:
        call = service.channel.unary_unary("/teacher.v1.TeacherService/GetManifest")
        with pytest.raises(grpc.aio.AioRpcError, match=r"no teacher\.v1\.GetManifestRequest"):
            await call(b"\xff\x00garbage", timeout=10)


@pytest.mark.parametrize("door", [by_unary, by_stream, by_http_protobuf], ids=lambda door: door.__name__)
async def test_an_unknown_wire_dtype_is_refused(door: Door) -> None:
    """A number that the contract lacks is not taken for float32."""
    async with running_service(engine()) as service:
        outcome = await door(service, score_request(range(8), 5, wire_dtype=99))
        assert (outcome.reason, outcome.metadata["value"]) == ("INVALID_WIRE_DTYPE", "99")


@pytest.mark.parametrize(
    ("body", "reason", "named"),
    [
        (b'{"token_ids": [1, 2], "score_start": 1, "num_logprob": 3}', "UNKNOWN_FIELD", "did you mean num_logprobs"),
        (b'{"token_ids": [1, 2], "score_start": 1, "wire_dtype": 1}', "UNKNOWN_FIELD", "'wire_dtype'"),
        (b'{"token_ids": [1, 2]}', "MALFORMED_REQUEST", "score_start"),
        (b'{"token_ids": [1, 2.5], "score_start": 1}', "MALFORMED_REQUEST", "token_ids.1"),
        (b'{"token_ids": [1, "2"], "score_start": 1}', "MALFORMED_REQUEST", "token_ids.1"),
        (b'{"token_ids": [1, true], "score_start": 1}', "MALFORMED_REQUEST", "token_ids.1"),
        (b'{"token_ids": [1, NaN], "score_start": 1}', "MALFORMED_REQUEST", "token_ids.1"),
        (b'{"token_ids": [1, 2], "score_start": Infinity}', "MALFORMED_REQUEST", "score_start"),
        (b'{"token_ids": [1, 2], "score_start": null}', "MALFORMED_REQUEST", "score_start"),
        (b'{"token_ids": [1, 2], "score_start": 1, "temperature": NaN}', "INVALID_TEMPERATURE", "nan"),
        (b'{"token_ids": [1, 2], "score_start": 1, "temperature": 1e999}', "INVALID_TEMPERATURE", "inf"),
        (b'{"token_ids": [1, %d], "score_start": 1}' % 10**30, "TOKEN_ID_OUT_OF_RANGE", "above 10^20"),
        (b'{"token_ids": [1, 2], "score_start": %d}' % -(10**30), "SCORE_START_OUT_OF_RANGE", "-a number"),
        (b'{"token_ids": [1, 2, 3], "score_start": 1, "candidate_token_ids": [[1], [1, 2]]}', "INVALID_CANDIDATES", ""),
        (b"[1, 2]", "MALFORMED_REQUEST", "body"),
        (b"", "MALFORMED_REQUEST", "body"),
        (b'{"token_ids": [1, 2], "score_start": 1', "MALFORMED_REQUEST", "body"),
        (b'"\xff"', "MALFORMED_REQUEST", "body"),
    ],
)
async def test_bad_json_is_refused_by_name(body: bytes, reason: str, named: str) -> None:
    """Unknown fields, wrong types and numbers that JSON has no room for are told by the field's name."""
    async with running_service(engine()) as service:
        outcome = await by_json(service, body)
        assert (outcome.reason, outcome.code) == (reason, "INVALID_ARGUMENT")
        assert named in outcome.message
        assert (await by_json(service, GOOD)).reason == "OK"


async def test_a_body_in_chunks_is_refused_before_it_ends() -> None:
    """Without a stated length the body is refused as soon as it is too large: the last chunk is never sent here."""
    async with running_service(engine(), max_request_bytes=MAX_REQUEST_BYTES) as service:
        host, port = service.addresses.http.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/score HTTP/1.1\r\nHost: teacher\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        writer.write(b"1000\r\n" + b" " * 0x1000 + b"\r\n" + b"1\r\n \r\n")
        status = await asyncio.wait_for(reader.readline(), TIMEOUT_S)
        writer.close()
        await writer.wait_closed()
        assert status.split()[1] == b"413"


async def test_other_content_types_paths_and_methods_are_problems_too() -> None:
    """Whatever HTTP refuses by itself has the same form as the service's own errors."""
    async with running_service(engine()) as service:
        answers = [
            await service.http.post("/v1/score", content=b"x", headers={"content-type": "text/plain"}),
            await service.http.get("/v1/nothing"),
            await service.http.get("/v1/score"),
        ]
        assert [(one.status_code, one.json()["reason"]) for one in answers] == [
            (415, "UNSUPPORTED_CONTENT_TYPE"),
            (404, "NOT_FOUND"),
            (405, "METHOD_NOT_ALLOWED"),
        ]
        assert {one.headers["content-type"] for one in answers} == {"application/problem+json"}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
async def test_a_bad_timeout_header_is_refused(value: str) -> None:
    """A deadline that is no number of seconds is not taken for none."""
    async with running_service(engine()) as service:
        answer = await service.http.post(
            "/v1/score",
            content=json.dumps({"token_ids": [1, 2], "score_start": 1}),
            headers={"content-type": "application/json", "x-request-timeout-s": value},
        )
        assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID_TIMEOUT")
