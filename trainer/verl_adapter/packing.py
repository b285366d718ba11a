"""How verl's engines lay out the tokens of a micro-batch before their logits reach the loss.

Legend: T tokens of a micro-batch one after the other, L rows of logits on this rank.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

from trainer.errors import ShapeError


def packed_positions(input_ids: Tensor, data_format: str | None) -> Tensor:
    """Which token each row of this rank's logits follows.

    verl's own packing is applied to the tokens' numbers, so that padding and context or sequence parallelism fall where
    they fall for the tokens themselves.

    Args:
        input_ids: the micro-batch's sequences, jagged.
        data_format: `thd` or `bshd` under Megatron, None under FSDP.

    Returns:
        `[L]` numbers in [0, T), -1 for padding.
    """
    numbers_T = torch.arange(1, input_ids.values().shape[0] + 1, device=input_ids.device)
    if data_format is None:
        if get_ulysses_sequence_parallel_world_size() > 1:
            numbers_T = slice_input_tensor(numbers_T.unsqueeze(0), dim=1).squeeze(0)
        return numbers_T - 1
    # importing it needs Megatron, which only its users have
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    numbers = torch.nested.nested_tensor_from_jagged(numbers_T, input_ids.offsets())  # type: ignore[attr-defined]
    pack = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    packed: Tensor = pack(numbers, pre_process=True)[0]
    return packed.flatten() - 1


def local_rows(packed_rows: Tensor, data: TensorDict, data_format: str | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """Where packed rows lie among this rank's logits.

    Args:
        packed_rows: `[S]` distinct numbers of tokens, in [0, T).
        data: the micro-batch.
        data_format: see `packed_positions`.
        num_rows: L.

    Returns:
        `[S']` rows of the logits and `[S']` indices into `packed_rows`, for those that lie on this rank.

    Raises:
        ShapeError: the logits were not packed as verl packs by default.
    """
    positions_L = packed_positions(data["input_ids"], data_format)
    if positions_L.shape[0] != num_rows:
        raise ShapeError(
            f"the engine packed {num_rows} rows of logits where {positions_L.shape[0]} were expected; fp8, dynamic "
            "context parallelism and padding to length buckets are not offered with a teacher, turn them off"
        )
    index_T = torch.full((data["input_ids"].values().shape[0],), -1, device=packed_rows.device)
    index_T[packed_rows] = torch.arange(packed_rows.shape[0], device=packed_rows.device)
    index_L = index_T[positions_L.clamp_min(0)].where(positions_L >= 0, -1)
    rows = (index_L >= 0).nonzero().squeeze(-1)
    return rows, index_L[rows]
