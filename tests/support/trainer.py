"""The trainer as a process, on models and data small enough for a test."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_LOGPROBS = 8
BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class TrainerRun:
    """What a run is made of."""

    train_file: Path
    student: Path
    endpoint: str
    folder: Path
    """Checkpoints and metrics go here."""
    num_steps: int = 4

    @property
    def metrics_path(self) -> Path:
        """Where verl's file logger writes, one JSON object per step."""
        return self.folder / "metrics.jsonl"

    def environment(self) -> dict[str, str]:
        """What the file logger wants to be told by."""
        return {"VERL_FILE_LOGGER_PATH": str(self.metrics_path)}

    def command(self, changes: Mapping[str, object] | None = None) -> list[str]:
        """The trainer's command line; `changes` win."""
        host, _, port = self.endpoint.rpartition(":")
        overrides: dict[str, object] = {
            "trainer.device": "cpu",
            "data.train_files": self.train_file,
            "data.train_batch_size": BATCH_SIZE,
            "data.max_prompt_length": 24,
            "data.max_response_length": 8,
            "actor_rollout_ref.model.path": self.student,
            "actor_rollout_ref.actor.use_teacher_kl_loss": "true",
            "actor_rollout_ref.actor.gkd_only_mode": "true",
            "actor_rollout_ref.actor.ppo_mini_batch_size": BATCH_SIZE,
            # two micro-batches: accumulation is part of what is tested
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": BATCH_SIZE // 2,
            "actor_rollout_ref.actor.optim.lr": 1e-3,
            "actor_rollout_ref.actor.checkpoint.save_contents": "[hf_model]",
            "actor_rollout_ref.rollout.name": "vllm",
            "actor_rollout_ref.rollout.n": 1,
            "actor_rollout_ref.rollout.max_model_len": 64,
            "actor_rollout_ref.rollout.max_num_seqs": BATCH_SIZE,
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": BATCH_SIZE,
            "actor_rollout_ref.teacher.server_ip": host,
            "actor_rollout_ref.teacher.server_port": port,
            "actor_rollout_ref.teacher.num_logprobs": NUM_LOGPROBS,
            "trainer.total_training_steps": self.num_steps,
            "trainer.save_freq": self.num_steps,
            "trainer.resume_mode": "disable",
            "trainer.default_local_dir": self.folder / "checkpoints",
            "trainer.logger": "[console,file]",
        } | dict(changes or {})
        arguments = [f"{key}={value}" for key, value in overrides.items() if value is not None]
        return [sys.executable, "-m", "trainer.main_ppo", *arguments]

    def steps(self) -> list[dict[str, Any]]:
        """The metrics of each step so far."""
        if not self.metrics_path.is_file():
            return []
        lines = self.metrics_path.read_text().splitlines()
        return [json.loads(line)["data"] for line in lines if line.endswith("}")]
