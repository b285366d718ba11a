"""What the trainer reads from, and writes to, the responses of a batch in verl's TransferQueue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

from trainer.losses import teacher_advantages
from trainer.metrics import BatchCalls, TeacherCall, waited_s
from trainer.verl_adapter.agent_loop import GENERATED_AT, TEACHER_CALL, TEACHER_ERROR
from trainer.verl_adapter.loss import MINI_BATCH_COUNTS
from trainer.verl_adapter.teacher_fields import TEACHER_LOGPROBS


def collect_calls(batch: KVBatchMeta, *, wanted_at_s: float) -> BatchCalls:
    """What the batch's teacher calls cost.

    Args:
        batch: the responses that a step takes.
        wanted_at_s: when it began to want them, in seconds since the epoch.
    """
    fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
    # a list, a stack or an array, depending on the queue's backend
    extras = {key: getattr(one, "data", one) for key, one in zip(batch.keys, list(fields["extra_fields"]), strict=True)}
    calls = {key: TeacherCall(**one[TEACHER_CALL]) for key, one in extras.items() if TEACHER_CALL in one}
    failures = {key: one[TEACHER_ERROR] for key, one in extras.items() if TEACHER_ERROR in one}
    return BatchCalls(
        calls=calls,
        failed={key: one["teacher"] for key, one in failures.items()},
        num_responses=len(extras),
        waited_s=waited_s(
            [*(one.scored_at_s for one in calls.values()), *(one["ended_at_s"] for one in failures.values())],
            generated_at_s=max(one[GENERATED_AT] for one in extras.values()),
            wanted_at_s=wanted_at_s,
        ),
    )


def write_unused_advantages(batch: KVBatchMeta) -> KVBatchMeta:
    """Zeros where verl's bookkeeping reads rewards and advantages, and distillation alone has none."""
    fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
    mask = fields["response_mask"]
    zeros = response_to_nested(torch.zeros_like(mask.to_padded_tensor(0), dtype=torch.float32), mask)
    unused = TensorDict(dict.fromkeys(("rm_scores", "advantages", "returns"), zeros), batch_size=len(batch))
    return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=unused)


def add_teacher_advantages(batch: KVBatchMeta, coefficient: float) -> tuple[KVBatchMeta, float | None]:
    """Add `coefficient` times the teacher's advantage of each scored token to the batch's advantages.

    They are added as they are: normalising GRPO's advantages came before.

    Returns:
        The batch, and the mean of log q - log p over the scored tokens (an estimate of the reverse KL per token); None
        where none was scored.

    Raises:
        NumericsError: a scored token has no finite logprob.
    """
    select = ["response_mask", "old_log_probs", "advantages", TEACHER_LOGPROBS]
    fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=select)
    response_mask = fields["response_mask"]
    mask, student, advantages = (fields[name].to_padded_tensor(0) for name in select[:3])
    teacher, scored = torch.zeros_like(student), torch.zeros_like(mask)
    for row, one in enumerate(fields[TEACHER_LOGPROBS]):
        teacher[row, : len(one)], scored[row, : len(one)] = one[:, -1], 1
    scored = scored * mask
    taught = teacher_advantages(teacher, student, scored)
    put = TensorDict(
        {"advantages": response_to_nested(advantages + coefficient * taught, response_mask)}, batch_size=len(batch)
    )
    batch = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=put)
    num_scored = int(scored.sum())
    return batch, -float(taught.sum()) / num_scored if num_scored else None


def write_mini_batch_counts(batch: KVBatchMeta, *, mini_batch_size: int, num_ranks: int) -> KVBatchMeta:
    """Give each row the number of selected tokens and sequences in its mini-batch, over all ranks.

    verl itself counts the tokens of all responses; a mean over the selected ones needs this count, and a micro-batch
    sees only a part of them.

    Args:
        batch: rows in the order in which verl deals them out: a contiguous share to each rank, which cuts it into
            mini-batches.
        mini_batch_size: rows per optimizer step over all ranks.
        num_ranks: data-parallel ranks.
    """
    select = ["response_mask", "teacher_ids"]
    fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=select)
    scored = row_lengths(fields["teacher_ids"]) > 0
    learned = torch.tensor([int(one.sum()) for one in fields["response_mask"].unbind()])
    counts = mini_batch_counts(learned * scored, mini_batch_size=mini_batch_size, num_ranks=num_ranks)
    put = TensorDict({MINI_BATCH_COUNTS: counts}, batch_size=len(batch))
    return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=put)


def mini_batch_counts(selected_tokens: Tensor, *, mini_batch_size: int, num_ranks: int) -> Tensor:
    """`[R, 2]`: for each row, the selected tokens and the rows with any of them in its mini-batch.

    Args:
        selected_tokens: `[R]` learned and selected tokens per row, in the order of `write_mini_batch_counts`.
        mini_batch_size: rows per optimizer step over all ranks.
        num_ranks: data-parallel ranks.
    """
    per_row = torch.stack([selected_tokens, (selected_tokens > 0).to(selected_tokens.dtype)], dim=-1)
    shares = per_row.reshape(num_ranks, -1, mini_batch_size // num_ranks, 2)
    return shares.sum(dim=(0, 2), keepdim=True).expand_as(shares).reshape(-1, 2)


def row_lengths(values: Tensor | Sequence[Tensor]) -> Tensor:
    """`[R]` lengths of ragged rows, in whichever form the queue hands them out."""
    if isinstance(values, Tensor) and not values.is_nested:
        return torch.full((values.shape[0],), values.shape[1])
    if isinstance(values, Tensor):
        lengths: Tensor = values.offsets().diff()  # type: ignore[attr-defined]  # torch's stubs lack it
        return lengths
    return torch.tensor([len(one) for one in values])
