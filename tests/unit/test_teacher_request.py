"""Both ends of one call: arguments that are checked before sending, answers that are checked before use."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from protos.codec import WireDtype
from protos.manifest import Capability
from protos.teacher.v1 import teacher_pb2 as pb
from tests.support.teacher_stub import stub_manifest, uniform_answer
from trainer.errors import TeacherAnswerError, TeacherRequestError
from trainer.teacher.request import CheckedRequest, build_request, read_answer

TOKENS = [5, 6, 7, 8, 9]
MANIFEST = stub_manifest()


def request(**arguments: object) -> CheckedRequest:
    """A request for three positions and three logprobs each, but for `arguments`."""
    usual = {
        "manifest": MANIFEST,
        "token_ids": TOKENS,
        "score_start": 2,
        "num_logprobs": 3,
        "temperature": 1.0,
        "wire_dtype": WireDtype.FLOAT32,
        "candidate_token_ids": None,
        "return_entropy": False,
    }
    return build_request(**(usual | arguments))  # type: ignore[arg-type]


def read(answer: pb.ScoreResponse, asked: CheckedRequest) -> object:
    return read_answer(answer, asked, manifest=MANIFEST, endpoint="host:1", student_vocab_rows=None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"token_ids": []}, r"token_ids has shape \[0\]"),
        ({"token_ids": [[1, 2]]}, r"token_ids has shape \[1, 2\]"),
        ({"token_ids": [0.5, 1.0]}, "token_ids has dtype float64"),
        ({"token_ids": [1, -1]}, r"spans -1 to 1, the teacher takes ids in \[0, 32\)"),
        ({"token_ids": [1, 32]}, r"spans 1 to 32, the teacher takes ids in \[0, 32\)"),
        ({"token_ids": [1] * 257}, "holds 257 tokens, the teacher scores at most 256"),
        ({"score_start": 0}, r"score_start is 0, must be in \[1, 5\)"),
        ({"score_start": -1}, "score_start is -1"),
        ({"score_start": 5}, r"score_start is 5, must be in \[1, 5\)"),
        ({"num_logprobs": -1}, r"num_logprobs is -1, must be in \[0, 16\]"),
        ({"num_logprobs": 17}, r"num_logprobs is 17, must be in \[0, 16\]"),
        ({"temperature": 0.0}, "temperature is 0.0, must be finite and > 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 0.5}, "needs temperature, the teacher's engine fake offers none"),
        ({"return_entropy": True}, "needs entropy"),
        ({"candidate_token_ids": np.zeros((3, 2), np.int32)}, "needs candidates"),
        ({"wire_dtype": WireDtype.FLOAT16}, "needs wire_float16"),
        ({"wire_dtype": WireDtype.BFLOAT16}, "needs wire_bfloat16"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, object], words: str) -> None:
    """It is a ValueError with value and limit."""
    with pytest.raises(TeacherRequestError, match=words) as caught:
        request(**arguments)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("token_ids", [(1, 2), [1, 2], np.array([1, 2], np.int32), np.array([1, 2], np.uint64)])
def test_token_ids_come_as_any_integers(token_ids: object) -> None:
    """Lists, tuples and arrays of any integer type mean the same."""
    assert list(request(token_ids=token_ids, score_start=1).message.token_ids) == [1, 2]


def test_what_was_not_asked_for_is_not_sent() -> None:
    """Defaults stay unset on the wire, and a key goes only to a teacher that can use it."""
    message = request().message
    assert not any(message.HasField(name) for name in ("temperature", "candidates", "idempotency_key"))
    able = stub_manifest(capabilities=frozenset({Capability.IDEMPOTENCY, Capability.TEMPERATURE}))
    message = request(manifest=able, temperature=0.5).message
    assert message.temperature == 0.5
    assert message.idempotency_key == request(manifest=able, temperature=0.5).key


def test_a_key_names_the_content() -> None:
    """Equal for equal questions to one teacher, whatever type the ids have; another for any other question."""
    key = request().key
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert request(token_ids=np.array(TOKENS)).key == key
    others = [
        request(token_ids=[*TOKENS[:-1], 10]),
        request(score_start=3),
        request(num_logprobs=4),
        request(manifest=stub_manifest(model_name="another")),
    ]
    assert len({one.key for one in others} | {key}) == 5


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        (np.zeros((2, 2), np.int32), "has 2 rows, must have one per scored position: 3"),
        (np.zeros(3, np.int32), "must be 2-dimensional"),
        (np.full((3, 1), 32), r"spans 32 to 32, the teacher takes ids in \[0, 32\)"),
        (np.zeros((3, 6000), np.int32), r"has 720\d\d bytes, the teacher's limit is 65536"),
    ],
)
def test_bad_candidates_are_refused(candidates: np.ndarray, words: str) -> None:
    """Shape, range and size of the candidates are checked."""
    able = stub_manifest(capabilities=frozenset({Capability.CANDIDATES}))
    with pytest.raises(TeacherRequestError, match=words):
        request(manifest=able, num_logprobs=0, candidate_token_ids=candidates)


def _invalid_answers() -> dict[str, Callable[[pb.ScoreResponse], object]]:
    nan = np.full(3, np.nan, dtype="<f4").tobytes()
    positive = np.full(3, 0.5, dtype="<f4").tobytes()
    foreign = np.full((3, 3), 32, dtype="<i4").tobytes()
    return {
        "one position short": lambda one: setattr(one, "scored_count", 2),
        "another K": lambda one: setattr(one, "num_logprobs", 4),
        "bytes missing": lambda one: setattr(one, "topk_logprobs", one.topk_logprobs[:-4]),
        "NaN": lambda one: setattr(one, "sampled_logprobs", nan),
        "probability above 1": lambda one: setattr(one, "sampled_logprobs", positive),
        "token id beyond the rows": lambda one: setattr(one, "topk_token_ids", foreign),
        "tail absent": lambda one: one.ClearField("log_tail_mass"),
        "entropy unasked": lambda one: setattr(one, "entropy", bytes(12)),
        "candidates unasked": lambda one: setattr(one, "candidate_logprobs", bytes(12)),
        "unknown dtype": lambda one: setattr(one, "wire_dtype", 9),
        "empty": lambda one: one.ClearField("sampled_logprobs"),
    }


@pytest.mark.parametrize("fault", list(_invalid_answers()))
def test_a_wrong_answer_is_refused(fault: str) -> None:
    """No array of an invalid answer reaches the caller; without the fault it would."""
    asked = request()
    answer = uniform_answer(asked.message, MANIFEST)
    read(answer, asked)
    answer.ClearField("payload_crc32")  # it would tell of any fault, before the check that the fault is for
    _invalid_answers()[fault](answer)
    with pytest.raises(TeacherAnswerError, match="the answer of the teacher at host:1 is invalid"):
        read(answer, asked)


def test_another_wire_type_than_asked_is_refused() -> None:
    """Precision that was asked for is not lost in silence."""
    asked = request()
    other = pb.ScoreRequest()
    other.CopyFrom(asked.message)
    other.wire_dtype = pb.WIRE_DTYPE_FLOAT16
    with pytest.raises(TeacherAnswerError, match="wire_dtype is float16, asked was float32"):
        read(uniform_answer(other, MANIFEST), asked)
