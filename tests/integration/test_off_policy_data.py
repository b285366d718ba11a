"""The split over real data files, in both shapes, through verl's own dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf

from examples.sort_digits.models import build_tokenizer
from trainer.config import GKDConfig
from trainer.config.gkd import ActorConfig, DataConfig, TrainerConfig
from trainer.errors import ConfigError, DatasetError
from trainer.verl_adapter.cpu import vllm_metadata

NUM_QUESTIONS, BATCH_SIZE = 40, 4
QUESTIONS = [f"{number:05d}=" for number in range(NUM_QUESTIONS)]
ANSWERS = ["".join(sorted(question[:5])) for question in QUESTIONS]


@pytest.fixture(scope="module", autouse=True)
def _vllm_alias() -> None:
    """verl asks for the metadata of `vllm` at import."""
    vllm_metadata.install_vllm_alias()


def _plain(folder: Path) -> Path:
    path = folder / "plain.parquet"
    pd.DataFrame({"question": QUESTIONS, "answer": ANSWERS}).to_parquet(path)
    return path


def _verl_shaped(folder: Path) -> Path:
    path = folder / "verl.parquet"
    pd.DataFrame(
        {
            "prompt": [[{"role": "user", "content": question}] for question in QUESTIONS],
            "data_source": "sort",
            "reward_model": [{"style": "rule", "ground_truth": answer} for answer in ANSWERS],
        }
    ).to_parquet(path)
    return path


def _mixed(train: Path, off_policy: Path | None, *, share: float = 0.7, **changes: Any) -> Any:
    from trainer.verl_adapter.dataset import GKDDataset
    from trainer.verl_adapter.off_policy import MixedData

    data = OmegaConf.create(
        {
            "prompt_key": "prompt",
            "question_key": "question",
            "answer_key": "answer",
            "train_batch_size": BATCH_SIZE,
            "max_prompt_length": 24,
            "max_response_length": 8,
            "truncation": "error",
            "shuffle": True,
            "seed": 3,
            "filter_overlong_prompts": False,
            "cache_dir": f"{train.parent}",
            "custom_cls": {"path": "pkg://trainer.verl_adapter.dataset", "name": "GKDDataset"},
            **changes,
        }
    )
    gkd = GKDConfig(
        actor=ActorConfig(use_teacher_kl_loss=True, gkd_only_mode=True),
        trainer=TrainerConfig(enable_off_policy=True, gkd_lambda=share),
        data=DataConfig(off_policy_files=None if off_policy is None else f"{off_policy}"),
    )
    tokenizer = build_tokenizer()
    dataset = GKDDataset(data_files=f"{train}", tokenizer=tokenizer, config=data)
    return MixedData(data, gkd, train_dataset=dataset, tokenizer=tokenizer, processor=None)


def _asked(mixed: Any, steps: range) -> dict[bool, list[str]]:
    asked: dict[bool, list[str]] = {True: [], False: []}
    for step in steps:
        batch = mixed.fetch(step)
        asked[mixed.is_on_policy(step)] += [one[0]["content"] for one in batch["raw_prompt"]]
    return asked


@pytest.mark.parametrize("train_shape", [_plain, _verl_shaped])
@pytest.mark.parametrize("off_policy_shape", [_plain, _verl_shaped, None])
def test_no_question_is_used_both_ways(tmp_path: Path, train_shape: Any, off_policy_shape: Any) -> None:
    """28 of 40 questions are on-policy, 12 off-policy, each once per epoch, whichever shape the files have."""
    mixed = _mixed(train_shape(tmp_path), None if off_policy_shape is None else off_policy_shape(tmp_path))
    assert mixed.schedule.steps_per_epoch == 10
    asked = _asked(mixed, range(1, 11))
    assert sorted(asked[True] + asked[False]) == QUESTIONS
    assert (len(asked[True]), len(asked[False])) == (28, 12)


def test_off_policy_rows_carry_their_answer(tmp_path: Path) -> None:
    """The tokens are those of the row's own answer, with EOS; such a row has its own loop and one response."""
    mixed = _mixed(_plain(tmp_path), None)
    batch = mixed.fetch(4)
    assert not mixed.is_on_policy(4)
    tokenizer = build_tokenizer()
    for messages, ids, agent, num in zip(
        batch["raw_prompt"], batch["gkd_answer_ids"], batch["agent_name"], batch["__rollout_n__"], strict=True
    ):
        answer = "".join(sorted(messages[0]["content"][:5]))
        assert list(ids) == [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        assert (agent, num) == ("gkd_ground_truth", 1)
    assert "agent_name" not in mixed.fetch(1)


def test_the_batch_of_a_step_needs_no_history(tmp_path: Path) -> None:
    """Asked for out of order, or by a resumed run, a step's batch is the same."""
    one, other = (_mixed(_plain(tmp_path), None) for _ in range(2))
    _asked(one, range(1, 7))
    assert _asked(one, range(7, 12)) == _asked(other, range(7, 12))


def test_answers_may_cover_a_part_only(tmp_path: Path) -> None:
    """Questions without an off-policy row are simply not used off-policy, and new ones may be added."""
    partial = tmp_path / "partial.parquet"
    questions = [*QUESTIONS[::2], "99999=", "88888=", "77777=", "66666="]
    pd.DataFrame({"question": questions, "answer": ["".join(sorted(one[:5])) for one in questions]}).to_parquet(partial)
    asked = _asked(_mixed(_plain(tmp_path), partial), range(1, 21))
    assert set(asked[False]) <= set(questions) - set(asked[True])


def test_pure_off_policy_uses_every_row(tmp_path: Path) -> None:
    """Lambda 0: forty answers, nothing generated."""
    asked = _asked(_mixed(_plain(tmp_path), None, share=0.0), range(1, 11))
    assert (asked[True], sorted(asked[False])) == ([], QUESTIONS)


def test_missing_answer_is_named(tmp_path: Path) -> None:
    """A null answer stops the run before it starts."""
    path = tmp_path / "null.parquet"
    pd.DataFrame({"question": QUESTIONS, "answer": [None, *ANSWERS[1:]]}).to_parquet(path)
    with pytest.raises(DatasetError, match=r"off-policy row 0 has neither an 'answer' .*ground_truth"):
        _mixed(_plain(tmp_path), path, share=0.0)


def test_overlong_answer_is_found_before_the_first_step(tmp_path: Path) -> None:
    """Not in the middle of the epoch."""
    with pytest.raises(DatasetError, match=r"more than data\.max_response_length=5"):
        _mixed(_plain(tmp_path), None, max_response_length=5)


def test_too_small_a_share_is_refused(tmp_path: Path) -> None:
    """Two off-policy questions do not fill a batch of four."""
    with pytest.raises(ConfigError, match="off-policy share holds 2 rows, fewer than one batch of 4"):
        _mixed(_plain(tmp_path), None, share=0.95)
