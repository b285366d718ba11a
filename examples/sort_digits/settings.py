"""Everything that the demo asks of the two services: commands, environment, training settings. One place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer import metrics

TEACHER_KL = metrics.TEACHER_KL_LOSS
"""Metric: divergence from the teacher in nats per token."""
SCORED_TOKENS = metrics.SCORED_TOKENS
"""Metric: response tokens that the teacher scored for the step."""
STEP_SECONDS = "timing_s/step"
"""Metric: seconds that the step took."""
METRICS_PATH_VARIABLE = "VERL_FILE_LOGGER_PATH"
"""Where verl's `file` logger writes its lines."""

PROMPT_TOKENS = 24
"""Bound on the prompt; a question of five digits has 14 tokens."""
RESPONSE_TOKENS = 8
"""Bound on the response; a right one has six tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """How the student is trained."""

    steps: int = 32
    """Rounds of generation, scoring and update."""
    batch_size: int = 64
    """Questions per step, one response each."""
    mini_batch_size: int = 32
    """Responses per optimizer step."""
    epochs: int = 4
    """Times that each response is learned from: on a CPU, to generate and score one costs far more than to learn."""
    learning_rate: float = 2e-3
    """Peak; reached in `warmup_steps`, then falls along a cosine to a tenth at the last step."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises."""
    num_logprobs: int = 8
    """Top-k entries per position that the teacher sends."""
    seed: int = 0
    """Of the order of questions and of sampling."""
    metrics_address: str | None = None
    """`host:port` at which the trainer offers its metrics; None: nowhere."""


def teacher_command(model: Path, port_file: Path) -> list[str]:
    """Serve `model` on free ports, which the service writes to `port_file`."""
    return [
        sys.executable, "-m", "teacher_service", "serve",
        "--model", f"{model}",
        "--engine", "vllm",
        "--grpc-port", "0",
        "--http-port", "0",
        "--port-file", f"{port_file}",
        # What the task needs and no more: room for keys and values is claimed at start.
        "--max-model-len", "64",
        "--kv-cache-bytes", f"{64 * 2**20}",
        "--log-format", "json",
    ]  # fmt: skip


def trainer_command(
    settings: Distillation,
    *,
    student: Path,
    train_file: Path,
    validation_file: Path,
    endpoint: str,
    checkpoints: Path,
    hydra_dir: Path,
) -> list[str]:
    """Distil `student` from the teacher at `endpoint`, leaving the result below `checkpoints`.

    The endpoint is `host:port`; a name that resolves to several replicas is good for all of them.

    All paths absolute: Ray's workers have working directories of their own.
    """
    overrides: Mapping[str, object] = {
        "data.train_files": train_file,
        "data.val_files": validation_file,
        "data.train_batch_size": settings.batch_size,
        "data.max_prompt_length": PROMPT_TOKENS,
        "data.max_response_length": RESPONSE_TOKENS,
        "data.seed": settings.seed,
        "actor_rollout_ref.model.path": student,
        "actor_rollout_ref.actor.use_teacher_kl_loss": "true",
        "actor_rollout_ref.actor.gkd_only_mode": "true",
        "actor_rollout_ref.actor.ppo_mini_batch_size": settings.mini_batch_size,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": settings.mini_batch_size,
        "actor_rollout_ref.actor.ppo_epochs": settings.epochs,
        "actor_rollout_ref.actor.optim.lr": settings.learning_rate,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": settings.warmup_steps,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.min_lr_ratio": 0.1,
        "actor_rollout_ref.actor.optim.betas": "[0.9,0.99]",
        "actor_rollout_ref.actor.checkpoint.save_contents": "[hf_model]",
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": 1,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.rollout.max_model_len": PROMPT_TOKENS + RESPONSE_TOKENS,
        "actor_rollout_ref.rollout.max_num_seqs": settings.batch_size,
        # quoted as paths are: Hydra would take an IPv6 address for a list
        "actor_rollout_ref.teacher.endpoints": f"'{endpoint}'",
        "actor_rollout_ref.teacher.num_logprobs": settings.num_logprobs,
        "trainer.device": "cpu",
        "trainer.total_training_steps": settings.steps,
        "trainer.save_freq": settings.steps,
        "trainer.test_freq": -1,
        "trainer.val_before_train": "false",
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": checkpoints,
        "trainer.logger": "[console,file]",
        "hydra.run.dir": hydra_dir,
    }
    if settings.metrics_address is not None:
        overrides = {**overrides, "trainer.metrics_address": f"'{settings.metrics_address}'"}
    return [sys.executable, "-m", "trainer.main_ppo", *(f"{key}={_quoted(value)}" for key, value in overrides.items())]


def _quoted(value: object) -> str:
    """Paths are quoted for Hydra, whose grammar gives meaning to many characters that a folder's name may have."""
    if not isinstance(value, Path):
        return f"{value}"
    escaped = f"{value}".replace("'", "\\'")
    return f"'{escaped}'"


def trained_student(checkpoints: Path, settings: Distillation) -> Path:
    """Where the trainer leaves the Hugging Face checkpoint of the last step."""
    return checkpoints / f"global_step_{settings.steps}" / "actor" / "huggingface"
