"""The service's error table is complete: every class has a real code, status and reason of its own, and pickles."""

from __future__ import annotations

import ast
import http
import pickle
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

import teacher_service
from teacher_service.errors import TeacherServiceError, all_error_classes
from teacher_service.transports.http_models import problem_of
from teacher_service.transports.messages import error_to_pb, error_to_status

# What callers may build on: a change here breaks them.
TABLE = {
    "ADDRESS": ("INTERNAL", 500, False),
    "ANSWER_TOO_LARGE": ("RESOURCE_EXHAUSTED", 413, False),
    "CANCELLED": ("CANCELLED", 499, False),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED", 504, True),
    "DRAINING": ("UNAVAILABLE", 503, True),
    "EMPTY_SEQUENCE": ("INVALID_ARGUMENT", 400, False),
    "ENGINE_DEAD": ("UNAVAILABLE", 503, True),
    "ENGINE_ERROR": ("INTERNAL", 500, False),
    "ENGINE_START": ("INTERNAL", 500, False),
    "IDEMPOTENCY_KEY_REUSED": ("INVALID_ARGUMENT", 422, False),
    "INTERNAL": ("INTERNAL", 500, False),
    "INVALID_CANDIDATES": ("INVALID_ARGUMENT", 400, False),
    "INVALID_IDEMPOTENCY_KEY": ("INVALID_ARGUMENT", 400, False),
    "INVALID_REQUEST": ("INVALID_ARGUMENT", 400, False),
    "INVALID_STREAM_ID": ("INVALID_ARGUMENT", 400, False),
    "INVALID_TEMPERATURE": ("INVALID_ARGUMENT", 400, False),
    "INVALID_TIMEOUT": ("INVALID_ARGUMENT", 400, False),
    "INVALID_WIRE_DTYPE": ("INVALID_ARGUMENT", 400, False),
    "MALFORMED_REQUEST": ("INVALID_ARGUMENT", 400, False),
    "METHOD_NOT_ALLOWED": ("UNIMPLEMENTED", 405, False),
    "MISSING_CAPABILITY": ("FAILED_PRECONDITION", 422, False),
    "NOT_FOUND": ("UNIMPLEMENTED", 404, False),
    "NOT_READY": ("UNAVAILABLE", 503, True),
    "NUM_LOGPROBS_OUT_OF_RANGE": ("INVALID_ARGUMENT", 400, False),
    "OVERLOADED": ("RESOURCE_EXHAUSTED", 429, True),
    "OVER_MEMORY_BUDGET": ("RESOURCE_EXHAUSTED", 413, False),
    "REQUEST_TOO_LARGE": ("RESOURCE_EXHAUSTED", 413, False),
    "SCORE_START_OUT_OF_RANGE": ("INVALID_ARGUMENT", 400, False),
    "SEQUENCE_TOO_LONG": ("INVALID_ARGUMENT", 400, False),
    "SETTINGS": ("INTERNAL", 500, False),
    "TOKEN_ID_OUT_OF_RANGE": ("INVALID_ARGUMENT", 400, False),
    "UNAUTHENTICATED": ("UNAUTHENTICATED", 401, False),
    "UNKNOWN_FIELD": ("INVALID_ARGUMENT", 400, False),
    "UNSUPPORTED_CONTENT_TYPE": ("INVALID_ARGUMENT", 415, False),
}
CLIENT_CLOSED_REQUEST = 499  # nginx's number; no standard one says that the caller hung up

own_classes = pytest.mark.parametrize("error_class", all_error_classes(), ids=lambda cls: cls.__name__)


def test_the_table_is_the_documented_one() -> None:
    """Every reason once, with its code, its status, and whether a retry can help."""
    classes = all_error_classes()
    assert {cls.reason: (cls.grpc_code, cls.http_status, cls.retryable) for cls in classes} == TABLE
    assert len(classes) == len(TABLE)


def test_all_errors_of_the_service_stand_in_one_file() -> None:
    """A class derived elsewhere would be missing from the table until its module is imported."""
    names = {cls.__name__ for cls in all_error_classes()} | {"TeacherServiceError"}
    root = Path(teacher_service.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and path != root / "errors.py":
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & names, f"{path}: {node.name}"


@own_classes
def test_codes_and_statuses_exist(error_class: type[TeacherServiceError]) -> None:
    """The gRPC code is one of google.rpc.Code, the HTTP status a known error status."""
    assert error_class.grpc_code in code_pb2.Code.keys()  # noqa: SIM118 - a protobuf enum is no dict
    assert grpc.StatusCode[error_class.grpc_code] is not grpc.StatusCode.OK
    assert error_class.http_status == CLIENT_CLOSED_REQUEST or http.HTTPStatus(error_class.http_status) >= 400


@own_classes
def test_errors_pickle_with_all_they_carry(error_class: type[TeacherServiceError]) -> None:
    """Between processes nothing is lost."""
    error = error_class("told", metadata={"value": "1", "limit": "2"}, retry_delay_s=1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert (copy.message, copy.metadata, copy.retry_delay_s, str(copy)) == (
        "told",
        {"value": "1", "limit": "2"},
        1.5,
        "told",
    )


@own_classes
def test_every_form_tells_the_same(error_class: type[TeacherServiceError]) -> None:
    """Status details, stream error and problem+json carry one reason, one message, one delay."""
    error = error_class("told", metadata={"value": "1"}, retry_delay_s=1.5)
    status = error_to_status(error)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    in_stream = error_to_pb(error)
    problem = problem_of(error)
    assert info.domain == "teacher.v1"
    assert info.reason == in_stream.reason == problem.reason == error_class.reason
    assert dict(info.metadata) == dict(in_stream.metadata) == problem.metadata == {"value": "1"}
    assert status.message == in_stream.message == problem.detail == "told"
    assert retry.retry_delay.ToNanoseconds() / 1e9 == in_stream.retry_delay_s == problem.retry_delay_s == 1.5
    assert code_pb2.Code.Name(status.code) == problem.title == error_class.grpc_code
    assert in_stream.code == status.code


def test_an_error_without_a_delay_tells_none() -> None:
    """Absent is absent: no RetryInfo, no field."""
    error = TeacherServiceError.__subclasses__()[0]("told")
    assert len(error_to_status(error).details) == 1
    assert not error_to_pb(error).HasField("retry_delay_s")
    assert "retry_delay_s" not in problem_of(error).model_dump(exclude_none=True)
