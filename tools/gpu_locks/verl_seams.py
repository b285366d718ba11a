"""Everything of verl 0.9.1 that the trainer names, calls or takes the place of, and what it calls of vLLM beside verl.

A new import or override gets a line here; tests hold the table against the code.
"""

from __future__ import annotations

from teacher_service.engine.vllm.seams import Parameters, Seam

TRAINER, LOSS, CPU = ("trainer",), ("loss",), ("cpu",)

_TRAINERS = ("PPOTrainerSync", "PPOTrainerColocateAsync", "PPOTrainerSeparateAsync")

_TRAINER_METHODS: dict[str, Parameters] = {
    "_balance_batch": ("self", "batch", "metrics", "logging_prefix", "keep_minibatch"),
    "_build_replay_buffer": ("self",),
    "_compute_advantage": ("self", "batch", "metrics"),
    "_compute_metrics": ("self", "batch", "metrics", "timing_raw", "global_steps", "epoch"),
    "_compute_old_log_prob": ("self", "batch", "metrics"),
    "_dump_generations": (
        "self",
        "inputs",
        "outputs",
        "gts",
        "scores",
        "reward_extra_infos_dict",
        "dump_path",
    ),
    "_fetch_one_gen_batch": ("self",),
    "_get_required_batch_multiple": ("self", "dp_size"),
    "_init_dataloader": ("self",),
    "_save_checkpoint": ("self",),
    "_step_once": ("self", "metrics", "timing_raw", "sample_batch_size"),
    "fit": ("self", "agent_loop_manager"),
    "on_init_end": ("self",),
    "on_sample_begin": ("self",),
    "on_step_begin": ("self",),
    "on_step_end": ("self",),
}
"""Overridden in each of the trainers."""

_TRAINER_ATTRIBUTES = (
    "_shutdown_dump_executor",
    "actor_rollout_wg",
    "config",
    "global_steps",
    "llm_server_manager",
    "local_trigger_step",
    "processor",
    "replay_buffer",
    "steps_per_epoch",
    "tokenizer",
    "total_training_steps",
    "train_dataloader",
    "train_dataset",
    "trainer_mode",
)

_RUN = (
    Seam(TRAINER, "verl.trainer.main_ppo:run_ppo", parameters=(("config", "task_runner_class"),)),
    # where Hydra's callback puts a run_ppo of its own
    Seam(TRAINER, "verl.trainer.main_ppo:main", contains=("run_ppo(",)),
    Seam(TRAINER, "verl.trainer.main_ppo:TaskRunnerV1", has=("trainer",)),
    Seam(TRAINER, "verl.trainer.main_ppo:TaskRunnerV1.run", parameters=(("self", "config"),)),
    Seam(TRAINER, "verl.trainer.ppo.utils:need_critic", parameters=(("config",),)),
    Seam(TRAINER, "verl.trainer.ppo.utils:need_reference_policy", parameters=(("config",),)),
    Seam(
        TRAINER,
        "verl.utils.config:validate_config",
        parameters=(("config", "use_reference_policy", "use_critic"),),
    ),
    Seam(TRAINER, "verl.utils.config:omega_conf_to_dataclass", parameters=(("config", "dataclass_type"),)),
    Seam(TRAINER, "verl.utils.device:auto_set_device", parameters=(("config",),)),
    Seam(TRAINER, "verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY"),
    Seam(TRAINER, "verl.trainer.ppo.v1.trainer_base:get_trainer_cls", contains=("TRAINER_REGISTRY[name]",)),
    # how the rollout's engines are ended
    Seam(TRAINER, "verl.trainer.ppo.v1:PPOTrainerSeparateAsync", has=("standalone_server_manager",)),
    Seam(TRAINER, "verl.workers.rollout.llm_server:LLMServerManager", has=("get_replicas",)),
    Seam(TRAINER, "verl.workers.rollout.replica:RolloutReplica", has=("servers",)),
    Seam(TRAINER, "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer", has=("engine",)),
)

_STEPS = (
    *(Seam(TRAINER, f"verl.trainer.ppo.v1:{trainer}", has=_TRAINER_ATTRIBUTES) for trainer in _TRAINERS),
    *(
        Seam(TRAINER, f"verl.trainer.ppo.v1:{trainer}.{method}", parameters=(parameters,))
        for trainer in _TRAINERS
        for method, parameters in _TRAINER_METHODS.items()
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.trainer_base:PPOTrainer._update_actor",
        # mini-batches are dealt out in the order in which the trainer counts them
        contains=('"dataloader_kwargs": {"shuffle": self.config.actor_rollout_ref.actor.shuffle}',),
    ),
    Seam(
        TRAINER,
        "verl.workers.engine_workers:TrainingWorker.train_mini_batch",
        contains=("mini_batch_size_per_gpu = mini_batch_size // self.engine.get_data_parallel_size()",),
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer",
        has=("partitions", "poll_interval"),
        contains=("time.sleep(self.poll_interval)",),
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._wait_for_next_poll",
        parameters=(("self", "partition_id", "last_debug_time"),),
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._materialize_batch",
        parameters=(("self", "partition_id", "selected_prompt_uids", "partition_snapshot"),),
        contains=("tq.kv_clear(partition_id=partition_id, keys=selected_prompt_uids)",),
    ),
    *(
        Seam(
            TRAINER,
            f"verl.trainer.ppo.v1.replay_buffer:{buffer}.sample",
            contains=("self._materialize_batch(partition_id, selected_prompt_uids, partition_snapshot)",),
        )
        for buffer in ("ReplayBuffer", "ReplayBufferAsync")
    ),
    *(
        Seam(
            TRAINER,
            f"verl.trainer.ppo.v1.replay_buffer:{method}",
            contains=("self._wait_for_next_poll(partition_id, last_debug_time)",),
        )
        for method in ("ReplayBuffer.sample", "ReplayBufferAsync.wait_for_sampleable")
    ),
    Seam(TRAINER, "verl.workers.utils.padding:response_to_nested", parameters=(("tensor", "response_mask"),)),
)

_ROLLOUT = (
    Seam(TRAINER, "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ", has=("agent_loop_workers_class",)),
    Seam(TRAINER, "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ", has=("config",)),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._run_prompt",
        parameters=(("self", "prompt", "sampling_params", "trajectory", "trace"),),
        contains=('prompt.pop("__rollout_n__"',),
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.generate_sequences",
        contains=('if "agent_name" not in batch',),
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._run_agent_loop",
        parameters=(("self", "sampling_params", "trajectory", "*", "agent_name", "trace", "**kwargs"),),
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._agent_loop_postprocess",
        parameters=(("self", "output", "validate", "**kwargs"),),
        contains=("await self._compute_score(", "await self._compute_teacher_logprobs("),
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._compute_score",
        parameters=(("self", "outputs", "kwargs"),),
    ),
    Seam(
        TRAINER,
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ._compute_teacher_logprobs",
        parameters=(("self", "output", "prompt_ids", "response_ids", "validate", "sample_kwargs"),),
    ),
    Seam(
        TRAINER,
        "verl.experimental.agent_loop:AgentLoopOutput",
        accepts=(
            "extra_fields",
            "metrics",
            "num_turns",
            "prompt_ids",
            "response_ids",
            "response_mask",
            "reward_score",
        ),
    ),
    Seam(TRAINER, "verl.experimental.agent_loop.agent_loop:AgentLoopOutput"),
    Seam(TRAINER, "verl.experimental.agent_loop.agent_loop:register", parameters=(("agent_name",),)),
    Seam(TRAINER, "verl.experimental.agent_loop.agent_loop:AgentLoopBase", has=("ct_build_initial_tokens",)),
    Seam(
        TRAINER,
        "verl.experimental.agent_loop.agent_loop:AgentLoopBase.run",
        parameters=(("self", "sampling_params", "**kwargs"),),
    ),
    Seam(TRAINER, "verl.utils.dataset.rl_dataset:RLHFDataset", has=("config", "dataframe", "prompt_key")),
    Seam(
        TRAINER,
        "verl.utils.dataset.rl_dataset:RLHFDataset.maybe_filter_out_long_prompts",
        parameters=(("self", "dataframe"),),
    ),
    Seam(TRAINER, "verl.utils.dataset.rl_dataset:collate_fn", parameters=(("data_list",),)),
    Seam(
        TRAINER,
        "verl.trainer.ppo.utils:create_rl_dataset",
        parameters=(("data_paths", "data_config", "tokenizer", "processor", "is_train", "max_samples"),),
    ),
    Seam(TRAINER, "verl.utils:tensordict_utils"),
    Seam(
        TRAINER,
        "verl.utils.tensordict_utils:get_tensordict",
        parameters=(("tensor_dict", "non_tensor_dict"),),
    ),
    Seam(
        TRAINER,
        "verl.utils.reward_score:default_compute_score",
        accepts=("data_source", "solution_str", "ground_truth", "extra_info"),
    ),
)

_LOSS = (
    Seam(
        LOSS,
        "verl.trainer.ppo.core_algos:agg_loss",
        accepts=(
            "loss_mat",
            "loss_mask",
            "loss_agg_mode",
            "dp_size",
            "batch_num_tokens",
            "global_batch_size",
            "loss_scale_factor",
        ),
    ),
    Seam(LOSS, "verl.utils.metric:Metric", accepts=("aggregation", "value")),
    Seam(LOSS, "verl.utils.metric:AggregationType.SUM"),
    Seam(
        LOSS,
        "verl.workers.utils.losses:ppo_loss",
        parameters=(("config", "model_output", "data", "dp_group"),),
    ),
    Seam(LOSS, "verl.workers.utils.padding:no_padding_2_padding", parameters=(("tensor", "data"),)),
    Seam(LOSS, "verl.utils.ulysses:get_ulysses_sequence_parallel_world_size", parameters=(("group",),)),
    Seam(LOSS, "verl.utils.ulysses:slice_input_tensor", parameters=(("x", "dim", "padding", "group"),)),
    Seam(LOSS, "verl.models.mcore.util:preprocess_bshd_engine", accepts=("input_ids", "pre_process")),
    Seam(LOSS, "verl.models.mcore.util:preprocess_thd_engine", accepts=("input_ids", "pre_process")),
    # the loss is called on the logits where the trainer sets these
    Seam(
        LOSS,
        "verl.workers.engine.fsdp.transformer_impl",
        contains=(
            'key="distillation_use_topk", default=False',
            'key="distillation_only", default=False',
            "logits_processor_func(student_logits=logits_rmpad.unsqueeze(0), data=micro_batch)",
        ),
    ),
    Seam(
        LOSS,
        "verl.workers.engine.megatron.transformer_impl",
        contains=('key="distillation_use_topk", default=False', 'key="distillation_only", default=False'),
    ),
)

_CPU = (
    Seam(
        CPU,
        "verl.utils.distributed:initialize_global_process_group_ray",
        parameters=(("timeout_second", "backend"),),
        contains=('f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"',),
    ),
    Seam(CPU, "verl.workers.rollout.base:_ROLLOUT_REGISTRY", contains=('("vllm", "async")',)),
    Seam(
        CPU,
        "verl.workers.rollout.replica:RolloutReplicaRegistry.register",
        parameters=(("cls", "name", "loader"),),
    ),
    Seam(CPU, "verl.workers.rollout.vllm_rollout:ServerAdapter", has=("zmq_handle",), contains=("ipc:///tmp/",)),
    Seam(
        CPU,
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver",
        parameters=(("self", "zmq_handle", "device", "use_shm"),),
    ),
    Seam(
        CPU,
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver.receive_weights",
        parameters=(("self", "on_bucket_received"),),
    ),
    Seam(
        CPU,
        "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension._get_zmq_handle",
        parameters=(("self",),),
        contains=("ipc:///tmp/",),
    ),
    Seam(
        CPU,
        "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension.update_weights_from_ipc",
        parameters=(("self", "peft_config", "base_sync_done", "use_shm"),),
    ),
    Seam(
        CPU,
        "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer._get_worker_extension_cls",
        parameters=(("self",),),
    ),
    Seam(CPU, "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMReplica", has=("server_class",)),
    Seam(CPU, "verl.checkpoint_engine:CheckpointEngine.prepare", parameters=(("self",),)),
    Seam(
        CPU,
        "verl.checkpoint_engine:CheckpointEngine.build_topology",
        parameters=(("cls", "actor_wg_world_size", "rollout_world_size", "metadata"),),
    ),
    # its arguments are what `build_topology` returns, by name
    Seam(CPU, "verl.checkpoint_engine:CheckpointEngine.init_process_group", parameters=(("self", "**kwargs"),)),
    Seam(CPU, "verl.checkpoint_engine:CheckpointEngine.finalize", parameters=(("self",),)),
    Seam(
        CPU,
        "verl.checkpoint_engine:CheckpointEngine.send_weights",
        parameters=(("self", "weights", "global_steps"),),
    ),
    Seam(
        CPU,
        "verl.checkpoint_engine:CheckpointEngine.receive_weights",
        parameters=(("self", "global_steps"),),
    ),
    Seam(CPU, "verl.checkpoint_engine:CheckpointEngineRegistry.register", parameters=(("backend",),)),
    Seam(CPU, "verl.checkpoint_engine.base:ensure_async_iterator"),
    *(
        Seam(CPU, f"verl.plugin.platform.platform_base:PlatformBase.{method}", parameters=(("self",),))
        for method in (
            "communication_backend_name",
            "cudart",
            "current_device",
            "device_count",
            "device_module",
            "device_name",
            "empty_cache",
            "is_available",
            "is_ipc_supported",
            "profiler_start",
            "profiler_stop",
            "ray_noset_envvars",
            "ray_resource_name",
            "rollout_env_vars",
            "vendor_name",
            "visible_devices_envvar",
        )
    ),
    *(
        Seam(CPU, f"verl.plugin.platform.platform_base:PlatformBase.{method}", parameters=(("self", argument),))
        for method, argument in (
            ("get_device_capability", "device_index"),
            ("is_platform_available", "use_smi_check"),
            ("manual_seed", "seed"),
            ("manual_seed_all", "seed"),
            ("nvtx_range", "msg"),
            ("set_allocator_settings", "settings"),
            ("set_device", "device_index"),
            ("synchronize", "device_index"),
        )
    ),
    Seam(CPU, "verl.plugin.platform.platform_manager:PlatformRegistry.register", parameters=(("cls", "platform"),)),
)

VERL_SEAMS = (*_RUN, *_STEPS, *_ROLLOUT, *_LOSS, *_CPU)
"""All of verl."""

TRAINER_VLLM_SEAMS = (
    # verl's server holds it as `engine`, and the trainer ends it
    Seam(TRAINER, "vllm.v1.engine.async_llm:AsyncLLM.shutdown", accepts=("timeout",)),
    # the rollout on a CPU mends a tied LM head after a reload
    Seam(CPU, "vllm.v1.executor.uniproc_executor:UniProcExecutor"),
    Seam(CPU, "vllm.v1.worker.gpu_model_runner:GPUModelRunner", has=("get_model", "model_config")),
    Seam(CPU, "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights", accepts=("weights_iterator",)),
    Seam(CPU, "vllm.model_executor.model_loader.reload:layerwise"),
    Seam(CPU, "vllm.model_executor.models.utils:WeightsMapper"),
    Seam(CPU, "vllm.model_executor.model_loader.reload.layerwise:logger"),
    Seam(CPU, "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead", has=("quant_method",)),
    Seam(CPU, "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding"),
)
"""What the trainer calls of the vLLM that verl runs."""
