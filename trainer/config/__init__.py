"""The trainer's configuration: `ppo_trainer.yaml` for Hydra, `GKDConfig` for the code."""

from trainer.config.gkd import GKDConfig, Mode, TeacherConfig

__all__ = ["GKDConfig", "Mode", "TeacherConfig"]
