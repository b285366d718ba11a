"""The service with an engine that holds its jobs or dies, run as a process of its own.

A job is held until the file named by the first argument exists; a sequence that holds token 13 kills the engine.
The other arguments are settings as `name=value`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from protos.arrays import ScoreArrays
from teacher_service.__main__ import run_service
from teacher_service.config import ServiceSettings, load_settings
from teacher_service.engine.base import Engine
from teacher_service.engine.fake import FakeEngine
from teacher_service.types import ScoreJob

DEADLY_TOKEN_ID = 13


class HeldEngine(FakeEngine):
    """Answers once a file exists."""

    def __init__(self, gate: Path) -> None:
        super().__init__(deadly_token_id=DEADLY_TOKEN_ID)
        self._gate = gate

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        while not self._gate.exists():  # noqa: ASYNC110 - another process opens the gate
            await asyncio.sleep(0.01)
        return await super().score(job)


def main() -> None:
    def build_engine(_: ServiceSettings) -> Engine:
        return HeldEngine(Path(sys.argv[1]))

    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    run_service(load_settings({"engine": "fake", "grpc_port": 0, "http_port": 0} | given), build_engine)


if __name__ == "__main__":
    main()
