"""From a composed configuration to a running verl trainer."""

from __future__ import annotations

import uuid
from collections.abc import Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from trainer.config import Mode
from trainer.config.gkd import ActorConfig
from trainer.verl_adapter.preflight import CheckedRun
from trainer.verl_adapter.ray_start import own_ray_folder, start_ray_again
from trainer.verl_adapter.stop_flag import FLAG_KEY, StopOnSigterm
from trainer.verl_adapter.task_runner import GKDTaskRunner

AGENT_LOOP_MANAGER = "trainer.verl_adapter.agent_loop.GKDAgentLoopManager"
REWARD_MODULE, REWARD_FUNCTION = "pkg://trainer.verl_adapter.reward", "compute_score"
DATASET_MODULE, DATASET_CLASS = "pkg://trainer.verl_adapter.dataset", "GKDDataset"


def launch(config: DictConfig, run: CheckedRun, user_keys: Set[str]) -> None:
    """Hand verl a configuration it knows, and train.

    Args:
        config: the composed configuration; changed in place.
        run: what `preflight` returned.
        user_keys: dotted keys that the command line names.

    Raises:
        GKDError: training failed for a reason that this project names.
    """
    hand_over(config, run)
    with own_ray_folder(config, user_keys):
        auto_set_device(config)
        validate_config(config, need_reference_policy(config), need_critic(config))
        flag = f"gkd-stop-{uuid.uuid4().hex}"
        OmegaConf.update(config, FLAG_KEY, flag, force_add=True)
        with ExitStack() as running:
            running.callback(ray.shutdown)
            runner = _StoppableRunner(GKDTaskRunner, flag, running)
            start_ray_again(lambda: run_ppo(config, task_runner_class=runner))


@dataclass(frozen=True)
class _StoppableRunner:
    """Stands in for an actor class: verl makes its actor when Ray is there, which is when SIGTERM can be taken."""

    actor_class: Any
    flag: str
    running: ExitStack

    def options(self, **options: Any) -> _StoppableRunner:
        return replace(self, actor_class=self.actor_class.options(**options))

    def remote(self) -> Any:
        self.running.enter_context(StopOnSigterm(self.flag))
        return self.actor_class.remote()


def hand_over(config: DictConfig, run: CheckedRun) -> None:
    """Take our keys out of the sections that verl instantiates, and name our classes where verl looks for its own."""
    gkd = run.gkd
    with open_dict(config):
        for name in ActorConfig.model_fields:
            config.actor_rollout_ref.actor.pop(name, None)
        config.actor_rollout_ref.pop("teacher", None)
        if config.data.custom_cls.path is None:
            config.data.custom_cls = {"path": DATASET_MODULE, "name": DATASET_CLASS}
        if config.reward.custom_reward_function.path is None:
            config.reward.custom_reward_function.path = REWARD_MODULE
            config.reward.custom_reward_function.name = REWARD_FUNCTION
        if gkd.mode is Mode.GRPO:
            return
        config.gkd = gkd.model_dump(mode="json")
        config.gkd_run_id = uuid.uuid4().hex
        config.gkd_manifest_digests = dict(run.manifest_digests)
        config.gkd_student_vocab_rows = run.student_vocab_rows
        agent = config.actor_rollout_ref.rollout.agent
        agent.agent_loop_manager_class = agent.get("agent_loop_manager_class") or AGENT_LOOP_MANAGER
        config.actor_rollout_ref.rollout.calculate_log_probs = True
        if gkd.mode is Mode.GKD:
            config.critic.enable = False
            if not _validates(config):
                config.reward.num_workers = 0  # nothing would ask them


def _validates(config: DictConfig) -> bool:
    return bool(config.trainer.val_before_train or config.trainer.test_freq > 0)
