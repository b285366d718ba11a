"""What of a student must fit its teacher, read from its files."""

from __future__ import annotations

from dataclasses import dataclass

from protos.manifest import Manifest, TokenizerManifest
from teacher_service.engine.model_files import manifest_of_tokenizer
from teacher_service.errors import SettingsError


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """A student's vocabulary."""

    tokenizer: TokenizerManifest
    """What its tokenizer maps."""
    highest_id: int
    """Largest token id of the map."""
    vocab_rows: int
    """Rows of its LM head."""


def read_student(model: str) -> Student:
    """Read a student's tokenizer and config; no weights are loaded.

    Args:
        model: folder of a Hugging Face checkpoint, or a hub id.

    Raises:
        SettingsError: either can't be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model).get_text_config()
        return Student(
            tokenizer=manifest_of_tokenizer(tokenizer),
            highest_id=max(tokenizer.get_vocab().values()),
            vocab_rows=int(config.vocab_size),
        )
    except (OSError, ValueError, AttributeError) as exc:
        raise SettingsError(
            f"--student {model!r} can't be read: {exc}; give the folder of a Hugging Face checkpoint, or a hub id",
            metadata={"field": "--student", "value": model},
        ) from exc


def differences(manifest: Manifest, student: Student) -> list[str]:
    """Why the trainer would refuse this teacher for that student, in words; empty: it would not."""
    ours, theirs = student.tokenizer, manifest.tokenizer
    if theirs is not None and theirs.digest != ours.digest:
        return [
            f"the token maps differ{_where(theirs, ours)}: the teacher's has {theirs.token_count} tokens, the "
            f"student's {ours.token_count}"
        ]
    return [
        f"the {side}'s LM head has {rows} rows, and the token map reaches id {student.highest_id}"
        for side, rows in (("student", student.vocab_rows), ("teacher", manifest.vocab_rows))
        if student.highest_id >= rows
    ]


def _where(theirs: TokenizerManifest, ours: TokenizerManifest) -> str:
    if theirs.range_size != ours.range_size:
        return ""
    both = min(len(theirs.range_digests), len(ours.range_digests))
    differing = (i for i in range(both) if theirs.range_digests[i] != ours.range_digests[i])
    first = next(differing, both) * ours.range_size
    return f", first among the ids {first} to {first + ours.range_size - 1}"
