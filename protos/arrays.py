"""The numpy form of one scored sequence, and the check that both ends of the wire run on it.

Legend: S scored positions, K top-k entries, C candidates per position, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]

# A float32 log-softmax can end a few ulp above 0; a probability of 1.001 is a fault.
LOGPROB_SLACK = 1e-3


class ScoreArraysError(ValueError):
    """Arrays of one scored sequence contradict the contract: wrong dtype, shape, range, or not finite."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreArrays:
    """A teacher's distribution at S positions. Row i predicts token `score_start + i`. Nats."""

    sampled_logprobs: Float32Array
    """[S]: logprob of the token that stands in the sequence."""
    topk_token_ids: Int32Array | None = None
    """[S, K]: the K most likely token ids, most likely first. None: K = 0."""
    topk_logprobs: Float32Array | None = None
    """[S, K]: their logprobs under the full-vocabulary softmax. None: K = 0."""
    log_tail_mass: Float32Array | None = None
    """[S]: log of the probability outside the top-k, -inf where nothing is. None: K = 0."""
    entropy: Float32Array | None = None
    """[S]: entropy of the full distribution. None: not asked for."""
    candidate_logprobs: Float32Array | None = None
    """[S, C]: logprobs of the candidates asked for. None: none asked for."""

    @property
    def num_scored(self) -> int:
        """S."""
        return int(self.sampled_logprobs.shape[0])

    @property
    def size(self) -> int:
        """Numbers in all arrays together."""
        arrays = (getattr(self, name) for name in self.__slots__)
        return sum(0 if one is None else int(one.size) for one in arrays)

    @property
    def num_logprobs(self) -> int:
        """K."""
        return 0 if self.topk_token_ids is None else int(self.topk_token_ids.shape[1])


def check_score_arrays(
    arrays: ScoreArrays,
    *,
    num_scored: int,
    num_logprobs: int,
    vocab_rows: int | None,
    mass_slack: float = 10 * LOGPROB_SLACK,
) -> None:
    """Check dtype, shape, range and finiteness of every array that is present.

    Args:
        arrays: what was scored.
        num_scored: S that was asked for.
        num_logprobs: K that was asked for.
        vocab_rows: V, the bound of token ids; None where it is not known.
        mass_slack: by how much rounding may lift the mass of a row's top-k above 1.

    Raises:
        ScoreArraysError: an array is missing, of the wrong dtype or shape, NaN, infinite, positive beyond
            rounding, an id is outside [0, V), or a row's top-k mass is above 1.
    """
    _check_logprobs("sampled_logprobs", arrays.sampled_logprobs, (num_scored,))
    _check_topk(arrays, num_scored, num_logprobs, vocab_rows, mass_slack)
    if arrays.entropy is not None:
        _check_dtype_and_shape("entropy", arrays.entropy, np.float32, (num_scored,))
        if not (np.isfinite(arrays.entropy).all() and (arrays.entropy >= -LOGPROB_SLACK).all()):
            raise ScoreArraysError("entropy holds a negative or non-finite value; an entropy is finite and >= 0")
    if arrays.candidate_logprobs is not None:
        if arrays.candidate_logprobs.ndim != 2:
            raise ScoreArraysError(f"candidate_logprobs has {arrays.candidate_logprobs.ndim} dimensions, not 2")
        _check_logprobs(
            "candidate_logprobs", arrays.candidate_logprobs, (num_scored, arrays.candidate_logprobs.shape[1])
        )


def _check_topk(
    arrays: ScoreArrays, num_scored: int, num_logprobs: int, vocab_rows: int | None, mass_slack: float
) -> None:
    ids, logprobs, tail = arrays.topk_token_ids, arrays.topk_logprobs, arrays.log_tail_mass
    if num_logprobs == 0:
        if ids is not None or logprobs is not None or tail is not None:
            raise ScoreArraysError("top-k arrays are present though num_logprobs is 0; they must be absent")
        return
    if ids is None or logprobs is None or tail is None:
        raise ScoreArraysError(f"a top-k array is absent though num_logprobs is {num_logprobs}")
    _check_dtype_and_shape("topk_token_ids", ids, np.int32, (num_scored, num_logprobs))
    _check_logprobs("topk_logprobs", logprobs, (num_scored, num_logprobs))
    _check_dtype_and_shape("log_tail_mass", tail, np.float32, (num_scored,))
    if np.isnan(tail).any() or (tail > LOGPROB_SLACK).any():
        raise ScoreArraysError("log_tail_mass holds NaN or a positive value; the log of a probability is <= 0")
    if ids.size and (int(ids.min()) < 0 or (vocab_rows is not None and int(ids.max()) >= vocab_rows)):
        raise ScoreArraysError(f"topk_token_ids spans {ids.min()}..{ids.max()}, outside [0, {vocab_rows})")
    mass = np.exp(logprobs, dtype=np.float64).sum(axis=1)
    if mass.size and float(mass.max()) > 1.0 + mass_slack:
        raise ScoreArraysError(f"the top-k of a position hold a probability of {mass.max():.4f}, above 1")


def _check_logprobs(name: str, values: Float32Array, shape: tuple[int, ...]) -> None:
    _check_dtype_and_shape(name, values, np.float32, shape)
    if not np.isfinite(values).all():
        raise ScoreArraysError(f"{name} holds NaN or an infinity; a logprob is finite")
    if values.size and float(values.max()) > LOGPROB_SLACK:
        raise ScoreArraysError(f"{name} holds {values.max():.6f}; a logprob is <= 0")


def _check_dtype_and_shape(
    name: str, values: NDArray[np.generic], dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if values.dtype != dtype:
        raise ScoreArraysError(f"{name} has dtype {values.dtype}, not {np.dtype(dtype)}")
    if values.shape != shape:
        raise ScoreArraysError(f"{name} has shape {list(values.shape)}, not {list(shape)}")
