"""Off-policy answers as response tokens."""

from __future__ import annotations

import pytest

from examples.sort_digits.models import build_tokenizer
from trainer.errors import DatasetError
from trainer.verl_adapter.ground_truth import tokenize_answers

TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id


def _digits(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def _tokenize(*answers: str, max_tokens: int = 6, truncation: str = "error") -> list[list[int]]:
    return tokenize_answers(answers, TOKENIZER, max_tokens=max_tokens, truncation=truncation)


def test_answers_end_with_eos_once() -> None:
    """EOS is added, unless the answer brings its own; an empty answer is EOS alone."""
    assert _tokenize("12345", f"123{TOKENIZER.eos_token}", "") == [
        [*_digits("12345"), EOS],
        [*_digits("123"), EOS],
        [EOS],
    ]


def test_overlong_answer_is_refused_with_its_length() -> None:
    """`data.truncation=error`, verl's default: row, length, limit and remedy."""
    with pytest.raises(DatasetError, match=r"row 1 has 7 tokens with EOS.*max_response_length=6.*data.truncation"):
        _tokenize("12345", "123456")


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        ("right", _digits("123456")),
        ("left", [*_digits("45678"), EOS]),
        ("middle", [*_digits("123"), *_digits("78"), EOS]),
    ],
)
def test_overlong_answer_is_cut_as_asked(truncation: str, expected: list[int]) -> None:
    """An answer cut at its end has no EOS: it is not over."""
    assert _tokenize("12345678", truncation=truncation) == [expected]


def test_no_answers_are_none() -> None:
    """A share of 1 leaves no off-policy rows."""
    assert _tokenize() == []
