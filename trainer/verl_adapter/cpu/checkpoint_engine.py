"""How weights reach rollout engines in processes of their own on a CPU: as one file in the run's temporary folder.

verl's own transports for `trainer.v1.trainer_mode=separate_async` need an accelerator's network.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry
from verl.checkpoint_engine.base import ensure_async_iterator

from trainer.verl_adapter.cpu.environment import FILE_TRANSPORT

POLL_S = 0.02
RECEIVE_TIMEOUT_S = 600.0


@CheckpointEngineRegistry.register(FILE_TRANSPORT)
class FileCheckpointEngine(CheckpointEngine):  # type: ignore[misc]  # verl carries no types
    """Rank 0 of the actor writes the file, every rollout worker of the machine maps it."""

    def __init__(self, bucket_size: int, is_master: bool = False, **_rest: Any) -> None:
        """verl's signature.

        Args:
            bucket_size: of verl's own transports; a file has no buckets.
            is_master: whether this process writes.
        """
        self._is_master = is_master
        self._path: Path | None = None

    def prepare(self) -> dict[str, Any]:
        """Name the file of this synchronisation."""
        if not self._is_master:
            return {}
        return {"path": f"{tempfile.gettempdir()}/gkd-weights-{uuid.uuid4().hex}"}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Tell every worker the file's name."""
        path = next(one["path"] for one in metadata if one)
        return {"path": [path] * actor_wg_world_size}, {"path": [path] * rollout_world_size}

    def init_process_group(self, path: str) -> None:
        """There is no group: the file is all they share."""
        self._path = Path(path)

    def finalize(self) -> None:
        """Remove the file."""
        if self._is_master and self._path is not None:
            self._path.unlink(missing_ok=True)

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        """Write the weights. Every rank walks through them: gathering their shards is collective."""
        path = self._opened
        state = {name: tensor.detach().clone() async for name, tensor in ensure_async_iterator(weights)}
        if self._is_master:
            unfinished = path.with_suffix(".part")
            torch.save(state, unfinished)
            unfinished.rename(path)
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yield the weights once they are written.

        Raises:
            TimeoutError: they were not within ten minutes.
        """
        path, deadline_s = self._opened, time.monotonic() + RECEIVE_TIMEOUT_S
        while not path.exists():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the actor wrote no weights to {path} within {RECEIVE_TIMEOUT_S:.0f} s")
            await asyncio.sleep(POLL_S)
        for name, tensor in torch.load(path, mmap=True, weights_only=True).items():
            yield name, tensor

    @property
    def _opened(self) -> Path:
        if self._path is None:
            raise RuntimeError("init_process_group was not called")
        return self._path
