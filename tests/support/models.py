"""Tiny real checkpoints on disk, for tests that need an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.sort_digits.models import ModelSize, build_model, save_model

SIZE = ModelSize(hidden_size=64, num_heads=2, intermediate_size=128)
VOCAB_ROWS = 96
"""Not a multiple of 64, to which vLLM pads its LM head inside."""
MAX_LEN = 512
_SHARPNESS = 8.0


def write_checkpoint(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab_rows: int = VOCAB_ROWS,
    max_len: int = MAX_LEN,
) -> Path:
    """Write a random model whose distributions are as peaked as a trained model's, and return its folder."""
    model = build_model(SIZE, seed=seed, vocab_rows=vocab_rows, max_len=max_len)
    with torch.no_grad():
        # Fresh weights predict almost uniformly: every top-k would be a tie and every tail mass the same.
        model.model.norm.weight.mul_(_SHARPNESS)
    save_model(model, directory, dtype=dtype)
    return directory
