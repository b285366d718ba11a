"""The trainer's configuration: `ppo_trainer.yaml` for Hydra, `GKDConfig` for the code."""

from trainer.config.conflicts import check_conflicts
from trainer.config.gkd import REWARD_STRATEGIES, GKDConfig, Mode, SelectStrategy, TeacherConfig

__all__ = ["REWARD_STRATEGIES", "GKDConfig", "Mode", "SelectStrategy", "TeacherConfig", "check_conflicts"]
