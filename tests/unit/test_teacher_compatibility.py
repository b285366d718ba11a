"""Whether a teacher fits a student."""

from __future__ import annotations

import dataclasses

import pytest
from structlog.testing import capture_logs

from protos.manifest import Capability, TokenizerManifest
from tests.support.teacher_stub import stub_manifest
from trainer.errors import ConfigError, TeacherMismatchError
from trainer.teacher import StudentInfo, check_compatibility
from trainer.teacher.compatibility import differing_fields

VOCABULARY = {f"t{i}": i for i in range(3000)}
ROLES = {"eos": 2, "pad": 0}
MANIFEST = stub_manifest(
    tokenizer=TokenizerManifest.from_vocabulary(VOCABULARY, ROLES), vocab_rows=3072, max_num_logprobs=8
)
STUDENT = StudentInfo(vocabulary=VOCABULARY, vocab_rows=3000, special_token_ids=ROLES)


def refusal(student: StudentInfo | None = STUDENT, **plan: float) -> TeacherMismatchError:
    with pytest.raises(TeacherMismatchError) as caught:
        check_compatibility(MANIFEST, student, endpoint="host:1", **plan)  # type: ignore[arg-type]
    return caught.value


def test_equal_token_maps_fit_whatever_the_padding_rows() -> None:
    """A teacher with more LM-head rows than its tokenizer has tokens is no mismatch, nor is such a student."""
    with capture_logs() as logs:
        check_compatibility(MANIFEST, STUDENT, endpoint="host:1", num_logprobs=8, max_tokens=256)
        check_compatibility(MANIFEST, dataclasses.replace(STUDENT, vocab_rows=4096), endpoint="host:1")
    assert logs == []


def test_a_differing_token_is_named_with_its_range() -> None:
    """The message says both counts, the first range that differs, and a token of the student there."""
    renamed = {("other" if token == "t2100" else token): i for token, i in VOCABULARY.items()}
    error = refusal(dataclasses.replace(STUDENT, vocabulary=renamed))
    assert "the teacher's tokenizer has 3000 tokens, the student's 3000" in str(error)
    assert "first among the ids 2048 to 3071, where the student's first token is 't2048' (id 2048)" in str(error)
    assert (error.endpoint, error.reason) == ("host:1", "TOKEN_MAP")


def test_the_first_of_several_differing_ranges_is_named() -> None:
    """With differences at 1030 and 2100 it is the lower range."""
    swapped = VOCABULARY | {"t1030": 2100, "t2100": 1030}
    error = refusal(dataclasses.replace(STUDENT, vocabulary=swapped))
    assert "the ids 1024 to 2047, where the student's first token is 't1024' (id 1024)" in str(error)


def test_a_shorter_token_map_is_named_with_both_counts() -> None:
    """A student that ends early lacks a range."""
    shorter = StudentInfo(vocabulary={f"t{i}": i for i in range(2048)}, vocab_rows=2048)
    error = refusal(shorter)
    assert error.metadata["teacher_token_count"] == "3000"
    assert error.metadata["student_token_count"] == "2048"
    assert "the ids 2048 to 3071, where the student has no token" in str(error)
    assert "the student's LM head has 2048 rows for the teacher's 3000 tokens" in str(error)


def test_a_student_with_fewer_rows_than_ids_is_refused() -> None:
    """Token 2999 needs 3000 rows."""
    error = refusal(dataclasses.replace(STUDENT, vocab_rows=2999))
    assert error.reason == "STUDENT_ROWS"
    assert "LM head has 2999 rows, but the token map reaches id 2999" in str(error)
    assert "at least 3000 rows" in str(error)


def test_a_teacher_without_a_tokenizer_is_compared_by_its_rows() -> None:
    """It takes ids as they are, as long as it has a row for each."""
    bare = stub_manifest(tokenizer=None, vocab_rows=3000)
    check_compatibility(bare, STUDENT, endpoint="host:1")
    with pytest.raises(TeacherMismatchError, match=r"teacher's LM head has 2999 rows.* reaches id 2999"):
        check_compatibility(dataclasses.replace(bare, vocab_rows=2999), STUDENT, endpoint="host:1")


@pytest.mark.parametrize(
    ("plan", "reason", "words"),
    [
        ({"num_logprobs": 9}, "NUM_LOGPROBS_OUT_OF_RANGE", "num_logprobs is 9, the teacher's limit 8"),
        ({"max_tokens": 257}, "SEQUENCE_TOO_LONG", "may reach 257 tokens, the teacher scores at most 256"),
        ({"temperature": 0.7}, "MISSING_CAPABILITY", "temperature is 0.7, but the teacher's engine fake scores at 1"),
    ],
)
def test_a_plan_beyond_the_teacher_is_refused(plan: dict[str, float], reason: str, words: str) -> None:
    """What would fail at some step fails before the first, with value and limit, also without a student."""
    for student in (STUDENT, None):
        error = refusal(student, **plan)
        assert error.reason == reason
        assert words in str(error)


def test_a_temperature_is_fine_with_the_capability() -> None:
    """An engine that applies it before the softmax may be asked."""
    able = stub_manifest(capabilities=frozenset({Capability.TEMPERATURE}))
    check_compatibility(able, None, endpoint="host:1", temperature=0.7)


def test_all_differences_are_named_at_once() -> None:
    """One refusal tells everything there is to mend."""
    error = refusal(dataclasses.replace(STUDENT, vocab_rows=10), num_logprobs=9, max_tokens=257, temperature=2.0)
    for words in ("10 rows", "num_logprobs is 9", "257 tokens", "temperature is 2"):
        assert words in str(error)


def test_other_roles_of_special_tokens_warn_only() -> None:
    """A base and an instruct model end their texts with other tokens of the same map."""
    student = dataclasses.replace(STUDENT, special_token_ids={"eos": 7, "pad": 0, "bos": 1})
    with capture_logs() as logs:
        check_compatibility(MANIFEST, student, endpoint="host:1")
    assert [(log["log_level"], log["roles"]) for log in logs] == [("warning", {"eos": {"teacher": 2, "student": 7}})]


def test_differing_fields_give_both_values() -> None:
    """The fields are named with both values in words, and the digest, which follows from them, is left out."""
    other = dataclasses.replace(MANIFEST, dtype="bfloat16", capabilities=frozenset({Capability.ENTROPY}))
    assert differing_fields(MANIFEST, other) == {"dtype": ("float32", "bfloat16"), "capabilities": ("none", "entropy")}


@pytest.mark.parametrize(
    ("vocabulary", "vocab_rows", "words"), [({}, 3, "vocabulary is empty"), ({"a": 0}, 0, "vocab_rows is 0")]
)
def test_a_student_that_makes_no_sense_is_refused(vocabulary: dict[str, int], vocab_rows: int, words: str) -> None:
    """An empty vocabulary or no rows fail when the student is described."""
    with pytest.raises(ConfigError, match=words):
        StudentInfo(vocabulary=vocabulary, vocab_rows=vocab_rows)
