"""What leaves through each transport describes the positions that were asked for: a shift by one fails here."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from protos.codec import scores_from_pb
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.engine.fake import FakeEngine, expected_logprobs
from tests.support.service import Service, running_service, score_request

VOCAB_ROWS = 32
TOKEN_IDS = [3, 1, 4, 1, 5, 9, 2, 6]
SCORE_START = 5
K = 3


def reference(temperature: float = 1.0) -> np.ndarray[Any, Any]:
    """[3, V]: what the analytic teacher predicts after prefixes of 5, 6 and 7 tokens."""
    return expected_logprobs([5, 6, 7], vocab_rows=VOCAB_ROWS, temperature=temperature)


async def ask_grpc(service: Service, request: pb.ScoreRequest) -> pb.ScoreResponse:
    answer: pb.ScoreResponse = await service.stub.Score(request, timeout=10)
    return answer


async def ask_stream(service: Service, request: pb.ScoreRequest) -> pb.ScoreResponse:
    call = service.stub.ScoreStream(timeout=10)
    await call.write(pb.ScoreStreamRequest(id="a", request=request))
    await call.done_writing()
    answer = await call.read()
    assert answer.id == "a"
    response: pb.ScoreResponse = answer.response
    return response


async def ask_http(service: Service, request: pb.ScoreRequest) -> pb.ScoreResponse:
    answer = await service.http.post(
        "/v1/score", content=request.SerializeToString(), headers={"content-type": "application/x-protobuf"}
    )
    assert answer.headers["content-type"] == "application/x-protobuf"
    return pb.ScoreResponse.FromString(answer.content)


@pytest.mark.parametrize("ask", [ask_grpc, ask_stream, ask_http])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
async def test_protobuf_answers_belong_to_their_positions(ask: Any, temperature: float) -> None:
    """Row i is the distribution after score_start + i tokens: top-k, sampled token, tail, entropy and candidates."""
    candidate_ids = np.array([[0, 31], [1, 30], [2, 29]], dtype=np.int32)
    request = score_request(
        TOKEN_IDS,
        SCORE_START,
        K,
        temperature=temperature,
        return_entropy=True,
        candidates=pb.Candidates(count=2, token_ids=candidate_ids.astype("<i4").tobytes()),
    )
    async with running_service(FakeEngine(vocab_rows=VOCAB_ROWS)) as service:
        answer = await ask(service, request)
        manifest = (await service.stub.GetManifest(pb.GetManifestRequest(), timeout=10)).manifest
    scores = scores_from_pb(answer, num_scored=3, num_logprobs=K, vocab_rows=VOCAB_ROWS, num_candidates=2)
    expected = reference(temperature)
    assert scores.topk_token_ids is not None
    assert scores.topk_token_ids.tolist() == [[5, 6, 7], [6, 7, 8], [7, 8, 9]]
    np.testing.assert_allclose(scores.topk_logprobs, np.sort(expected)[:, :-4:-1], rtol=1e-5)
    np.testing.assert_allclose(scores.sampled_logprobs, expected[[0, 1, 2], [9, 2, 6]], rtol=1e-5)
    np.testing.assert_allclose(np.exp(scores.log_tail_mass), np.exp(np.sort(expected)[:, :-3]).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(scores.entropy, -(np.exp(expected) * expected).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(scores.candidate_logprobs, expected[[[0], [1], [2]], candidate_ids], rtol=1e-5)
    assert answer.manifest_digest == manifest.digest
    assert answer.HasField("payload_crc32")  # it was checked above
    assert answer.timings.engine_s > 0
    assert answer.timings.encode_s > 0


async def test_json_answers_belong_to_their_positions() -> None:
    """JSON carries the same numbers as lists, and leaves out what was not asked for."""
    async with running_service(FakeEngine(vocab_rows=VOCAB_ROWS)) as service:
        body = {"token_ids": TOKEN_IDS, "score_start": SCORE_START, "num_logprobs": K}
        answer = (await service.http.post("/v1/score", json=body)).json()
        manifest = (await service.http.get("/v1/manifest")).json()
    assert answer["topk_token_ids"] == [[5, 6, 7], [6, 7, 8], [7, 8, 9]]
    np.testing.assert_allclose(answer["topk_logprobs"], np.sort(reference())[:, :-4:-1], rtol=1e-5)
    np.testing.assert_allclose(answer["sampled_logprobs"], reference()[[0, 1, 2], [9, 2, 6]], rtol=1e-5)
    assert set(answer) == {
        "scored_count",
        "num_logprobs",
        "topk_token_ids",
        "topk_logprobs",
        "sampled_logprobs",
        "log_tail_mass",
        "manifest_digest",
        "timings",
    }
    assert answer["manifest_digest"] == manifest["digest"]


async def test_an_empty_tail_is_minus_infinity_in_both_forms() -> None:
    """With the whole vocabulary asked for nothing is outside: -inf in bytes, the string "-Infinity" in JSON."""
    async with running_service(FakeEngine(vocab_rows=4)) as service:
        body = {"token_ids": [0, 1, 2], "score_start": 2, "num_logprobs": 4}
        raw = (await service.http.post("/v1/score", json=body)).text
        answer = await service.stub.Score(score_request([0, 1, 2], 2, 4), timeout=10)
    assert json.loads(raw)["log_tail_mass"] == ["-Infinity"]
    assert np.frombuffer(answer.log_tail_mass, "<f4").tolist() == [float("-inf")]


@pytest.mark.parametrize(
    ("wire_dtype", "itemsize", "tolerance"),
    [(pb.WIRE_DTYPE_FLOAT16, 2, 2e-3), (pb.WIRE_DTYPE_BFLOAT16, 2, 2e-2), (pb.WIRE_DTYPE_FLOAT32, 4, 1e-6)],
)
async def test_the_wire_dtype_asked_for_is_the_one_sent(wire_dtype: Any, itemsize: int, tolerance: float) -> None:
    """Top-k logprobs take the asked element type; the rest stays float32."""
    async with running_service(FakeEngine(vocab_rows=VOCAB_ROWS)) as service:
        answer = await service.stub.Score(score_request(TOKEN_IDS, SCORE_START, K, wire_dtype=wire_dtype), timeout=10)
    assert answer.wire_dtype == wire_dtype
    assert len(answer.topk_logprobs) == 3 * K * itemsize
    assert len(answer.sampled_logprobs) == 3 * 4
    scores = scores_from_pb(answer, num_scored=3, num_logprobs=K, vocab_rows=VOCAB_ROWS)
    np.testing.assert_allclose(scores.topk_logprobs, np.sort(reference())[:, :-4:-1], rtol=tolerance)


async def test_zero_logprobs_means_the_sampled_token_alone() -> None:
    """Nothing is padded: the top-k fields are absent, not empty."""
    async with running_service(FakeEngine(vocab_rows=VOCAB_ROWS)) as service:
        answer = await service.stub.Score(score_request(TOKEN_IDS, SCORE_START), timeout=10)
    assert [answer.HasField(name) for name in ("topk_token_ids", "topk_logprobs", "log_tail_mass")] == [False] * 3
    np.testing.assert_allclose(
        np.frombuffer(answer.sampled_logprobs, "<f4"), reference()[[0, 1, 2], [9, 2, 6]], rtol=1e-5
    )
