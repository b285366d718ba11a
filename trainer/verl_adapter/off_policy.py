"""Training data where some batches are the student's own responses and others ground-truth answers."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.trainer.ppo.utils import create_rl_dataset
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from trainer.config import GKDConfig
from trainer.errors import DatasetError
from trainer.partition import BatchSchedule, Pool, split_questions
from trainer.verl_adapter.dataset import conversation_text
from trainer.verl_adapter.ground_truth import AGENT_NAME, ANSWER_IDS, tokenize_answers

_log = logging.getLogger(__name__)
DEFAULT_SHUFFLE_SEED = 1
"""Where `data.seed` is null: verl then shuffles differently in each run, and a resumed run would not continue."""


class MixedData:
    """Batches by step: which kind, and which rows. Holds no state, so a resumed run needs none."""

    def __init__(self, data: DictConfig, gkd: GKDConfig, *, train_dataset: Any, tokenizer: Any, processor: Any) -> None:
        """Split the questions and tokenise the answers.

        Args:
            data: verl's `data` section with our keys.
            gkd: the GKD keys; `mixes_off_policy` is true.
            train_dataset: verl's dataset of `data.train_files`.
            tokenizer: the student's.
            processor: the student's, or None.

        Raises:
            DatasetError: an off-policy row lacks an answer, or has an overlong one.
            ConfigError: a share holds less than one batch.
        """
        self._on_policy = train_dataset
        self._off_policy = train_dataset
        if gkd.data.off_policy_files is not None:
            files = gkd.data.off_policy_files
            self._off_policy = create_rl_dataset(
                [files] if isinstance(files, str) else list(files), data, tokenizer, processor, is_train=True
            )
        share, seed = gkd.trainer.gkd_lambda, gkd.trainer.data_partition_seed
        train_questions = _questions(self._on_policy, data.prompt_key)
        on_policy = split_questions(train_questions, on_policy_share=share, seed=seed)
        self._on_policy_rows = [row for row, one in enumerate(train_questions) if one in on_policy]
        off_policy_questions = _questions(self._off_policy, data.prompt_key)
        self._off_policy_rows = [row for row, one in enumerate(off_policy_questions) if one not in on_policy]
        self._answer_ids = tokenize_answers(
            [_answer(self._off_policy.dataframe[row], gkd.data.answer_key, row) for row in self._off_policy_rows],
            tokenizer,
            max_tokens=data.max_response_length,
            truncation=data.truncation,
        )
        shuffle_seed = DEFAULT_SHUFFLE_SEED if data.get("seed") is None else int(data.seed)
        pool = partial(Pool, seed=shuffle_seed, shuffle=bool(data.shuffle))
        on_batch, off_batch = data.train_batch_size, gkd.data.off_policy_batch_size or data.train_batch_size
        self._batch_sizes: dict[bool, int] = {True: on_batch, False: off_batch}
        on_rows, off_rows = len(self._on_policy_rows), len(self._off_policy_rows)
        self.schedule = BatchSchedule(
            on_policy_share=share,
            on_policy=pool(name="on-policy", num_rows=on_rows, batch_size=on_batch) if share > 0 else None,
            off_policy=pool(name="off-policy", num_rows=off_rows, batch_size=off_batch),
        )
        left_out = len(off_policy_questions) - off_rows
        _log.warning(
            "gkd_lambda=%s: %d rows on-policy, %d off-policy; %d off-policy rows are left out: their questions "
            "are used on-policy",
            share, on_rows, off_rows, left_out,
        )  # fmt: skip

    def is_on_policy(self, step: int) -> bool:
        """Whether the student writes the responses of a step, counted from 1."""
        return self.schedule.is_on_policy(step)

    def batch_size(self, step: int) -> int:
        """Prompts of a step."""
        return self._batch_sizes[self.is_on_policy(step)]

    def fetch(self, step: int) -> TensorDict:
        """The step's batch, as verl's dataloader would give it."""
        batch = self.schedule.batch(step)
        if batch.on_policy:
            rows = [self._on_policy[self._on_policy_rows[row]] for row in batch.rows]
        else:
            rows = [
                self._off_policy[self._off_policy_rows[row]]
                | {"agent_name": AGENT_NAME, "__rollout_n__": 1, ANSWER_IDS: self._answer_ids[row]}
                for row in batch.rows
            ]
        columns = collate_fn(rows)
        columns["uid"] = np.array([str(uuid.uuid4()) for _ in rows], dtype=object)
        return tu.get_tensordict(columns)


def _questions(dataset: Any, prompt_key: str) -> Sequence[str]:
    """What tells rows of one question from others: their messages, whichever columns they came from."""
    if not hasattr(dataset, "dataframe"):
        raise DatasetError(
            f"data.custom_cls is {type(dataset).__name__}, which keeps no table of its rows; off-policy data needs "
            "one to split the questions. Derive it from verl's RLHFDataset, or set trainer.enable_off_policy=false."
        )
    return [conversation_text(one) for one in dataset.dataframe[prompt_key]]


def _answer(row: dict[str, Any], answer_key: str, number: int) -> str:
    answer = row.get(answer_key)
    if answer is None:
        answer = (row.get("reward_model") or {}).get("ground_truth")
    if answer is None:
        raise DatasetError(
            f"off-policy row {number} has neither an {answer_key!r} (data.answer_key) nor a reward_model.ground_truth "
            "to learn from"
        )
    return str(answer)
