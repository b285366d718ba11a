"""The five documented commands, from `examples/modes/`, on the real stack: metrics, counts and batches by hand."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from examples.sort_digits.models import TEACHER_SIZE, build_model, save_model
from examples.sort_digits.processes import ManagedProcess
from tests.e2e.conftest import Workspace
from tests.support.trainer import TrainerRun
from trainer.verl_adapter.cpu.environment import CONFIG_DEFAULTS, ENVIRONMENT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[2]
BATCH_SIZE = 8
ANSWER_TOKENS = 6
"""Five digits and the end of turn."""
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
REWARD = {
    "reward.custom_reward_function.path": ROOT / "tests" / "support" / "rewards.py",
    "reward.custom_reward_function.name": "compute_score",
}
SGD = {
    f"{ACTOR}.optim.optimizer": "SGD",
    f"{ACTOR}.optim.lr": 0.1,
    f"{ACTOR}.optim.weight_decay": 0.0,
    f"++{ACTOR}.optim.betas": "null",
}
IDENTITY_FLOOR = 1e-5
"""Nats per token between a float32 student and itself as teacher: what two implementations of one model may differ."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """A trainer under way."""

    process: ManagedProcess
    run: TrainerRun

    @property
    def dumps(self) -> Path:
        """Where verl writes the responses of each step."""
        return self.run.folder / "dumps"

    def responses(self, step: int) -> list[dict[str, Any]]:
        """The responses of a step, those of a prompt together and in order."""
        return [json.loads(line) for line in (self.dumps / f"{step}.jsonl").read_text().splitlines()]


def _overrides(run: TrainerRun, changes: Mapping[str, object]) -> list[str]:
    chosen: dict[str, object] = {
        "data.train_batch_size": BATCH_SIZE,
        "data.seed": 1,
        f"{ACTOR}.ppo_mini_batch_size": BATCH_SIZE // 2,
        f"{ROLLOUT}.max_num_seqs": 32,
        "trainer.total_training_steps": run.num_steps,
        "trainer.save_freq": -1,
        "trainer.default_local_dir": run.folder / "checkpoints",
        "trainer.rollout_data_dir": run.folder / "dumps",
        "trainer.logger": "[console,file]",
        **changes,
    }
    return [f"{key}={value}" for key, value in chosen.items()]


def _start(
    workspace: Workspace,
    script: str,
    endpoint: str,
    changes: Mapping[str, object],
    *,
    name: str | None = None,
    num_steps: int,
    environment: Mapping[str, str] | None = None,
) -> Started:
    """One of the example scripts, made small."""
    run = workspace.run(name or script, endpoint, num_steps=num_steps)
    host, _, port = endpoint.rpartition(":")
    command = ["bash", f"{ROOT / 'examples' / 'modes' / script}.sh", *_overrides(run, changes)]
    environment = {
        **run.environment(),
        "MODELS": f"{workspace.folder}",
        "TEACHER_HOST": host,
        "TEACHER_PORT": port,
        "PYTHONPATH": f"{ROOT}",
        **(environment or {}),
    }
    return Started(process=workspace.start(name or script, command, environment), run=run)


def _finish(workspace: Workspace, *started: Started) -> list[list[dict[str, Any]]]:
    """The metrics of each run's steps, once all have ended well."""
    codes = workspace.wait(*(one.process for one in started))
    for one, code in zip(started, codes, strict=True):
        assert code == 0, one.process.last_words()
    return [one.run.steps() for one in started]


def _check_rollouts_follow_the_weights(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if step.get("data/is_on_policy", 1.0):
            assert step["training/rollout_actor_probs_pearson_corr"] > 0.99


def _agent_loops(folder: Path) -> dict[str, object]:
    path = folder / "agent_loops.yaml"
    path.write_text(
        "- name: replay\n  _target_: tests.support.replay.ReplayAgentLoop\n"
        "- name: replay_turns\n  _target_: tests.support.replay.ReplayTurnsAgentLoop\n"
    )
    return {f"{ROLLOUT}.agent.agent_loop_config_path": path, f"{ROLLOUT}.agent.default_agent_loop": "replay"}


def test_pure_grpo_changes_nothing_and_needs_no_teacher(workspace: Workspace) -> None:
    """Example 1 runs without a teacher; on replayed responses its scores and losses are those of plain verl."""
    nobody = "127.0.0.1:1"
    real = _start(workspace, "1_grpo", nobody, {**REWARD, f"{ROLLOUT}.calculate_log_probs": "true"}, num_steps=3)
    [real_steps] = _finish(workspace, real)

    rows = pd.read_parquet(workspace.train_file)
    verl_shaped = workspace.folder / "verl.parquet"
    pd.DataFrame(
        {
            "prompt": [[{"role": "user", "content": question}] for question in rows["question"]],
            "data_source": "sort",
            "reward_model": [{"style": "rule", "ground_truth": answer} for answer in rows["answer"]],
            "extra_info": [{"index": index} for index in range(len(rows))],
        }
    ).to_parquet(verl_shaped)
    # one mini-batch, in float32: verl deals responses out in the order in which they arrive, another in each run; and
    # Adam would make steps of the rounding errors
    one_order = {f"{ACTOR}.ppo_mini_batch_size": BATCH_SIZE, f"{ACTOR}.fsdp_config.dtype": "float32", **SGD}
    replay = {**REWARD, **_agent_loops(workspace.folder), **one_order, "data.train_files": verl_shaped}
    ours = _start(workspace, "1_grpo", nobody, replay, name="grpo_replayed", num_steps=3)
    [our_steps] = _finish(workspace, ours)

    plain_run = workspace.run("plain_verl", nobody, num_steps=3)
    ray_folder = workspace.supervisor.temp_dir / "ray"
    same = {
        **replay,
        "trainer.device": "cpu",
        "data.val_files": verl_shaped,
        "data.max_prompt_length": 24,
        "data.max_response_length": 8,
        f"{ROLLOUT}.n": 4,
        f"{ROLLOUT}.max_model_len": 32,
        f"{ACTOR}.use_dynamic_bsz": "true",
        "algorithm.adv_estimator": "grpo",
        "actor_rollout_ref.model.path": workspace.folder / "student_start",
        f"{ROLLOUT}.name": "vllm",
        "trainer.val_before_train": "false",
        "trainer.test_freq": -1,
        "trainer.resume_mode": "disable",
    }
    machine = {**CONFIG_DEFAULTS, "ray_kwargs.ray_init.num_gpus": 1, "ray_kwargs.ray_init.address": "local"}
    machine["ray_kwargs.ray_init._temp_dir"] = ray_folder
    overrides = _overrides(plain_run, same)
    given = {one.partition("=")[0] for one in overrides}
    overrides += [f"++{key}={value}" for key, value in machine.items() if key not in given]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    plain = Started(
        process=workspace.start(
            "plain_verl", command, {**plain_run.environment(), **ENVIRONMENT, "PYTHONPATH": f"{ROOT}"}
        ),
        run=plain_run,
    )
    [plain_steps] = _finish(workspace, plain)

    assert [len(steps) for steps in (real_steps, our_steps, plain_steps)] == [3, 3, 3]
    _check_rollouts_follow_the_weights(real_steps)
    for step in real_steps:
        assert not [name for name in step if name.startswith(("gkd/", "data/")) or "teacher" in name]
    for mine, verls in zip(our_steps, plain_steps, strict=True):
        for name in ("critic/score/mean", "critic/score/max", "critic/score/min", "actor/pg_loss"):
            assert mine[name] == pytest.approx(verls[name], rel=1e-4, abs=1e-6), name
        # a norm in bfloat16 arithmetic, whose packing follows the order of arrival
        assert mine["actor/grad_norm"] == pytest.approx(verls["actor/grad_norm"], rel=1e-2)
    assert len({step["critic/score/mean"] for step in our_steps}) > 1
    assert all(step["actor/grad_norm"] > 0 for step in our_steps)


def test_off_policy_mixing_and_its_resume(workspace: Workspace) -> None:
    """Example 3 with LoRA and JSD: split, order and counts by hand; resumed at step 3, the same batches follow."""
    teacher, endpoint, _ = workspace.start_teacher("teacher_off_policy")
    changes = {
        "data.off_policy_files": workspace.train_file,
        "trainer.save_freq": 3,
        "data.off_policy_batch_size": 6,
        f"{ACTOR}.gkd_divergence": "jsd",
        "actor_rollout_ref.model.lora_rank": 8,
        "actor_rollout_ref.model.lora_alpha": 16,
        f"{ROLLOUT}.load_format": "safetensors",
    }
    whole = _start(workspace, "3_gkd_off_policy", endpoint, changes, num_steps=6)
    [steps] = _finish(workspace, whole)
    checkpoint = whole.run.folder / "checkpoints" / "global_step_3"
    resumed = _start(
        workspace,
        "3_gkd_off_policy",
        endpoint,
        {
            **changes,
            "trainer.save_freq": -1,
            "trainer.resume_mode": "resume_path",
            "trainer.resume_from_path": checkpoint,
        },
        name="off_policy_resumed",
        num_steps=6,
    )
    [rest] = _finish(workspace, resumed)

    # on-policy where ceil(t r) > ceil((t-1) r), r = (.7/8) / (.7/8 + .3/6) = .6364
    kinds = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert [step["data/is_on_policy"] for step in steps] == kinds
    assert [step["data/is_on_policy"] for step in rest] == kinds[3:]
    _check_rollouts_follow_the_weights([*steps, *rest])
    asked: dict[float, set[str]] = {1.0: set(), 0.0: set()}
    for number, (step, kind) in enumerate(zip(steps, kinds, strict=True), start=1):
        responses = [one for one in whole.responses(number) if one["gkd_scored_tokens"]]
        asked[kind] |= {one["input"] for one in responses}
        assert step["gkd/select_ratio"] == 1.0
        assert step["gkd/scored_tokens"] == sum(one["gkd_scored_tokens"] for one in responses)
        assert step["actor/loss"] == pytest.approx(step["actor/teacher_kl_loss"], rel=1e-5)
        if kind:
            assert len(responses) == BATCH_SIZE
        else:
            assert step["gkd/scored_tokens"] == 6 * ANSWER_TOKENS
            assert all(one["output"] == one["gts"] for one in responses)
    assert asked[1.0]
    assert asked[0.0]
    assert not asked[1.0] & asked[0.0]

    for number in (4, 5, 6):
        before, after = whole.responses(number), resumed.responses(number)
        assert sorted(one["input"] for one in before) == sorted(one["input"] for one in after)
    assert workspace.supervisor.stop(teacher) == 0


def test_teaching_by_advantages(workspace: Workspace) -> None:
    """Example 2 by policy gradient: verl's own loss on the teacher's advantages, which is the samples' reverse KL."""
    sure = build_model(TEACHER_SIZE, seed=0)
    sure.model.norm.weight.data.mul_(6.0)
    save_model(sure, workspace.folder / "sure_teacher")
    teacher, endpoint, _ = workspace.start_teacher("teacher_advantages", model="sure_teacher")
    changes = {f"{ACTOR}.gkd_divergence": "policy_gradient", f"{ROLLOUT}.n": 4}
    started = _start(workspace, "2_gkd_only", endpoint, changes, name="advantages", num_steps=3)
    [steps] = _finish(workspace, started)
    assert len(steps) == 3
    _check_rollouts_follow_the_weights(steps)
    for number, step in enumerate(steps, start=1):
        responses = started.responses(number)
        assert len(responses) == 4 * BATCH_SIZE
        assert step["gkd/scored_tokens"] == sum(one["gkd_scored_tokens"] for one in responses)
        assert step["actor/loss"] == pytest.approx(step["actor/pg_loss"], rel=1e-5, abs=1e-7)
        assert step["actor/teacher_kl_coef"] == 1.0
        assert step["actor/grad_norm"] > 0
        # with a ratio near 1 the policy loss is minus the mean advantage
        assert step["actor/teacher_kl_loss"] > 0.1
        assert step["actor/pg_loss"] == pytest.approx(step["actor/teacher_kl_loss"], rel=0.1)
    assert workspace.supervisor.stop(teacher) == 0


def test_gkd_with_grpo_over_all_responses(workspace: Workspace, tmp_path: Path) -> None:
    """Example 4 on two FSDP2 ranks, with accumulation, mini-batches, reference KL, validation, and every logger."""
    teacher, endpoint, _ = workspace.start_teacher("teacher_all")
    changes = {
        **REWARD,
        "trainer.n_gpus_per_node": 2,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4,
        f"{ACTOR}.use_kl_loss": "true",
        f"{ACTOR}.kl_loss_coef": 0.01,
        "data.val_files": workspace.folder / "data" / "validation.parquet",
        "trainer.test_freq": 3,
        "trainer.val_before_train": "false",
        "trainer.logger": "[console,file,tensorboard,wandb]",
    }
    loggers = {"TENSORBOARD_DIR": f"{tmp_path / 'tensorboard'}", "WANDB_MODE": "offline", "WANDB_DIR": f"{tmp_path}"}
    started = _start(workspace, "4_gkd_grpo", endpoint, changes, num_steps=3, environment=loggers)
    [steps] = _finish(workspace, started)
    assert len(steps) == 3
    _check_rollouts_follow_the_weights(steps)
    for number, step in enumerate(steps, start=1):
        responses = started.responses(number)
        assert len(responses) == 4 * BATCH_SIZE
        assert all(one["gkd_scored_tokens"] > 0 for one in responses)
        assert step["gkd/scored_tokens"] == sum(one["gkd_scored_tokens"] for one in responses)
        assert step["gkd/scored_tokens"] == pytest.approx(step["response_length/mean"] * 4 * BATCH_SIZE)
        assert step["gkd/select_ratio"] == 1.0
        assert step["gkd/select_strategy"] == 0.0
        assert step["data/is_on_policy"] == 1.0
        assert step["actor/teacher_kl_coef"] == 0.5
        parts = step["actor/pg_loss"] + 0.01 * step["actor/kl_loss"] + 0.5 * step["actor/teacher_kl_loss"]
        assert step["actor/loss"] == pytest.approx(parts, rel=1e-4, abs=1e-6)
        assert step["timing/teacher_knowledge"] >= 0
        assert 0 <= step["gkd/top1_agreement"] <= 1
        assert 0 < step["gkd/teacher_entropy"] <= math.log(32)
        assert 0 < step["gkd/student_entropy"] <= math.log(32)
    assert any(step["actor/pg_loss"] != 0 for step in steps)
    assert [name for name in steps[-1] if name.startswith("val-core/")]

    events = EventAccumulator(f"{tmp_path / 'tensorboard'}")
    events.Reload()
    documented = {
        "actor/teacher_kl_loss", "actor/teacher_kl_coef", "gkd/select_ratio", "gkd/select_strategy",
        "data/is_on_policy", "timing/teacher_knowledge",
    }  # fmt: skip
    assert documented <= set(events.Tags()["scalars"])
    for name in documented:
        assert [one.value for one in events.Scalars(name)] == pytest.approx([step[name] for step in steps])
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert workspace.supervisor.stop(teacher) == 0


def test_best_responses_are_selected_from_verls_own_entry_point(workspace: Workspace) -> None:
    """Example 5, by `python3 -m verl.trainer.main_ppo`: the two best of four by reward, ties to the first."""
    teacher, endpoint, _ = workspace.start_teacher("teacher_best")
    environment = {"MODULE": "verl.trainer.main_ppo"}
    whole = _start(workspace, "5_gkd_grpo_best", endpoint, REWARD, num_steps=4, environment=environment)
    [steps] = _finish(workspace, whole)

    assert len(steps) == 4
    _check_rollouts_follow_the_weights(steps)
    for number, step in enumerate(steps, start=1):
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for one in whole.responses(number):
            groups[one["uid"].split("_")[0]].append(one)
        assert len(groups) == BATCH_SIZE
        for group in groups.values():
            ranked = sorted(range(4), key=lambda i: (-group[i]["score"], i))
            assert [i for i in range(4) if group[i]["gkd_scored_tokens"]] == sorted(ranked[:2])
        assert step["gkd/select_ratio"] == 0.5
        assert step["gkd/select_strategy"] == 2.0
        assert step["gkd/scored_tokens"] == sum(one["gkd_scored_tokens"] for one in whole.responses(number))
        parts = step["actor/pg_loss"] + 0.5 * step["actor/teacher_kl_loss"]
        assert step["actor/loss"] == pytest.approx(parts, rel=1e-4, abs=1e-6)
    assert workspace.supervisor.stop(teacher) == 0


def test_student_that_is_its_own_teacher_stays_where_it_is(workspace: Workspace) -> None:
    """Identity, at another temperature on both sides, over several turns, for one random response of two.

    The divergence lies below IDENTITY_FLOOR and the weights do not change. A temperature on one side only, a shift by
    one token or a learned tool token would each be far above it.
    """
    teacher, endpoint, _ = workspace.start_teacher(
        "itself", "--dtype", "float32", model="student_start", engine="transformers"
    )
    changes = {
        **_agent_loops(workspace.folder),
        f"{ROLLOUT}.agent.default_agent_loop": "replay_turns",
        f"{ROLLOUT}.n": 2,
        f"{ACTOR}.gkd_select_strategy": "random",
        f"{ACTOR}.teacher_kl_temperature": 2.0,
        "actor_rollout_ref.teacher.num_logprobs": 16,
        f"{ACTOR}.fsdp_config.dtype": "float32",
        f"{ACTOR}.fsdp_config.model_dtype": "fp32",
        **SGD,
        f"{ACTOR}.checkpoint.save_contents": "[hf_model]",
        "trainer.save_freq": 3,
    }
    started = _start(workspace, "2_gkd_only", endpoint, changes, num_steps=3)
    [steps] = _finish(workspace, started)
    assert len(steps) == 3
    for number, step in enumerate(steps, start=1):
        responses = started.responses(number)
        by_prompt = [
            [one["gkd_scored_tokens"] > 0 for one in responses[i : i + 2]] for i in range(0, 2 * BATCH_SIZE, 2)
        ]
        assert all(sorted(one) == [False, True] for one in by_prompt)
        assert step["gkd/select_ratio"] == 0.5
        assert step["gkd/select_strategy"] == 1.0
        assert abs(step["actor/teacher_kl_loss"]) < IDENTITY_FLOOR
        assert step["gkd/top1_agreement"] == pytest.approx(1.0)
    before = AutoModelForCausalLM.from_pretrained(workspace.folder / "student_start", dtype=torch.float32)
    saved = started.run.folder / "checkpoints" / "global_step_3" / "actor" / "huggingface"
    after = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    moved = [float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert max(moved) < IDENTITY_FLOOR
    assert workspace.supervisor.stop(teacher) == 0
