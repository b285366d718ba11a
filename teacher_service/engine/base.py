"""The protocol that every engine follows."""

from __future__ import annotations

from typing import Protocol

from protos.arrays import ScoreArrays
from teacher_service.types import EngineInfo, Price, ScoreJob


class Engine(Protocol):
    """Turns token ids into logprobs. All methods run on one event loop and never block it."""

    async def start(self) -> EngineInfo:
        """Load the model.

        Raises:
            EngineStartError: the model can't be loaded; the message says which path and why.
        """
        ...

    def price(self, job: ScoreJob) -> Price:
        """The memory that scoring a job takes, at most."""
        ...

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """Score one sequence. Cancelling the call takes the work out of the engine.

        Raises:
            EngineDeadError: the engine is dead, or died under this job.
            EngineError: this job failed; the engine lives on.
        """
        ...

    async def wait_dead(self) -> BaseException:
        """Return the cause once the engine is dead; never returns while it lives."""
        ...

    async def close(self) -> None:
        """Free the model, its processes and its memory. Idempotent; allowed before `start`."""
        ...
