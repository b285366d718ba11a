"""Real verl, real Ray, real vLLM on both sides of the real contract."""

from __future__ import annotations

import math
import socket
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import NUM_STEPS, Workspace
from tests.support.collector import collecting
from tests.support.trainer import BATCH_SIZE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


def test_distillation_on_the_real_stack(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's metrics are right, the rollout follows the weights, the student changes, the teacher agrees.

    And each step is one trace, down to the teacher's engine.
    """
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        _distil_and_check(workspace)
    # from the engine up to the training step, over three processes
    engine = [one for one in collector.spans if one.name == "engine"]
    chains = {tuple(collector.chain(one)) for one in engine}
    assert ("engine", "teacher Score", "teacher attempt", "teacher score", "gkd.step") in chains
    assert sum(one.name == "gkd.step" for one in collector.spans) == NUM_STEPS
    assert {one.service for one in collector.spans} == {"gkd-teacher", "gkd-trainer"}


def _distil_and_check(workspace: Workspace) -> None:
    teacher, endpoint, http = workspace.start_teacher("teacher")
    run = workspace.run("distil", endpoint)
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    changes = {"trainer.metrics_address": f"127.0.0.1:{metrics_port}"}
    trainer = workspace.start("trainer", run.command(changes), run.environment())
    while not run.steps():
        assert trainer.exit_code() is None, trainer.last_words()
        workspace.supervisor.pause(0.05)
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
        assert 'trainer_metric{name="timing/teacher_knowledge"}' in answer.read().decode()
    assert workspace.wait(trainer) == [0], trainer.last_words()

    steps = run.steps()
    assert len(steps) == NUM_STEPS
    for step in steps:
        # the rollout's weights are the trainer's: below .99 they are stale
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.99
        # every response token was scored, once, and nothing else
        assert step["gkd/scored_tokens"] == pytest.approx(step["response_length/mean"] * BATCH_SIZE)
        assert step["actor/teacher_kl_coef"] == 1.0
        assert step["actor/loss"] == pytest.approx(step["actor/teacher_kl_loss"], rel=1e-5)
        assert step["data/is_on_policy"] == 1.0
        assert 0 <= step["timing/teacher_knowledge"] <= step["timing_s/gen"] + step["timing_s/step"]
        assert 0 < step["gkd/teacher_tail_mass"] < 1
        assert math.isfinite(step["actor/grad_norm"])
        # distillation alone has no reward, no advantage and no policy-gradient loss
        assert not [name for name in step if name.startswith("critic/") or "pg_loss" in name]
    assert steps[-1]["actor/teacher_kl_loss"] < steps[0]["actor/teacher_kl_loss"]

    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    served = sum(float(line.split()[-1]) for line in lines if line.startswith("teacher_tokens_scored_total"))
    canaries = served - sum(step["gkd/scored_tokens"] for step in steps)
    assert 0 < canaries < 100  # a short sequence for each client that came, and nothing else

    before = AutoModelForCausalLM.from_pretrained(run.student, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(
        run.folder / "checkpoints" / f"global_step_{NUM_STEPS}" / "actor" / "huggingface", dtype=torch.float32
    )
    moved = [float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert max(moved) > 1e-3

    assert workspace.supervisor.stop(teacher) == 0  # a drained teacher ends well
