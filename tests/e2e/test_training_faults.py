"""What breaks while verl trains: the run ends in order or goes on, nothing is lost, and the message says why."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from examples.sort_digits.processes import ManagedProcess
from tests.e2e.conftest import TRAINER_TIMEOUT_S, Workspace
from tests.support.trainer import BATCH_SIZE, TrainerRun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
TEACHER, ROLLOUT, ACTOR = "actor_rollout_ref.teacher", "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
NUM_STEPS = 16
MAX_WAIT_S = 6.0
ATTEMPT_S = 20.0
"""With `on_failure=fail`: long enough for a healthy teacher on a machine whose cores all these processes share."""
DEGRADED_STEPS = 6
DISK_BYTES = "1500k"
"""Room for one checkpoint of the student, and not for two."""
REWARD = {
    "reward.custom_reward_function.path": Path(__file__).parents[1] / "support" / "rewards.py",
    "reward.custom_reward_function.name": "compute_score",
}


def _replayed(folder: Path) -> dict[str, object]:
    """Responses that depend on the question alone, in float32: what differs between two runs is what was broken."""
    loops = folder / "loops.yaml"
    loops.write_text("- name: replay\n  _target_: tests.support.replay.ReplayAgentLoop\n")
    return {
        f"{ROLLOUT}.agent.agent_loop_config_path": loops,
        f"{ROLLOUT}.agent.default_agent_loop": "replay",
        f"{ACTOR}.fsdp_config.dtype": "float32",
        # also on a processor whose instructions for bfloat16 would be used
        f"++{ACTOR}.fsdp_config.mixed_precision": "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
        f"{ACTOR}.optim.optimizer": "SGD",
        f"{ACTOR}.optim.lr": 0.1,
        f"{ACTOR}.optim.weight_decay": 0.0,
        f"++{ACTOR}.optim.betas": "null",
        "data.seed": 1,
    }


RESUMABLE: Mapping[str, object] = {
    f"{ACTOR}.checkpoint.save_contents": "[model,optimizer,extra]",
    "trainer.save_freq": 3,
    "trainer.resume_mode": "auto",
}


def _until(workspace: Workspace, process: ManagedProcess, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TRAINER_TIMEOUT_S
    while not condition():
        assert process.exit_code() is None, process.last_words()
        assert time.monotonic() < deadline, process.last_words()
        workspace.supervisor.pause(0.05)


def _kill(process: ManagedProcess) -> None:
    """SIGKILL to a service and to its engine."""
    service = psutil.Process(process.popen.pid)
    for one in [*service.children(recursive=True), service]:
        if "resource_tracker" not in " ".join(one.cmdline()):  # it frees what the others leave behind
            one.send_signal(signal.SIGKILL)
    process.popen.wait()


def _log(process: ManagedProcess) -> str:
    return process.log_path.read_text(errors="replace")


def _losses(steps: list[dict[str, Any]]) -> dict[int, float]:
    """By step; of a step that was run twice, the last."""
    return {int(step["training/global_step"]): step["actor/teacher_kl_loss"] for step in steps}


def _kill_with_children(process: ManagedProcess) -> None:
    """As the end of a container would."""
    driver = psutil.Process(process.popen.pid)
    for one in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.popen.wait()


def test_a_run_survives_its_teachers_death_a_sigterm_and_its_own_death(workspace: Workspace) -> None:
    """Its loss curve is that of a run that nobody disturbed, step by step.

    The teacher is killed in mid-step and restarted; the trainer is told to stop, resumed, killed, and resumed. The run
    beside it, with `on_failure=fail`, loses its teacher after the last step that counts: it ends within the time of one
    attempt, with a checkpoint that it would not have written otherwise.
    """
    teacher, endpoint, _ = workspace.start_teacher("steady", engine="transformers")
    calm = workspace.run("calm", endpoint, num_steps=10_000)
    replayed = _replayed(workspace.folder)
    strict = {"trainer.save_freq": -1, f"{TEACHER}.on_failure": "fail", f"{TEACHER}.timeout_s": ATTEMPT_S}
    undisturbed = workspace.start("calm_trainer", calm.command({**replayed, **RESUMABLE, **strict}), calm.environment())

    mortal, mortal_endpoint, _ = workspace.start_teacher("mortal_teacher", engine="transformers")
    runs = [workspace.run(f"disturbed_{number}", mortal_endpoint, num_steps=NUM_STEPS) for number in (1, 2, 3)]
    changes = {**replayed, **RESUMABLE, "trainer.default_local_dir": workspace.folder / "disturbed"}

    def start(run: TrainerRun) -> ManagedProcess:
        return workspace.start(f"{run.folder.name}_trainer", run.command(changes), run.environment())

    first = start(runs[0])
    _until(workspace, first, lambda: len(runs[0].steps()) >= 1)
    _kill(mortal)
    at_death = len(runs[0].steps())
    workspace.supervisor.pause(2)
    assert first.exit_code() is None, first.last_words()
    mortal, back_at, _ = workspace.start_teacher(
        "mortal_again", "--grpc-port", mortal_endpoint.rpartition(":")[2], engine="transformers"
    )
    assert back_at == mortal_endpoint
    _until(workspace, first, lambda: len(runs[0].steps()) > at_death + 1)
    first.popen.send_signal(signal.SIGTERM)
    assert workspace.wait(first, timeout_s=120) == [0], first.last_words()
    stopped_at = len(runs[0].steps())
    assert stopped_at < NUM_STEPS - 1, "it went on for too long"
    assert f"stopped as requested; the checkpoint of step {stopped_at} is in " in _log(first)

    _until(workspace, undisturbed, lambda: len(calm.steps()) >= NUM_STEPS)
    _kill(teacher)
    _check_it_failed_at_once(workspace, undisturbed, calm)

    second = start(runs[1])
    _until(workspace, second, lambda: len(runs[1].steps()) >= 1)
    _kill_with_children(second)
    third = start(runs[2])
    assert workspace.wait(third) == [0], third.last_words()

    expected = {step: loss for step, loss in _losses(calm.steps()).items() if step <= NUM_STEPS}
    assert sorted(expected) == list(range(1, NUM_STEPS + 1))
    found: dict[int, float] = {}
    for run in runs:
        losses = _losses(run.steps())
        assert min(losses) <= len(found) + 1, "a step was left out"
        for step, loss in losses.items():  # also those that were run twice
            assert loss == pytest.approx(expected[step], rel=1e-4), (run.folder.name, step)
        found |= losses
    assert sorted(found) == sorted(expected)
    assert min(_losses(runs[1].steps())) == stopped_at + 1, "the stop lost or repeated a step"
    assert workspace.supervisor.stop(mortal) == 0


def _check_it_failed_at_once(workspace: Workspace, process: ManagedProcess, run: TrainerRun) -> None:
    killed_s = time.monotonic()
    assert workspace.wait(process, timeout_s=120) == [1], process.last_words()
    assert time.monotonic() - killed_s < ATTEMPT_S + 60
    last = len(run.steps())
    assert "could not be scored by the teacher (actor_rollout_ref.teacher.on_failure=fail)" in _log(process)
    assert (run.folder / "checkpoints" / f"global_step_{last}" / "data.pt").is_file()


def test_a_lost_teacher_is_masked_or_ends_the_run_within_its_bound(workspace: Workspace) -> None:
    """Two asynchronous modes, and a teacher killed in each.

    colocate_async, `wait`: the run ends after max_wait_s with its reason and a checkpoint. separate_async, `degrade`, a
    teacher per data source: one dies, GRPO goes on, the other teacher's half is still distilled, and the share is told.
    """
    lone, lone_endpoint, _ = workspace.start_teacher("lone", engine="transformers")
    waiting = workspace.run("waiting", lone_endpoint, num_steps=10_000)
    waits = workspace.start(
        "waiting_trainer",
        waiting.command(
            {
                **RESUMABLE,
                "trainer.v1.trainer_mode": "colocate_async",
                "trainer.save_freq": -1,
                f"{TEACHER}.max_wait_s": MAX_WAIT_S,
            }
        ),
        waiting.environment(),
    )
    kept, kept_endpoint, _ = workspace.start_teacher("kept", engine="transformers")
    dying, dying_endpoint, _ = workspace.start_teacher("dying", engine="transformers")
    degrading = workspace.run("degrading", kept_endpoint, num_steps=DEGRADED_STEPS)
    routed = workspace.folder / "routed.parquet"
    rows = pd.read_parquet(workspace.train_file)
    rows["data_source"] = ["kept" if number % 2 else "dying" for number in range(len(rows))]
    rows.to_parquet(routed)
    degrades = workspace.start(
        "degrading_trainer",
        degrading.command(
            {
                **REWARD,
                "trainer.v1.trainer_mode": "separate_async",
                "trainer.save_freq": -1,
                "data.train_files": routed,
                "data.shuffle": "false",  # half of each batch from either source
                f"{ACTOR}.gkd_only_mode": "false",
                f"{ROLLOUT}.n": 2,
                f"{ROLLOUT}.max_num_seqs": 2 * BATCH_SIZE,
                f"{TEACHER}.routes": f"{{kept: [{kept_endpoint}], dying: [{dying_endpoint}]}}",
                f"{TEACHER}.on_failure": "degrade",
                f"{TEACHER}.min_coverage": 0,  # a step may have responses of the lost teacher alone
                f"{TEACHER}.max_wait_s": MAX_WAIT_S,
            }
        ),
        degrading.environment(),
    )

    _until(workspace, waits, lambda: len(waiting.steps()) >= 1)
    _kill(lone)
    killed_s = time.monotonic()
    assert workspace.wait(waits, timeout_s=120) == [1], waits.last_words()
    # the bound, verl's end and the checkpoint
    assert time.monotonic() - killed_s < MAX_WAIT_S + 60
    last = len(waiting.steps())
    assert "responses could not be scored by the teacher (actor_rollout_ref.teacher.on_failure=wait)" in _log(waits)
    assert f"the checkpoint of step {last} is in " in _log(waits)
    assert (waiting.folder / "checkpoints" / f"global_step_{last}" / "transfer_queue").is_dir()

    _until(workspace, degrades, lambda: len(degrading.steps()) >= 1)
    _kill(dying)
    assert workspace.wait(degrades) == [0], degrades.last_words()
    steps = degrading.steps()
    assert [int(step["training/global_step"]) for step in steps] == list(range(1, DEGRADED_STEPS + 1))
    assert steps[0]["gkd/teacher_coverage"] == 1
    degraded = [step for step in steps if step["gkd/teacher_coverage"] < 1]
    assert degraded
    for step in degraded:  # a step takes what is ready first, so not always half from each
        assert step["gkd/teacher/dying/coverage"] < 1
        assert step.get("gkd/teacher/kept/coverage", 1) == 1
        assert step["gkd/scored_tokens"] >= step.get("gkd/teacher/kept/scored_tokens", 0)
    assert any(step.get("gkd/teacher/kept/scored_tokens", 0) > 0 for step in degraded)
    for step in steps:
        # One batch ahead, and never more. A response of the lost teacher waits up to max_wait_s, and meanwhile as many
        # steps as the machine can compute go on with the others.
        ahead = 2 if step["gkd/teacher_coverage"] == 1 else DEGRADED_STEPS
        assert 0 <= step["training/off_policy/trajectory_staleness/max"] <= ahead
        assert step["timing/teacher_knowledge"] <= MAX_WAIT_S + 1
        assert step["gkd/scored_tokens"] == 0 or step["gkd/teacher_inflight"] >= 1
        assert math.isfinite(step["actor/grad_norm"])
        assert "actor/pg_loss" in step
    assert workspace.supervisor.stop(kept) == 0


def test_a_full_disk_ends_the_run(workspace: Workspace) -> None:
    """The checkpoint of a step does not fit: the error says which, where, why, and what is left."""
    run = workspace.run("full_disk", "127.0.0.1:1", num_steps=4)
    disk = workspace.folder / "disk"
    disk.mkdir()
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", f"{disk}"]
    if subprocess.run([*own, *mount], check=False, capture_output=True).returncode != 0:
        pytest.skip("no file system of its own may be mounted here, to fill it up")
    changes = {
        **REWARD,
        **RESUMABLE,
        f"{ACTOR}.use_teacher_kl_loss": "false",
        f"{ACTOR}.gkd_only_mode": "false",
        "trainer.save_freq": 1,
        "trainer.default_local_dir": disk / "checkpoints",
    }
    script = f"{shlex.join(mount)} && exec {shlex.join(run.command(changes))}"
    full = workspace.start("full_disk_trainer", [*own, "sh", "-c", script], run.environment())
    assert workspace.wait(full) == [1], full.last_words()
    message = _log(full).rpartition("error: ")[2]
    assert re.search(r"the checkpoint of step 2 can't be written to .*/disk/checkpoints: ", message), message
    assert "that of step 1 is whole" in message
