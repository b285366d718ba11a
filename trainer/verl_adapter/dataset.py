"""Data files: verl's `prompt` column, or plain `question` and `answer` columns."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from verl.utils.dataset.rl_dataset import RLHFDataset

DATA_SOURCE = "question_answer"
"""`data_source` of rows that carry none."""


class GKDDataset(RLHFDataset):  # type: ignore[misc]  # verl carries no types
    """verl's dataset, which also takes questions and answers. Set as `data.custom_cls`."""

    def maybe_filter_out_long_prompts(self, dataframe: Dataset | None = None) -> Dataset:
        """Give plain questions verl's columns before verl filters them."""
        if dataframe is not None and self.prompt_key not in dataframe.column_names:
            dataframe = dataframe.map(
                _to_verl_row,
                with_indices=True,
                fn_kwargs={
                    "prompt_key": self.prompt_key,
                    "question_key": self.config.question_key,
                    "answer_key": self.config.answer_key,
                },
                desc="Reading questions",
            )
        return super().maybe_filter_out_long_prompts(dataframe)


def _to_verl_row(
    row: dict[str, Any], index: int, prompt_key: str, question_key: str, answer_key: str
) -> dict[str, Any]:
    added: dict[str, Any] = {prompt_key: [{"role": "user", "content": str(row[question_key])}]}
    if "data_source" not in row:
        added["data_source"] = DATA_SOURCE
    if "reward_model" not in row and answer_key in row:
        answer = row[answer_key]
        added["reward_model"] = {"style": "rule", "ground_truth": None if answer is None else str(answer)}
    if "extra_info" not in row:
        added["extra_info"] = {"index": index}
    return added


def conversation_text(messages: Iterable[Any]) -> str:
    """The same text for the same chat messages on every machine; of images and the like only their kind."""
    return json.dumps(list(messages), sort_keys=True, default=lambda one: type(one).__name__)
