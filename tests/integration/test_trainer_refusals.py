"""What the trainer refuses before anything is started: one clear line, and a non-zero exit code."""

from __future__ import annotations

import asyncio
import json
import socket
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

from examples.sort_digits.models import STUDENT_SIZE, build_model, save_model
from examples.sort_digits.task import TaskConfig, make_splits, write_splits
from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from tests.support.processes import kill_tree
from tests.support.service import running_service
from tests.support.trainer import TrainerRun

TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainerRun:
    """A run that lacks nothing but a teacher."""
    folder = tmp_path_factory.mktemp("run")
    splits = make_splits(TaskConfig(num_train=16, num_validation=1, num_held_out=1))
    files = write_splits(splits, folder)
    save_model(build_model(STUDENT_SIZE, seed=0), folder / "student")
    return TrainerRun(
        train_file=files["train"], student=folder / "student", endpoint=f"127.0.0.1:{_closed_port()}", folder=folder
    )


def _closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def _refusal(run: TrainerRun, changes: Mapping[str, object]) -> str:
    """What the trainer prints on stderr before it ends with code 1."""
    process = await asyncio.create_subprocess_exec(*run.command(changes), stdout=PIPE, stderr=PIPE, cwd=run.folder)
    try:
        _, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        if process.returncode is None:
            kill_tree(process.pid)  # it was not refused: Ray may be up by now
            await process.wait()
    assert process.returncode == 1
    assert b"Traceback" not in stderr
    return stderr.decode().strip().splitlines()[-1]


async def test_unreachable_teacher_is_named_with_its_remedy(run: TrainerRun) -> None:
    """Address, what was tried, and the command that starts one."""
    message = await _refusal(run, {"actor_rollout_ref.teacher.connect_timeout_s": 1})
    assert f"no teacher answers at {run.endpoint}" in message
    assert "python -m teacher_service serve" in message


async def test_missing_model_is_named(run: TrainerRun, tmp_path: Path) -> None:
    """A path that does not exist is no hub id."""
    missing = tmp_path / "nothing"
    message = await _refusal(run, {"actor_rollout_ref.model.path": missing})
    assert f"actor_rollout_ref.model.path={missing}: there is no such folder" in message


async def test_data_without_the_needed_columns_is_named(run: TrainerRun, tmp_path: Path) -> None:
    """The columns that are there, those that are needed, and the keys that rename them."""
    path = tmp_path / "wrong.parquet"
    pd.DataFrame({"text": ["a"]}).to_parquet(path)
    message = await _refusal(run, {"data.train_files": path})
    assert "has the columns text; it needs 'prompt' (chat messages) or 'question' (text)" in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("actor_rollout_ref.actor.gkd_only_mod", "actor_rollout_ref.actor.gkd_only_mode"),
        ("actor_rollout_ref.actor.gkd_lamda", "trainer.gkd_lambda"),
        ("teacher.server_port", "actor_rollout_ref.teacher.server_port"),
    ],
)
async def test_misspelled_key_is_answered_with_the_right_one(run: TrainerRun, wrong: str, right: str) -> None:
    """Hydra refuses the key; the last line says which was meant, also where it stands in another section."""
    message = await _refusal(run, {wrong: "1"})
    assert f"unknown key {wrong}; did you mean {right}" in message


async def test_teacher_with_another_token_map_is_refused(run: TrainerRun, tmp_path: Path) -> None:
    """Two tokens changed places: the first differing id and the student's token there are named."""
    save_model(build_model(STUDENT_SIZE, seed=0), tmp_path / "teacher")
    tokenizer_path = tmp_path / "teacher" / "tokenizer.json"
    tokenizer = json.loads(tokenizer_path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    tokenizer_path.write_text(json.dumps(tokenizer))
    engine = build_engine("transformers", EngineOptions(model=str(tmp_path / "teacher")))
    async with running_service(engine) as service:
        message = await _refusal(TrainerRun(**{**vars(run), "endpoint": service.addresses.grpc}), {})
    assert "does not fit" in message
    assert "token" in message
