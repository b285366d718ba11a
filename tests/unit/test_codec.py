"""The codec: what goes in comes out, and what the contract does not allow never passes.

Legend: S scored positions, K top-k entries, C candidates per position, V vocabulary rows.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.arrays import ScoreArrays, ScoreArraysError, check_score_arrays
from protos.codec import (
    CodecError,
    WireDtype,
    decode_logprobs,
    decode_token_ids,
    encode_logprobs,
    encode_token_ids,
    manifest_from_pb,
    manifest_to_pb,
    scores_from_pb,
    scores_to_pb,
    wire_dtype_from_pb,
    wire_dtype_to_pb,
)
from protos.manifest import Capability, Manifest, TokenizerManifest
from protos.teacher.v1 import teacher_pb2 as pb

VOCAB_ROWS = 50
LOGPROB = st.floats(-1e4, 0.0, width=32)
ARRAYS = ("topk_token_ids", "topk_logprobs", "sampled_logprobs", "log_tail_mass", "entropy", "candidate_logprobs")


@st.composite
def score_arrays(draw: st.DrawFn) -> ScoreArrays:
    """Honest arrays: rows of log-softmax values, with any of the optional parts."""
    S, K, C = draw(st.integers(1, 5)), draw(st.integers(0, 6)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits_SV = rng.normal(scale=draw(st.sampled_from([0.1, 3.0, 50.0])), size=(S, VOCAB_ROWS))
    logprobs_SV = (logits_SV - np.logaddexp.reduce(logits_SV, axis=1, keepdims=True)).astype(np.float32)
    order_SV = np.argsort(-logprobs_SV, axis=1)
    topk_SK = order_SV[:, :K].astype(np.int32)
    return ScoreArrays(
        sampled_logprobs=logprobs_SV[:, 7],
        topk_token_ids=topk_SK if K else None,
        topk_logprobs=np.take_along_axis(logprobs_SV, order_SV[:, :K], axis=1) if K else None,
        log_tail_mass=draw(st.sampled_from([np.full(S, -np.inf, np.float32), logprobs_SV[:, 3]])) if K else None,
        entropy=np.abs(logprobs_SV[:, 1]) if draw(st.booleans()) else None,
        candidate_logprobs=logprobs_SV[:, :C] if C else None,
    )


def unpack(message: pb.ScoreResponse, like: ScoreArrays) -> ScoreArrays:
    num_candidates = 0 if like.candidate_logprobs is None else like.candidate_logprobs.shape[1]
    return scores_from_pb(
        message,
        num_scored=like.num_scored,
        num_logprobs=like.num_logprobs,
        vocab_rows=VOCAB_ROWS,
        num_candidates=num_candidates,
    )


def simple_arrays() -> ScoreArrays:
    """S = 2, K = 2, C = 1."""
    return ScoreArrays(
        sampled_logprobs=np.array([-1.0, -2.0], np.float32),
        topk_token_ids=np.array([[4, 5], [6, 7]], np.int32),
        topk_logprobs=np.array([[-1.0, -2.0], [-0.5, -3.0]], np.float32),
        log_tail_mass=np.array([-1.5, -2.5], np.float32),
        entropy=np.array([1.0, 2.0], np.float32),
        candidate_logprobs=np.array([[-3.0], [-4.0]], np.float32),
    )


def simple_message() -> pb.ScoreResponse:
    """As of a sender that writes no checksum: what is done to it shows in the other checks."""
    message = scores_to_pb(simple_arrays(), wire_dtype=WireDtype.FLOAT32, manifest_digest="d")
    message.ClearField("payload_crc32")
    return message


@settings(deadline=None)
@given(arrays=score_arrays(), wire_dtype=st.sampled_from(WireDtype))
def test_scores_survive_the_wire(arrays: ScoreArrays, wire_dtype: WireDtype) -> None:
    """float32 comes back bit for bit, the short types within their rounding, and what was absent stays absent."""
    message = scores_to_pb(arrays, wire_dtype=wire_dtype, manifest_digest="d")
    back = unpack(pb.ScoreResponse.FromString(message.SerializeToString()), arrays)
    short = {"topk_logprobs", "candidate_logprobs"}
    rtol = {WireDtype.FLOAT32: 0.0, WireDtype.FLOAT16: 2**-11, WireDtype.BFLOAT16: 2**-8}[wire_dtype]
    for name in ARRAYS:
        sent, received = getattr(arrays, name), getattr(back, name)
        if sent is None:
            assert received is None
            continue
        assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
        np.testing.assert_allclose(received, sent, rtol=rtol if name in short else 0.0, atol=2**-24 if rtol else 0.0)
    assert message.manifest_digest == "d"


@settings(deadline=None)
@given(values=st.lists(LOGPROB, min_size=1, max_size=20))
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    """Round to nearest, ties to even, bit for bit."""
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()
    assert encode_logprobs(array, WireDtype.BFLOAT16) == expected


def test_the_bytes_are_little_endian_and_row_major() -> None:
    """Literal layout, so that another language can read it."""
    assert encode_logprobs(np.array([[-1.0, -2.0]], np.float32), WireDtype.FLOAT32) == struct.pack("<2f", -1.0, -2.0)
    assert encode_logprobs(np.array([-1.5], np.float32), WireDtype.FLOAT16) == struct.pack("<e", -1.5)
    assert encode_logprobs(np.array([-1.0], np.float32), WireDtype.BFLOAT16) == b"\x80\xbf"
    assert encode_token_ids(np.array([[1, 2], [3, 4]], np.int64).T) == struct.pack("<4i", 1, 3, 2, 4)


def test_values_below_float16_saturate() -> None:
    """-1e5 nats become -65504, not -inf: an infinite logprob is refused at the other end."""
    payload = encode_logprobs(np.array([-1e5], np.float32), WireDtype.FLOAT16)
    assert decode_logprobs("x", payload, (1,), WireDtype.FLOAT16).tolist() == [-65504.0]


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 2**31 - 1), max_size=20))
def test_token_ids_survive_the_wire(ids: list[int]) -> None:
    """Every int32 id, in order."""
    array = np.array(ids, np.int32)
    assert decode_token_ids("ids", encode_token_ids(array), (len(ids),)).tolist() == ids


@settings(deadline=None)
@given(size=st.integers(0, 40), wire_dtype=st.sampled_from(WireDtype))
def test_payloads_of_another_length_are_refused(size: int, wire_dtype: WireDtype) -> None:
    """Truncated or padded bytes never become an array."""
    shape = (3, 2)
    if size == 6 * wire_dtype.itemsize:
        assert decode_logprobs("x", bytes(size), shape, wire_dtype).shape == shape
        return
    with pytest.raises(CodecError, match=f"x holds {size} bytes; shape \\[3, 2\\] needs {6 * wire_dtype.itemsize}"):
        decode_logprobs("x", bytes(size), shape, wire_dtype)


@pytest.mark.parametrize("name", ARRAYS)
@settings(deadline=None)
@given(cut=st.integers(1, 4))
def test_a_truncated_field_is_refused_by_name(name: str, cut: int) -> None:
    """Each array of the answer, cut by any number of bytes."""
    message = simple_message()
    setattr(message, name, getattr(message, name)[:-cut])
    with pytest.raises(CodecError, match=name):
        unpack(message, simple_arrays())


@pytest.mark.parametrize("name", ["topk_token_ids", "topk_logprobs", "log_tail_mass", "candidate_logprobs"])
def test_an_absent_field_that_was_asked_for_is_refused(name: str) -> None:
    """A missing array is an error, never zeros: 0.0 nats would be certainty."""
    message = simple_message()
    message.ClearField(name)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="absent"):
        unpack(message, simple_arrays())


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"num_scored": 3}, "2 positions and 2 logprobs; asked: 3, 2"),
        ({"num_logprobs": 1}, "2 positions and 2 logprobs; asked: 2, 1"),
        ({"num_candidates": 0}, "candidate_logprobs holds 8 bytes"),
        ({"num_candidates": 2}, "candidate_logprobs holds 8 bytes"),
        ({"vocab_rows": 7}, "outside"),
    ],
)
def test_an_answer_to_another_question_is_refused(asked: dict[str, Any], complaint: str) -> None:
    """The receiver compares the answer with what it asked for."""
    question = {"num_scored": 2, "num_logprobs": 2, "vocab_rows": VOCAB_ROWS, "num_candidates": 1} | asked
    with pytest.raises(CodecError, match=complaint):
        scores_from_pb(simple_message(), **question)


BREAKS: dict[str, Callable[[ScoreArrays], ScoreArrays]] = {
    "NaN": lambda a: dataclasses.replace(a, sampled_logprobs=np.array([np.nan, -1.0], np.float32)),
    "infinite logprob": lambda a: dataclasses.replace(a, sampled_logprobs=np.array([-np.inf, -1.0], np.float32)),
    "positive logprob": lambda a: dataclasses.replace(a, sampled_logprobs=np.array([0.1, -1.0], np.float32)),
    "NaN in the top-k": lambda a: dataclasses.replace(a, topk_logprobs=np.full((2, 2), np.nan, np.float32)),
    "more than certain": lambda a: dataclasses.replace(a, topk_logprobs=np.full((2, 2), -0.1, np.float32)),
    "negative id": lambda a: dataclasses.replace(a, topk_token_ids=np.full((2, 2), -1, np.int32)),
    "int64 ids": lambda a: dataclasses.replace(a, topk_token_ids=np.zeros((2, 2), np.int64)),
    "float64": lambda a: dataclasses.replace(a, sampled_logprobs=np.array([-1.0, -1.0])),
    "wrong shape": lambda a: dataclasses.replace(a, topk_logprobs=np.full((2, 1), -1.0, np.float32)),
    "NaN tail": lambda a: dataclasses.replace(a, log_tail_mass=np.full(2, np.nan, np.float32)),
    "positive tail": lambda a: dataclasses.replace(a, log_tail_mass=np.full(2, 0.1, np.float32)),
    "negative entropy": lambda a: dataclasses.replace(a, entropy=np.full(2, -1.0, np.float32)),
    "infinite entropy": lambda a: dataclasses.replace(a, entropy=np.full(2, np.inf, np.float32)),
    "NaN candidate": lambda a: dataclasses.replace(a, candidate_logprobs=np.full((2, 1), np.nan, np.float32)),
    "flat candidates": lambda a: dataclasses.replace(a, candidate_logprobs=np.full(2, -1.0, np.float32)),
    "no tail": lambda a: dataclasses.replace(a, log_tail_mass=None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_check_refuses_what_the_contract_does_not_allow(name: str) -> None:
    """Dtype, shape, range and finiteness."""
    good = simple_arrays()
    with pytest.raises(ScoreArraysError):
        check_score_arrays(
            BREAKS[name](good), num_scored=good.num_scored, num_logprobs=good.num_logprobs, vocab_rows=VOCAB_ROWS
        )


@pytest.mark.parametrize(
    "name", ["topk_logprobs", "sampled_logprobs", "log_tail_mass", "entropy", "candidate_logprobs"]
)
def test_the_receiver_refuses_nan_on_the_wire(name: str) -> None:
    """A sender without checks is caught at the other end."""
    message = simple_message()
    payload = bytearray(getattr(message, name))
    payload[:4] = struct.pack("<f", float("nan"))
    setattr(message, name, bytes(payload))
    with pytest.raises(CodecError):
        unpack(message, simple_arrays())


@pytest.mark.parametrize("name", ARRAYS)
@settings(deadline=None)
@given(bit=st.integers(0, 8 * 8 - 1))
def test_a_flipped_bit_is_refused_with_both_checksums(name: str, bit: int) -> None:
    """Any bit of any array; without the checksum many would be a believable logprob."""
    message = scores_to_pb(simple_arrays(), wire_dtype=WireDtype.FLOAT32, manifest_digest="d")
    unpack(message, simple_arrays())
    payload = bytearray(getattr(message, name))
    payload[bit // 8] ^= 1 << bit % 8
    setattr(message, name, bytes(payload))
    told = f"CRC-32 0x[0-9a-f]{{8}}, payload_crc32 is {message.payload_crc32:#010x}: they were damaged"
    with pytest.raises(CodecError, match=told):
        unpack(message, simple_arrays())


def test_the_checksum_is_zlibs_over_the_fields_by_number() -> None:
    """Literally, so that another language can write it; absent fields add nothing."""
    one = ScoreArrays(sampled_logprobs=np.array([-1.0], np.float32))
    assert scores_to_pb(one, wire_dtype=WireDtype.FLOAT32, manifest_digest="d").payload_crc32 == 0x4119E94A
    all_six = struct.pack("<4i", 4, 5, 6, 7) + struct.pack("<12f", -1, -2, -0.5, -3, -1, -2, -1.5, -2.5, 1, 2, -3, -4)
    message = scores_to_pb(simple_arrays(), wire_dtype=WireDtype.FLOAT32, manifest_digest="d")
    assert message.payload_crc32 == zlib.crc32(all_six)


def test_an_answer_without_a_checksum_is_read() -> None:
    """As from a service older than the field."""
    assert unpack(simple_message(), simple_arrays()).num_scored == 2


def test_a_tail_of_nothing_passes() -> None:
    """-inf is the log of no mass, and the only infinity on the wire."""
    arrays = dataclasses.replace(simple_arrays(), log_tail_mass=np.full(2, -np.inf, np.float32))
    back = unpack(scores_to_pb(arrays, wire_dtype=WireDtype.FLOAT32, manifest_digest="d"), arrays)
    assert back.log_tail_mass is not None
    assert back.log_tail_mass.tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize("wire_dtype", WireDtype)
def test_every_wire_dtype_has_its_number(wire_dtype: WireDtype) -> None:
    """There and back; unset means float32, an unknown number is refused."""
    assert wire_dtype_from_pb(wire_dtype_to_pb(wire_dtype)) is wire_dtype
    assert wire_dtype_from_pb(pb.WIRE_DTYPE_UNSPECIFIED) is WireDtype.FLOAT32
    with pytest.raises(CodecError, match="wire_dtype is 99"):
        wire_dtype_from_pb(99)


def a_manifest(tokenizer: TokenizerManifest | None, weights_digest: str | None) -> Manifest:
    return Manifest(
        model_name="m",
        weights_digest=weights_digest,
        tokenizer=tokenizer,
        vocab_rows=32,
        dtype="float32",
        max_model_len=64,
        max_num_logprobs=8,
        max_request_tokens=60,
        max_request_bytes=1000,
        capabilities=frozenset(Capability),
        engine="fake",
        engine_version="1",
        service_version="2",
        route="flat",
        route_reason=None if weights_digest is None else "vLLM 9 is not tested",
    )


@pytest.mark.parametrize("weights_digest", [None, "ab"])
@pytest.mark.parametrize(
    "tokenizer", [None, TokenizerManifest.from_vocabulary({f"t{i}": i for i in range(1500)}, {"eos": 3})]
)
def test_a_manifest_survives_the_wire(tokenizer: TokenizerManifest | None, weights_digest: str | None) -> None:
    """With every capability, with and without tokenizer and weights; the digest is the sender's."""
    manifest = a_manifest(tokenizer, weights_digest)
    assert manifest_from_pb(pb.Manifest.FromString(manifest_to_pb(manifest).SerializeToString())) == manifest


def test_an_unknown_capability_is_left_out_and_the_digest_kept() -> None:
    """An older client reads a newer teacher's manifest."""
    message = manifest_to_pb(a_manifest(None, None))
    message.capabilities.append(99)  # type: ignore[arg-type]
    back = manifest_from_pb(message)
    assert back.capabilities == frozenset(Capability)
    assert back.digest == message.digest


@pytest.mark.parametrize(("field", "value"), [("vocab_rows", 0), ("max_request_tokens", 1), ("digest", "")])
def test_a_manifest_without_sense_is_refused(field: str, value: object) -> None:
    """A default value where the contract has a bound means that the sender never set it."""
    message = manifest_to_pb(a_manifest(None, None))
    setattr(message, field, value)
    with pytest.raises(CodecError, match=field):
        manifest_from_pb(message)


def test_range_digests_of_a_broken_width_are_refused() -> None:
    """Half a digest is no digest."""
    message = manifest_to_pb(a_manifest(TokenizerManifest.from_vocabulary({"a": 0}, {}), None))
    message.tokenizer.range_digests += b"x"
    with pytest.raises(CodecError, match="9 bytes"):
        manifest_from_pb(message)
