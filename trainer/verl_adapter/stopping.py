"""A verl trainer that ends in order, on request or when the teacher is lost: its last whole step is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from protos import tracing
from trainer.errors import CheckpointError, TeacherLostError
from trainer.verl_adapter.agent_loop import LOST_TAG
from trainer.verl_adapter.stop_flag import is_stop_requested

TRAIN = "train"
"""verl's partition of training responses."""


class StopRequested(Exception):  # noqa: N818 - no error
    """Somebody asked the run to end."""


@dataclass(frozen=True, kw_only=True)
class _WholeStep:
    """The last step that was finished, and where the data stood then."""

    number: int
    loader_state: dict[str, Any] | None
    """None where the queue itself remembers what is under way, as in verl's asynchronous modes."""


class _LoaderState:
    """Stands in for the dataloader while a checkpoint is written."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


class StoppableMixin:
    """Mixed in before one of verl's trainers.

    Weights only change in an update, and a step is only given up before its first one: what is saved then is the state
    after the step before, from which a resumed run takes the same data.
    """

    config: Any
    global_steps: int
    local_trigger_step: int
    train_dataloader: Any
    replay_buffer: Any
    trainer_mode: str
    _whole_step: _WholeStep | None = None
    _saved_step: int | None = None

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()  # type: ignore[misc]  # verl's trainer follows in the class order
        wait, take = buffer._wait_for_next_poll, buffer._materialize_batch

        def watched_wait(partition_id: str, last_debug_time: float) -> float:
            if self.local_trigger_step == 0:
                self._check_stop()
            self._check_responses(buffer.partitions[partition_id], taken=False)
            return float(wait(partition_id, last_debug_time))

        def watched_take(
            partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict[str, dict[str, Any]]
        ) -> KVBatchMeta:
            chosen = set(selected_prompt_uids)
            here = {key: tag for key, tag in partition_snapshot.items() if key.split("_")[0] in chosen}
            self._check_responses(here, taken=True)
            return take(partition_id, selected_prompt_uids, partition_snapshot)

        buffer._wait_for_next_poll, buffer._materialize_batch = watched_wait, watched_take
        return buffer

    def _check_responses(self, responses: Mapping[str, Mapping[str, Any]], *, taken: bool) -> None:
        """Called with the tags of the responses that there are, or, `taken`, of those that a step is about to take.

        Raises:
            TeacherLostError: the run can't go on with them.
        """

    def fit(self, agent_loop_manager: Any) -> None:
        """verl's training loop.

        Raises:
            TeacherLostError: a response that is needed was not scored; says where the checkpoint is.
            CheckpointError: a checkpoint could not be written.
        """
        try:
            super().fit(agent_loop_manager)  # type: ignore[misc]
        except StopRequested:
            saved = self._save_whole_step()
            self._shutdown_dump_executor()  # type: ignore[attr-defined]
            print(f"stopped as requested; {saved}", flush=True)  # noqa: T201  # for the user
        except TeacherLostError as error:
            try:
                saved = self._save_whole_step()
            except CheckpointError as also:
                saved = f"moreover, {also}"
            raise TeacherLostError(f"{error}; {saved}") from error
        finally:
            tracing.flush()

    def on_step_begin(self) -> None:
        """Called by verl before it asks for the step's responses."""
        self._check_stop()
        super().on_step_begin()  # type: ignore[misc]

    def on_step_end(self) -> None:
        """Called by verl after the update."""
        super().on_step_end()  # type: ignore[misc]
        self._whole_step = _WholeStep(
            number=self.global_steps,
            loader_state=self.train_dataloader.state_dict() if self.trainer_mode == "sync" else None,
        )

    def _save_checkpoint(self) -> None:
        try:
            super()._save_checkpoint()  # type: ignore[misc]
        except (OSError, RuntimeError, ray.exceptions.RayTaskError) as exc:
            # torch says "PytorchStreamWriter failed" of a full disk, in a RuntimeError
            raise CheckpointError(
                f"the checkpoint of step {self.global_steps} can't be written to {self._checkpoint_folder}: "
                f"{_last_line(exc)}; {self._last_checkpoint()}. Free space, or set trainer.default_local_dir to "
                "another disk, and start the same command again"
            ) from exc
        self._saved_step = self.global_steps

    @property
    def _checkpoint_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir).absolute()

    def _last_checkpoint(self) -> str:
        if self._saved_step is None:
            return "none was written before in this run"
        return f"that of step {self._saved_step} is whole"

    def _check_stop(self) -> None:
        if is_stop_requested(self.config):
            raise StopRequested

    def _save_whole_step(self) -> str:
        """Save the state after the last finished step; returns what there is now, in words."""
        step = self._whole_step
        if step is None:
            return "no step was finished, so there is nothing to save"
        if self._saved_step != step.number:
            with self._as_after(step):
                self._save_checkpoint()
        return (
            f"the checkpoint of step {step.number} is in {self._checkpoint_folder}: the same command with "
            "trainer.resume_mode=auto goes on from there"
        )

    @contextmanager
    def _as_after(self, step: _WholeStep) -> Iterator[None]:
        """Within it, verl's trainer looks as it did after that step."""
        number, loader = self.global_steps, self.train_dataloader
        self.global_steps = step.number
        if step.loader_state is None:
            _generate_again(self.replay_buffer.partitions[TRAIN])
        else:
            self.train_dataloader = _LoaderState(step.loader_state)
        try:
            yield
        finally:
            self.global_steps, self.train_dataloader = number, loader


def _generate_again(responses: Mapping[str, Mapping[str, Any]]) -> None:
    """Let a resumed run generate and score anew what the teacher did not score."""
    prompts = {key.split("_")[0]: tag["global_steps"] for key, tag in responses.items() if LOST_TAG in tag}
    if prompts:
        tags = [{"is_prompt": True, "status": "pending", "global_steps": step} for step in prompts.values()]
        tq.kv_batch_put(keys=list(prompts), partition_id=TRAIN, tags=tags)


def _last_line(error: BaseException) -> str:
    """What a remote error says at its end, without its traceback."""
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
