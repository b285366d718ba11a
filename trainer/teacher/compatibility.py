"""Whether a teacher fits a student, decided from its manifest before the first step. Pure but for one warning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

import structlog

from protos.manifest import Capability, Manifest, TokenizerManifest
from trainer.errors import ConfigError, TeacherMismatchError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentInfo:
    """What of a student must fit its teacher."""

    vocabulary: Mapping[str, int]
    """Token to id, special and added tokens included (`tokenizer.get_vocab()`)."""
    vocab_rows: int
    """Rows of the student's LM head; may exceed the vocabulary (padding rows)."""
    special_token_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ids by role: eos, bos, pad, unk."""

    def __post_init__(self) -> None:
        if not self.vocabulary:
            raise ConfigError("the student's vocabulary is empty; pass tokenizer.get_vocab()")
        if self.vocab_rows < 1:
            raise ConfigError(f"the student's vocab_rows is {self.vocab_rows}, must be >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringPlan:
    """The most that a run will ask of its teacher, so that it is refused at the start and not at step 500."""

    num_logprobs: int = 0
    """Largest K."""
    temperature: float = 1.0
    """Temperature of the teacher's distribution."""
    max_tokens: int | None = None
    """Longest prompt plus response, in tokens. None: not known."""


DEFAULT_PLAN = ScoringPlan()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mismatch:
    reason: str
    message: str
    metadata: Mapping[str, str]


def check_compatibility(
    manifest: Manifest,
    student: StudentInfo | None,
    *,
    endpoint: str,
    num_logprobs: int = 0,
    temperature: float = 1.0,
    max_tokens: int | None = None,
) -> None:
    """Refuse a teacher that doesn't fit the student or the run.

    A teacher with more LM-head rows than its tokenizer has tokens fits; so does one whose special tokens play
    other roles (a warning says so), since a base and an instruct model share the token map.

    Args:
        manifest: what the teacher is.
        student: what it must fit; None skips the comparison of vocabularies.
        endpoint: `host:port` of the teacher, for the error.
        num_logprobs: largest K that will be asked for.
        temperature: temperature that will be asked for.
        max_tokens: longest prompt plus response in tokens; None where it is not known.

    Raises:
        TeacherMismatchError: they don't fit; the message names every difference, `reason` the first.
    """
    found = _request_mismatches(manifest, num_logprobs, temperature, max_tokens)
    if student is not None:
        found = _vocabulary_mismatches(manifest, student) + found
    if found:
        raise TeacherMismatchError(
            f"the teacher {manifest.model_name} at {endpoint} does not fit: " + "; ".join(one.message for one in found),
            endpoint=endpoint,
            reason=found[0].reason,
            metadata={name: value for one in found for name, value in one.metadata.items()},
        )
    if student is not None and manifest.tokenizer is not None:
        _warn_of_other_roles(manifest.tokenizer, student, endpoint)


def manifest_changed(
    endpoint: str, *, digest: str, checked: str, fields: Mapping[str, tuple[str, str]] | None = None
) -> TeacherMismatchError:
    """The error for a teacher that is another one than was checked.

    Args:
        endpoint: `host:port` of the teacher.
        digest: of the manifest it has now.
        checked: digest of the manifest that was checked.
        fields: what differs, each with the checked value and the one it has now; None where that is not known.
    """
    differing = f" ({words_of(fields)})" if fields else ""
    return TeacherMismatchError(
        f"the teacher at {endpoint} has the manifest digest {digest!r}, checked was {checked!r}{differing}: it was "
        "replaced during the run; start the checked teacher there again, or the run, to check the new one",
        endpoint=endpoint,
        reason="MANIFEST_CHANGED",
        metadata={"digest": digest, "checked": checked},
    )


def check_unchanged(endpoint: str, *, manifest: Manifest, checked: Manifest) -> None:
    """Refuse a teacher that is another one than was checked.

    Raises:
        TeacherMismatchError: it is; the message names the fields that differ.
    """
    if manifest.digest != checked.digest:
        fields = differing_fields(checked, manifest)
        raise manifest_changed(endpoint, digest=manifest.digest, checked=checked.digest, fields=fields)


def words_of(fields: Mapping[str, tuple[str, str]]) -> str:
    """Fields that differ, with both values."""
    return "; ".join(f"{field}: {one} / {other}" for field, (one, other) in fields.items())


def differing_fields(first: Manifest, second: Manifest) -> dict[str, tuple[str, str]]:
    """Fields in which two manifests differ, each with both values in words; the digest itself is left out."""
    found = {}
    for one in dataclasses.fields(Manifest):
        values = (getattr(first, one.name), getattr(second, one.name))
        if one.name != "digest" and values[0] != values[1]:
            found[one.name] = (_in_words(values[0]), _in_words(values[1]))
    return found


def _in_words(value: object) -> str:
    if isinstance(value, TokenizerManifest):
        return f"{value.token_count} tokens, digest {value.digest[:12]}"
    if isinstance(value, frozenset):
        return ", ".join(sorted(value)) or "none"
    return str(value)


def _request_mismatches(
    manifest: Manifest, num_logprobs: int, temperature: float, max_tokens: int | None
) -> list[_Mismatch]:
    found = []
    if num_logprobs > manifest.max_num_logprobs:
        found.append(
            _Mismatch(
                reason="NUM_LOGPROBS_OUT_OF_RANGE",
                message=f"num_logprobs is {num_logprobs}, the teacher's limit {manifest.max_num_logprobs}; "
                "ask for fewer, or start the teacher with a higher limit",
                metadata={"num_logprobs": str(num_logprobs), "max_num_logprobs": str(manifest.max_num_logprobs)},
            )
        )
    if max_tokens is not None and max_tokens > manifest.max_request_tokens:
        found.append(
            _Mismatch(
                reason="SEQUENCE_TOO_LONG",
                message=f"prompt plus response may reach {max_tokens} tokens, the teacher scores at most "
                f"{manifest.max_request_tokens}; shorten them, or raise the teacher's limit",
                metadata={"max_tokens": str(max_tokens), "max_request_tokens": str(manifest.max_request_tokens)},
            )
        )
    if temperature != 1.0 and Capability.TEMPERATURE not in manifest.capabilities:
        found.append(
            _Mismatch(
                reason="MISSING_CAPABILITY",
                message=f"temperature is {temperature:g}, but the teacher's engine {manifest.engine} scores at 1 only; "
                "set it to 1, or use an engine with the capability `temperature`",
                metadata={"temperature": str(temperature), "engine": manifest.engine},
            )
        )
    return found


def _vocabulary_mismatches(manifest: Manifest, student: StudentInfo) -> list[_Mismatch]:
    ours = TokenizerManifest.from_vocabulary(student.vocabulary, student.special_token_ids)
    theirs = manifest.tokenizer
    if theirs is not None and theirs.digest != ours.digest:
        return [_token_map_mismatch(theirs, ours, student)]
    highest_id = max(student.vocabulary.values())
    found = []
    if highest_id >= student.vocab_rows:
        found.append(
            _Mismatch(
                reason="STUDENT_ROWS",
                message=f"the student's LM head has {student.vocab_rows} rows, but the token map reaches id "
                f"{highest_id}; resize the student's embeddings to at least {highest_id + 1} rows",
                metadata={"student_vocab_rows": str(student.vocab_rows), "highest_token_id": str(highest_id)},
            )
        )
    if highest_id >= manifest.vocab_rows:
        found.append(
            _Mismatch(
                reason="TEACHER_ROWS",
                message=f"the teacher's LM head has {manifest.vocab_rows} rows, but the student's token map reaches id "
                f"{highest_id}; use a teacher of the student's model family",
                metadata={"teacher_vocab_rows": str(manifest.vocab_rows), "highest_token_id": str(highest_id)},
            )
        )
    return found


def _token_map_mismatch(theirs: TokenizerManifest, ours: TokenizerManifest, student: StudentInfo) -> _Mismatch:
    where = _first_difference(theirs, ours, student)
    rows = ""
    if student.vocab_rows < theirs.token_count:
        rows = f"; the student's LM head has {student.vocab_rows} rows for the teacher's {theirs.token_count} tokens"
    return _Mismatch(
        reason="TOKEN_MAP",
        message=f"the teacher's tokenizer has {theirs.token_count} tokens, the student's {ours.token_count}, and their "
        f"token maps differ{where}{rows}; use a teacher and a student with one token map",
        metadata={
            "teacher_token_count": str(theirs.token_count),
            "student_token_count": str(ours.token_count),
            "student_vocab_rows": str(student.vocab_rows),
        },
    )


def _first_difference(theirs: TokenizerManifest, ours: TokenizerManifest, student: StudentInfo) -> str:
    """Where two token maps part, in words that continue a sentence; empty where the digests can't tell."""
    if theirs.range_size != ours.range_size:
        return ""
    pairs = zip_longest(theirs.range_digests, ours.range_digests)
    number = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if number is None:
        return ""
    first, end = number * ours.range_size, (number + 1) * ours.range_size
    inside = [(token_id, token) for token, token_id in student.vocabulary.items() if first <= token_id < end]
    where = f", first among the ids {first} to {end - 1}"
    if not inside:
        return f"{where}, where the student has no token"
    token_id, token = min(inside)
    return f"{where}, where the student's first token is {token!r} (id {token_id})"


def _warn_of_other_roles(theirs: TokenizerManifest, student: StudentInfo, endpoint: str) -> None:
    roles = sorted(theirs.special_token_ids.keys() & student.special_token_ids.keys())
    differing = {
        role: {"teacher": theirs.special_token_ids[role], "student": student.special_token_ids[role]}
        for role in roles
        if theirs.special_token_ids[role] != student.special_token_ids[role]
    }
    if differing:
        _log.warning("teacher and student give special tokens other roles", endpoint=endpoint, roles=differing)
