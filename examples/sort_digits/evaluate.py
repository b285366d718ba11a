"""Greedy exact-match accuracy of a Hugging Face checkpoint.

`python -m examples.sort_digits.evaluate --model DIR --questions FILE.parquet` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from examples.sort_digits.encoding import encode_rows
from examples.sort_digits.task import Row

BATCH_SIZE = 500
"""Rows generated together; more brings nothing on two cores."""


def evaluate(checkpoint: Path, rows: Sequence[Row]) -> float:
    """Share of rows, in [0, 1], whose greedy response is the answer and the end of turn, token by token.

    The weights are read as saved and computed with in float32.

    Raises:
        ValueError: there are no rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    encoded = encode_rows(rows, tokenizer)
    answer_tokens = encoded.answers.shape[1]
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=answer_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    num_right = 0
    for first in range(0, len(encoded), BATCH_SIZE):
        prompts = encoded.prompts[first : first + BATCH_SIZE]
        answers = encoded.answers[first : first + BATCH_SIZE]
        output = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy)
        responses = output[:, encoded.prompt_tokens :]
        # Generation ends when every row has ended its turn, which may be too early for any to be right.
        if responses.shape == answers.shape:
            num_right += int((responses == answers).all(dim=1).sum())
    return num_right / len(encoded)


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read what `task.write_parquet` wrote."""
    table = pd.read_parquet(path, columns=["question", "answer"])
    return tuple(Row(question=q, answer=a) for q, a in zip(table["question"], table["answer"], strict=True))


def main(
    *,
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Hugging Face checkpoint.")],
    questions: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Parquet with question and answer.")],
) -> None:
    """Print the share of questions that the model answers right, greedily."""
    transformers.utils.logging.disable_progress_bar()
    typer.echo(f"{evaluate(model, read_rows(questions)):.4f}")


if __name__ == "__main__":
    typer.run(main)
