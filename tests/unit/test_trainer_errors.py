"""The trainer's errors, as they travel between processes."""

from __future__ import annotations

import pickle

import pytest

from trainer import errors
from trainer.errors import GKDError, TeacherError


def classes_below(cls: type[GKDError]) -> list[type[GKDError]]:
    return [cls] + [found for child in cls.__subclasses__() for found in classes_below(child)]


ALL = [cls for cls in classes_below(GKDError) if cls.__module__ == errors.__name__]
TEACHER_ERRORS = [cls for cls in ALL if issubclass(cls, TeacherError)]


@pytest.mark.parametrize("cls", TEACHER_ERRORS)
def test_a_teacher_error_pickles_with_all_it_knows(cls: type[TeacherError]) -> None:
    """Class, message, endpoint, reason, metadata and delay survive."""
    error = cls("what", endpoint="host:1", reason="WHY", metadata={"limit": "7"}, retry_delay_s=1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert (str(copy), copy.endpoint, copy.reason) == ("what", "host:1", "WHY")
    assert (copy.metadata, copy.retry_delay_s) == ({"limit": "7"}, 1.5)


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls not in TEACHER_ERRORS])
def test_every_other_error_pickles(cls: type[GKDError]) -> None:
    """Class and message survive."""
    copy = pickle.loads(pickle.dumps(cls("what")))
    assert type(copy) is cls
    assert str(copy) == "what"


def test_what_a_user_got_wrong_is_a_value_error() -> None:
    """Configuration, data and arguments can be caught without knowing this package."""
    assert {cls.__name__ for cls in ALL if issubclass(cls, ValueError)} >= {
        "ConfigError",
        "DatasetError",
        "ShapeError",
        "TeacherRequestError",
    }
