"""The service with a slow engine: `python -m benchmarks.overlap_teacher MODEL PORT_FILE LATENCY_S MAX_MODEL_LEN`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
import typer

from protos.arrays import ScoreArrays
from teacher_service.__main__ import run_service
from teacher_service.config import ServiceSettings, load_settings
from teacher_service.engine.transformers import TransformersEngine
from teacher_service.types import ScoreJob


class SlowEngine(TransformersEngine):
    """The transformers engine, and a wait of `latency_s` seconds after each sequence, however many wait at once."""

    latency_s = 0.0

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """Score, then wait."""
        scores = await super().score(job)
        await asyncio.sleep(self.latency_s)
        return scores


def main(model: Path, port_file: Path, latency_s: float, max_model_len: int) -> None:
    """Serve until told to stop."""
    # a second thread would wait for a core that the trainer uses: that is no teacher on a machine of its own
    torch.set_num_threads(1)

    def build(settings: ServiceSettings) -> SlowEngine:
        engine = SlowEngine(
            model=f"{model}",
            dtype=settings.dtype,
            device=settings.device,
            max_model_len=max_model_len,
            max_num_logprobs=settings.max_num_logprobs,
        )
        engine.latency_s = latency_s
        return engine

    flags = {"engine": "transformers", "model": f"{model}", "grpc_port": 0, "http_port": 0, "port_file": port_file}
    run_service(load_settings(flags), build)


if __name__ == "__main__":
    typer.run(main)
