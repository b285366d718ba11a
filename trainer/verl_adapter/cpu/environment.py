"""What verl, vLLM and Ray need to run without an accelerator: environment and configuration defaults.

Imports none of them: it has to run before they are imported.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

ENVIRONMENT: Mapping[str, str] = {
    "VERL_USE_EXTERNAL_MODULES": "trainer.verl_adapter.cpu.plugin",
    "VERL_PLATFORM": "cpu",
    # verl registers its FSDP engine for cuda and npu only; the engine itself runs on a CPU
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # TransferQueue's own 8 draws a warning at every call on a machine with fewer cores
    "TQ_NUM_THREADS": "1",
    # what vLLM compiles for its sampler takes longer to compile than it ever saves on a small model
    "TORCH_COMPILE_DISABLE": "1",
    # the teacher may run on this machine too: at Ray's own niceness of 15 it would starve the trainer
    "RAY_worker_niceness": "0",
    # Ray would otherwise hide the (counted, not real) GPU from workers that ask for none
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    # verl's separate_async mode without a hybrid engine fails in one of its own messages at INFO
    "VERL_LOGGING_LEVEL": "WARN",
}
"""Set in the driver and in every Ray worker, unless the user's environment says otherwise."""

CONFIG_DEFAULTS: dict[str, object] = {
    "actor_rollout_ref.model.use_remove_padding": False,
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.ref.use_torch_compile": False,
    # vLLM on a CPU has no sleep mode
    "actor_rollout_ref.rollout.free_cache_engine": False,
    "actor_rollout_ref.rollout.enable_sleep_mode": False,
    "actor_rollout_ref.rollout.enforce_eager": True,
    # in the engine's process: vLLM's worker beside it would spin on its queue, a whole core taken from the others
    "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend": (
        "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    ),
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.agent.num_workers": 1,
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": 16,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
    "data.train_batch_size": 64,
    "data.dataloader_num_workers": 0,
    "reward.num_workers": 1,
    "trainer.n_gpus_per_node": 1,
    "trainer.logger": ["console"],
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "ray_kwargs.ray_init.num_cpus": 16,
    "ray_kwargs.ray_init.include_dashboard": False,
    "ray_kwargs.ray_init.object_store_memory": 500_000_000,
}
"""Applied where the user's command line is silent. `ray_init.num_gpus` counts the workers of actor and rollout."""


FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
FLOAT32_DEFAULTS: dict[str, object] = {
    "actor_rollout_ref.actor.fsdp_config.mixed_precision": FLOAT32,
    "actor_rollout_ref.ref.fsdp_config.mixed_precision": FLOAT32,
    "actor_rollout_ref.rollout.dtype": "float32",
}
"""Likewise, on a processor without instructions for bfloat16, which multiplies it dozens of times slower."""
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What /proc/cpuinfo says of such instructions, on x86 and Arm."""
CPUINFO = Path("/proc/cpuinfo")

MAX_RAY_ROOT_BYTES = 26
"""Longest folder for temporary files that Ray's can lie in. A socket's path may have 107 bytes: the run's own folder
takes 17 of them, and what Ray puts there 64."""

FILE_TRANSPORT = "gkd_file"
"""Name of the weight transport in `checkpoint_engine.py`."""
SEPARATE_ASYNC_DEFAULTS: dict[str, object] = {
    # a rollout engine of its own, and none beside the actor
    "actor_rollout_ref.hybrid_engine": False,
    "actor_rollout_ref.rollout.nnodes": 1,
    "actor_rollout_ref.rollout.n_gpus_per_node": 1,
    "actor_rollout_ref.rollout.checkpoint_engine.backend": FILE_TRANSPORT,
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module": "trainer.verl_adapter.cpu.checkpoint_engine",
}
"""Likewise, with `trainer.v1.trainer_mode=separate_async`."""


def set_environment() -> None:
    """Set what the driver and its children need, leaving what the user already set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def private_folder(prefix: str) -> str:
    """A new temporary folder of this user's alone, whose path is short enough for sockets below it."""
    root = tempfile.gettempdir()
    if len(os.fsencode(root)) > MAX_RAY_ROOT_BYTES:
        root = "/tmp"  # noqa: S108  # mkdtemp below it
    return tempfile.mkdtemp(prefix=prefix, dir=root)


def has_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor multiplies bfloat16 itself; assumed where the kernel does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = [line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))]
    return not flags or not BFLOAT16_FLAGS.isdisjoint(flags[0])


def apply_config_defaults(config: DictConfig, user_keys: Set[str]) -> None:
    """Fill in what a machine without an accelerator needs, in place, wherever the user did not choose.

    Args:
        config: the composed configuration, before verl sees it.
        user_keys: dotted keys that the command line names.
    """
    is_separate = config.trainer.v1.trainer_mode == "separate_async"
    defaults = CONFIG_DEFAULTS | (SEPARATE_ASYNC_DEFAULTS if is_separate else {})
    if not has_bfloat16():
        defaults |= FLOAT32_DEFAULTS
    for key, value in defaults.items():
        if key not in user_keys:
            OmegaConf.update(config, key, value, force_add=True)
    if "ray_kwargs.ray_init.num_gpus" not in user_keys:
        rollout = config.actor_rollout_ref.rollout
        own = rollout.nnodes * rollout.n_gpus_per_node if is_separate else 0
        OmegaConf.update(config, "ray_kwargs.ray_init.num_gpus", config.trainer.n_gpus_per_node + own, force_add=True)
    for name, value in ENVIRONMENT.items():
        key = f"ray_kwargs.ray_init.runtime_env.env_vars.{name}"
        OmegaConf.update(config, key, os.environ.get(name, value), force_add=True)
