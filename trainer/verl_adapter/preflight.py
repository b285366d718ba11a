"""What is checked before anything is started: data files, the student, and whether the teacher fits it.

Imports neither verl nor Ray: a run that can't work is refused in seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import structlog
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoTokenizer

from protos.manifest import SPECIAL_ROLES, Manifest
from trainer.config import GKDConfig, Mode
from trainer.errors import ConfigError, DatasetError
from trainer.teacher import StudentInfo, TeacherClient, check_compatibility
from trainer.verl_adapter.teachers import credentials_of

_log = structlog.get_logger(__name__)
REWARD_MODEL_COLUMN = "reward_model"
"""verl's column with the ground truth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRun:
    """What is known of a run once it was checked."""

    gkd: GKDConfig
    """Its GKD keys, with K capped at the teacher's vocabulary."""
    student_vocab_rows: int
    """Rows of the student's LM head."""
    manifest_digests: Mapping[str, str]
    """Digest of each teacher's manifest, by its name; empty: the run has no teacher."""


def preflight(config: DictConfig, gkd: GKDConfig, user_keys: Set[str]) -> CheckedRun:
    """Check all that can be checked, and print the resolved GKD section.

    Args:
        config: the composed configuration; validation is turned off in it where there is no file for it.
        gkd: its GKD keys.
        user_keys: dotted keys that the command line names.

    Raises:
        ConfigError: the student or the trainer mode does not work.
        DatasetError: a data file is missing or lacks columns.
        TeacherUnavailableError: no teacher answers.
        TeacherCredentialsError: the teacher does not accept the token, or its certificate is not the right one.
        TeacherMismatchError: the teacher does not fit the student.
    """
    _choose_validation(config, user_keys)
    files = {"train_files": config.data.train_files, "val_files": config.data.val_files}
    if gkd.mixes_off_policy and gkd.data.off_policy_files is not None:
        files["off_policy_files"] = gkd.data.off_policy_files
    for key, value in files.items():
        check_data_files(
            as_files(value),
            key=f"data.{key}",
            prompt_key=config.data.prompt_key,
            question_key=gkd.data.question_key,
        )
    if gkd.mixes_off_policy:
        check_answers(
            as_files(gkd.data.off_policy_files or config.data.train_files),
            key="data.off_policy_files" if gkd.data.off_policy_files else "data.train_files",
            answer_key=gkd.data.answer_key,
        )
    model = config.actor_rollout_ref.model
    student = read_student(model.path, trust_remote_code=bool(model.get("trust_remote_code", False)))
    if gkd.mode is Mode.GRPO:
        return CheckedRun(gkd=gkd, student_vocab_rows=student.vocab_rows, manifest_digests={})
    check_routes(gkd, as_files(config.data.train_files), key="data.train_files")
    max_tokens = int(config.data.max_prompt_length + config.data.max_response_length)
    gkd, manifests = fit_to_teachers(gkd, student, max_tokens=max_tokens)
    print(OmegaConf.to_yaml({"gkd": dict(describe(gkd, manifests))}), flush=True)  # noqa: T201  # for the user
    return CheckedRun(
        gkd=gkd,
        student_vocab_rows=student.vocab_rows,
        manifest_digests={name: manifest.digest for name, manifest in manifests.items()},
    )


def _choose_validation(config: DictConfig, user_keys: Set[str]) -> None:
    """Without validation files, don't validate: verl would look for a default path."""
    if "data.val_files" in user_keys:
        return
    config.data.val_files = config.data.train_files
    config.trainer.val_before_train = False
    config.trainer.test_freq = -1
    _log.info("no validation: data.val_files is not given")


def check_data_files(files: Sequence[str], *, key: str, prompt_key: str, question_key: str) -> None:
    """Check that every file is there and has a column to prompt with.

    Args:
        files: parquet files.
        key: the configuration key that names them, for the error.
        prompt_key: column of chat messages.
        question_key: column of plain questions.

    Raises:
        DatasetError: a file is missing, is no parquet file, is empty, or has neither column.
    """
    for name in files:
        path = Path(name).expanduser()
        if not path.is_file():
            raise DatasetError(f"{key}: there is no file {path}; give the path of a parquet file")
        if path.suffix != ".parquet":
            continue  # verl reads JSON as well, and says itself what it misses there
        try:
            schema = pq.read_schema(path)
            num_rows = pq.read_metadata(path).num_rows
        except (OSError, ValueError) as exc:  # pyarrow's errors are ValueErrors
            raise DatasetError(f"{key}: {path} is not a readable parquet file: {exc}") from exc
        if prompt_key not in schema.names and question_key not in schema.names:
            raise DatasetError(
                f"{key}: {path} has the columns {', '.join(schema.names)}; it needs {prompt_key!r} (chat messages) "
                f"or {question_key!r} (text). Set data.prompt_key or data.question_key to name yours."
            )
        if num_rows == 0:
            raise DatasetError(f"{key}: {path} has no rows; it needs at least one")


def check_answers(files: Sequence[str], *, key: str, answer_key: str) -> None:
    """Check that every parquet file of off-policy data has a column to take answers from.

    Args:
        files: as `check_data_files` let them pass.
        key: the configuration key that names them, for the error.
        answer_key: column of answers.

    Raises:
        DatasetError: a file has neither that column nor verl's `reward_model`.
    """
    for name in files:
        path = Path(name).expanduser()
        if path.suffix != ".parquet":
            continue
        columns = pq.read_schema(path).names
        if answer_key not in columns and REWARD_MODEL_COLUMN not in columns:
            raise DatasetError(
                f"{key}: {path} has the columns {', '.join(columns)}; off-policy data needs {answer_key!r} (text) or "
                f"{REWARD_MODEL_COLUMN!r} (with a ground_truth). Set data.answer_key to name yours."
            )


def read_student(model_path: str, *, trust_remote_code: bool) -> StudentInfo:
    """The student's token map and LM-head rows.

    Raises:
        ConfigError: there is no model at the path.
    """
    key = "actor_rollout_ref.model.path"
    path = Path(model_path).expanduser()
    if not path.exists() and (path.is_absolute() or model_path.startswith((".", "~")) or model_path.count("/") > 1):
        raise ConfigError(
            f"{key}={model_path}: there is no such folder; give a Hugging Face checkpoint's folder or hub id"
        )
    try:
        config = AutoConfig.from_pretrained(path if path.exists() else model_path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(
            path if path.exists() else model_path, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{key}={model_path}: no model could be loaded from it: {exc}") from exc
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in SPECIAL_ROLES}
    return StudentInfo(
        vocabulary=tokenizer.get_vocab(),
        vocab_rows=config.get_text_config().vocab_size,
        special_token_ids={role: token_id for role, token_id in ids.items() if token_id is not None},
    )


def check_routes(gkd: GKDConfig, files: Sequence[str], *, key: str) -> None:
    """Check that every row of every parquet file has a teacher.

    Args:
        gkd: the run's GKD keys.
        files: as `check_data_files` let them pass.
        key: the configuration key that names them, for the error.

    Raises:
        DatasetError: a file has no column `teacher.route_key`.
        ConfigError: a value in it has no route.
    """
    teacher = gkd.teacher
    if teacher.routes is None:
        return
    for name in files:
        path = Path(name).expanduser()
        if path.suffix != ".parquet":
            continue  # its rows are checked as they come
        columns = pq.read_schema(path).names
        if teacher.route_key not in columns:
            raise DatasetError(
                f"{key}: {path} has the columns {', '.join(columns)}; actor_rollout_ref.teacher.routes chooses the "
                f"teacher by {teacher.route_key!r}. Set actor_rollout_ref.teacher.route_key to name yours."
            )
        for value in pq.read_table(path, columns=[teacher.route_key]).column(0).unique().to_pylist():
            teacher.teacher_for(value)


def fit_to_teachers(
    gkd: GKDConfig, student: StudentInfo, *, max_tokens: int
) -> tuple[GKDConfig, Mapping[str, Manifest]]:
    """Connect to every teacher, compare it with the student, and cap K at the smallest vocabulary.

    Args:
        gkd: the run's GKD keys.
        student: what the teachers must fit.
        max_tokens: longest prompt plus response, in tokens.

    Raises:
        TeacherUnavailableError: a teacher does not answer.
        TeacherCredentialsError: a teacher does not accept the token, or its certificate is not the right one.
        TeacherMismatchError: a teacher does not fit.
    """
    manifests = asyncio.run(_fetch_manifests(gkd))
    smallest = min(manifest.vocab_rows for manifest in manifests.values())
    # an advantage needs the sampled token's logprob alone
    num_logprobs = 1 if gkd.teaches_by_advantages else min(gkd.teacher.num_logprobs, smallest)
    for name, manifest in manifests.items():
        check_compatibility(
            manifest,
            student,
            endpoint=_in_words(gkd.teacher.teachers[name]),
            num_logprobs=num_logprobs,
            temperature=gkd.request_temperature,
            max_tokens=max_tokens,
        )
    teacher = gkd.teacher.model_copy(update={"num_logprobs": num_logprobs})
    return gkd.model_copy(update={"teacher": teacher}), manifests


async def _fetch_manifests(gkd: GKDConfig) -> Mapping[str, Manifest]:
    settings = gkd.teacher
    manifests = {}
    for name, endpoints in settings.teachers.items():
        async with TeacherClient(
            endpoints=endpoints,
            timeout_s=settings.timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
            wait_ready_s=settings.max_wait_s,
            credentials=credentials_of(settings),
        ) as teacher:
            manifests[name] = teacher.manifest
    return manifests


def _in_words(endpoints: str | Sequence[str]) -> str:
    return endpoints if isinstance(endpoints, str) else ", ".join(endpoints)


def as_files(value: str | Sequence[str]) -> list[str]:
    """Verl takes one file or a list."""
    return [value] if isinstance(value, str) else list(value)


def describe(gkd: GKDConfig, manifests: Mapping[str, Manifest]) -> Mapping[str, Any]:
    """The resolved GKD section and its teachers, as printed once at the start."""
    return {
        "mode": gkd.mode.value,
        **gkd.model_dump(mode="json"),
        "manifests": {
            name: {
                "model_name": manifest.model_name,
                "engine": f"{manifest.engine} {manifest.engine_version}",
                "vocab_rows": manifest.vocab_rows,
                "digest": manifest.digest,
            }
            for name, manifest in manifests.items()
        },
    }
