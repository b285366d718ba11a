"""Teacher scores in verl's packed micro-batches: nothing is shifted, padded or mixed up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.errors import ShapeError
from trainer.types import TeacherScores, TeacherTimings
from trainer.verl_adapter import teacher_fields


def _scores(num_scored: int, k: int) -> TeacherScores:
    values = np.arange(num_scored * k, dtype=np.float32).reshape(num_scored, k)
    return TeacherScores(
        topk_token_ids=values.astype(np.int32),
        topk_logprobs=-values,
        log_tail_mass=np.full(num_scored, -np.inf, dtype=np.float32),
        sampled_logprobs=np.linspace(-1, -2, num_scored, dtype=np.float32),
        manifest_digest="d",
        endpoint="e",
        timings=TeacherTimings(total_s=0.1, queue_s=0.0, engine_s=0.1),
    )


def test_pack_and_unpack_are_inverse() -> None:
    """Every array comes back as it was, an empty tail of -inf included."""
    scores = _scores(3, 2)
    ids, logprobs = teacher_fields.pack(scores)
    assert ids.dtype == torch.int32
    assert logprobs.shape == (3, 4)
    columns = teacher_fields.unpack(ids, logprobs)
    np.testing.assert_array_equal(columns.topk_token_ids, scores.topk_token_ids)
    np.testing.assert_array_equal(columns.topk_logprobs, scores.topk_logprobs)
    np.testing.assert_array_equal(columns.log_tail_mass, scores.log_tail_mass)
    np.testing.assert_array_equal(columns.sampled_logprobs, scores.sampled_logprobs)


def test_scores_without_topk_are_refused() -> None:
    """A divergence on the top-k needs one."""
    scores = TeacherScores(
        sampled_logprobs=np.zeros(1, dtype=np.float32),
        manifest_digest="d",
        endpoint="e",
        timings=TeacherTimings(total_s=0.0, queue_s=0.0, engine_s=0.0),
    )
    with pytest.raises(ShapeError, match="num_logprobs >= 1"):
        teacher_fields.pack(scores)


def _rows(
    prompts: list[int], responses: list[int], masks: list[list[int]], teacher_lens: list[int] | None = None
) -> tuple[list[int], list[int]]:
    sequence_lens = torch.tensor([p + r for p, r in zip(prompts, responses, strict=True)])
    rows, teacher_rows = teacher_fields.response_rows(
        sequence_lens=sequence_lens,
        prompt_lens=torch.tensor(prompts),
        teacher_lens=torch.tensor(teacher_lens or responses),
        response_mask=torch.tensor([bit for mask in masks for bit in mask]),
        mask_lens=torch.tensor(responses),
    )
    return rows.tolist(), teacher_rows.tolist()


def test_a_response_token_is_predicted_one_position_before_it() -> None:
    """Prompts of 2 and 3, responses of 2 and 1: tokens at packed positions 2, 3 and 7, so logits at 1, 2 and 6."""
    assert _rows([2, 3], [2, 1], [[1, 1], [1]]) == ([1, 2, 6], [0, 1, 2])


def test_unlearned_tokens_are_left_out_of_both_sides() -> None:
    """A tool's tokens inside a response (mask 0) take no part, and the teacher's rows stay aligned."""
    assert _rows([2, 3], [3, 2], [[1, 0, 1], [0, 1]]) == ([1, 3, 8], [0, 2, 4])


def test_padding_sequences_are_skipped() -> None:
    """verl pads with sequences of mask 0 whose teacher rows are copies of another's."""
    assert _rows([2, 127, 2], [2, 1, 1], [[1, 1], [0], [1]], teacher_lens=[2, 128, 1]) == ([1, 2, 133], [0, 1, 130])


def test_rows_match_a_naive_walk() -> None:
    """The vectorised rows are those of a loop over sequences and tokens."""
    rng = np.random.default_rng(0)
    prompts, responses = rng.integers(1, 9, 20).tolist(), rng.integers(1, 9, 20).tolist()
    masks = [rng.integers(0, 2, n).tolist() for n in responses]
    expected, expected_teacher, position, teacher_position = [], [], 0, 0
    for prompt, response, mask in zip(prompts, responses, masks, strict=True):
        for j in range(response):
            if mask[j]:
                expected.append(position + prompt + j - 1)
                expected_teacher.append(teacher_position + j)
        position += prompt + response
        teacher_position += response
    assert _rows(prompts, responses, masks) == (expected, expected_teacher)


def test_missing_teacher_rows_are_an_error() -> None:
    """A learned response without as many teacher rows is never trained on."""
    with pytest.raises(ShapeError, match="sequence 1 has 3 response tokens but 2 teacher rows"):
        _rows([2, 2], [2, 3], [[1, 1], [1, 1, 1]], teacher_lens=[2, 2])
