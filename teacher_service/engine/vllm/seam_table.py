"""Everything of vLLM that this project names, calls or takes the place of, and in which forms it is served.

A new import, keyword or override gets a line here; tests hold the table against the code. It was read in vLLM 0.31,
0.32 and 0.33; where these differ, each form stands beside the others.
"""

from __future__ import annotations

from teacher_service.engine.vllm.adapter import MAX_LORA_RANKS
from teacher_service.engine.vllm.seams import Seam

PUBLIC, LORA, CPU = "public", "lora", "cpu"
FAST, V1, V2, TENSOR_PARALLEL = "fast", "v1", "v2", "tensor_parallel"
FAST_PARTS = (FAST, V1, V2, TENSOR_PARALLEL)
"""What the fast route needs beyond the public one."""

_ENGINE = (
    Seam((PUBLIC,), "vllm:__version__"),
    Seam((PUBLIC,), "vllm.platforms:current_platform"),
    Seam((PUBLIC,), "vllm.platforms.interface:Platform", has=("device_type", "is_cpu", "use_all_gather")),
    Seam(
        (PUBLIC,),
        "vllm.engine.arg_utils:AsyncEngineArgs",
        accepts=(
            "block_size",
            "compilation_config",
            "data_parallel_size",
            "disable_log_stats",
            "distributed_executor_backend",
            "dtype",
            "enable_lora",
            "enable_prefix_caching",
            "enforce_eager",
            "generation_config",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "max_logprobs",
            "max_lora_rank",
            "max_model_len",
            "max_num_batched_tokens",
            "max_num_seqs",
            "model",
            "pipeline_parallel_size",
            "quantization",
            "seed",
            "skip_tokenizer_init",
            "tensor_parallel_size",
            "trust_remote_code",
            "use_tqdm_on_load",
            "worker_cls",
            "worker_extension_cls",
        ),
    ),
    Seam((PUBLIC,), "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config", accepts=("usage_context",)),
    Seam((PUBLIC,), "vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER"),
    Seam((PUBLIC,), "vllm.transformers_utils.config:_CONFIG_REGISTRY"),
    Seam((PUBLIC,), "vllm.config:VllmConfig", has=("model_config", "scheduler_config", "use_v2_model_runner")),
    Seam((PUBLIC,), "vllm.config:ModelConfig", has=("dtype", "get_vocab_size", "hf_text_config", "max_model_len")),
    Seam((PUBLIC,), "vllm.config:SchedulerConfig", has=("max_num_batched_tokens", "max_num_seqs")),
    Seam(
        (PUBLIC,),
        "vllm.v1.engine.async_llm:AsyncLLM",
        has=("dead_error", "engine_core", "errored", "output_handler", "vllm_config"),
    ),
    Seam(
        (PUBLIC,),
        "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config",
        accepts=("vllm_config", "usage_context", "disable_log_stats"),
    ),
    Seam(
        (PUBLIC,),
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        accepts=("prompt", "sampling_params", "request_id", "lora_request"),
    ),
    Seam((PUBLIC,), "vllm.v1.engine.async_llm:AsyncLLM.shutdown", accepts=("timeout",)),
    # `AsyncLLM.collective_rpc` gives the answers of the first engine alone
    Seam((PUBLIC,), "vllm.v1.engine.core_client:AsyncMPClient", has=("core_engines",)),
    *(
        Seam(
            (PUBLIC,),
            f"vllm.v1.engine.core_client:{client}._call_utility_async",
            parameters=(("self", "method", "*args", "engine"),),
        )
        for client in ("AsyncMPClient", "DPLBAsyncMPClient")
    ),
    Seam(
        (PUBLIC,),
        "vllm.v1.engine.core:EngineCore.collective_rpc",
        parameters=(("self", "method", "timeout", "args", "kwargs"),),
    ),
    Seam((PUBLIC,), "vllm.exceptions:VLLMError"),
    Seam((PUBLIC,), "vllm.v1.engine.exceptions:EngineDeadError"),
)

_REQUESTS = (
    Seam(
        (PUBLIC,),
        "vllm:SamplingParams",
        accepts=(
            "detokenize",
            "extra_args",
            "flat_logprobs",
            "max_tokens",
            "output_kind",
            "prompt_logprobs",
            "skip_reading_prefix_cache",
            "temperature",
        ),
    ),
    Seam((PUBLIC,), "vllm.sampling_params:RequestOutputKind.FINAL_ONLY"),
    Seam((PUBLIC,), "vllm.inputs:tokens_input", accepts=("prompt_token_ids",)),
    Seam((PUBLIC,), "vllm.outputs:RequestOutput", has=("prompt_logprobs",)),
    Seam((PUBLIC,), "vllm.logprobs:FlatLogprobs", has=("logprobs", "start_indices", "token_ids")),
)

_ENVIRONMENT = tuple(
    Seam((PUBLIC,), f"vllm.envs:{name}")
    for name in (
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_LOGGING_LEVEL",
        "VLLM_LOGGING_STREAM",
        "VLLM_NO_USAGE_STATS",
        "VLLM_RPC_BASE_PATH",
        "VLLM_USE_FLASHINFER_SAMPLER",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_WORKER_MULTIPROC_METHOD",
    )
)

_WORKER = (
    # what `collective_rpc` calls is mixed into the worker by the name of a class
    Seam(
        (PUBLIC,),
        "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker",
        contains=("parallel_config.worker_extension_cls",),
    ),
    Seam((PUBLIC,), "vllm.v1.worker.gpu_worker:Worker", has=("model_runner",)),
    Seam((PUBLIC,), "vllm.v1.worker.gpu_model_runner:GPUModelRunner", has=("device", "model")),
    Seam((PUBLIC,), "vllm.v1.worker.gpu.model_runner:GPUModelRunner", has=("device", "model")),
    # by which the public route's memory is priced on the V2 runner
    Seam((PUBLIC,), "vllm.v1.worker.gpu.sample.prompt_logprob:CHUNK_SIZE", contains=("CHUNK_SIZE = 1024",)),
    # on a CPU
    Seam((CPU,), "vllm.v1.executor.uniproc_executor:UniProcExecutor"),
    Seam((CPU,), "vllm.v1.worker.cpu_worker:CPUWorker", has=("model_config", "model_runner", "parallel_config")),
    Seam((CPU,), "vllm.v1.worker.cpu_worker:CPUWorker.init_device", parameters=(("self",),)),
    Seam((CPU,), "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model", parameters=(("self",),)),
    Seam((CPU,), "vllm.v1.worker.cpu_model_runner:CPUModelRunner", has=("profile_run",)),
)

_GET_LOGITS = (("self", "hidden_states", "lm_head", "embedding_bias", "skip_gather"),)

_LORA = (
    Seam(
        (LORA,),
        "vllm.lora.request:LoRARequest",  # called by position
        parameters=(
            (
                "lora_name",
                "lora_int_id",
                "lora_path",
                "base_model_name",
                "tensorizer_config_dict",
                "load_inplace",
                "is_3d_lora_weight",
            ),
            ("lora_name", "lora_int_id", "lora_path", "base_model_name", "load_inplace", "is_3d_lora_weight"),
        ),
    ),
    Seam((LORA,), "vllm.config.lora:MaxLoRARanks", contains=(f"Literal{list(MAX_LORA_RANKS)}",)),
    Seam((LORA,), "vllm.v1.engine.async_llm:AsyncLLM.add_lora", accepts=("lora_request",)),
    Seam((LORA,), "vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA", has=("base_layer",)),
    Seam(
        (LORA,),
        "vllm.lora.layers.logits_processor:LogitsProcessorWithLoRA._get_logits",
        parameters=_GET_LOGITS,
    ),
    Seam(
        (LORA,),
        "vllm.lora.model_manager:LoRAModelManager",
        has=("_get_lora_layer_weights", "get_adapter", "modules"),
        contains=("self.model.lora_manager = self",),
    ),
    Seam((LORA,), "vllm.lora.lora_model:LoRAModel", has=("loras",)),
    Seam((LORA,), "vllm.lora.lora_weights:LoRALayerWeights", has=("lora_a",)),
)

_FAST_FRONTEND = (
    Seam((FAST,), "vllm.v1.engine:output_processor", contains=("LogprobsProcessor.from_new_request(",)),
    Seam((FAST,), "vllm.v1.engine.output_processor:LogprobsProcessor"),
    Seam((FAST,), "vllm.v1.engine.logprobs:LogprobsProcessor", has=("prompt_logprobs",)),
    Seam(
        (FAST,),
        "vllm.v1.engine.logprobs:LogprobsProcessor.from_new_request",
        parameters=(("cls", "tokenizer", "request"),),
    ),
    Seam(
        (FAST,),
        "vllm.v1.engine.logprobs:LogprobsProcessor._update_prompt_logprobs",
        parameters=(("self", "prompt_logprobs_tensors"),),
    ),
)

_FAST_SCHEDULER = (
    Seam((FAST,), "vllm.config:SchedulerConfig", has=("async_scheduling", "scheduler_cls")),
    Seam((FAST,), "vllm.v1.core.sched.async_scheduler:AsyncScheduler", has=("kv_cache_manager",)),
    Seam(
        (FAST,),
        "vllm.v1.core.sched.scheduler:Scheduler",
        has=("kv_cache_manager",),
        contains=("self.kv_cache_manager.get_computed_blocks(request",),
    ),
    Seam(
        (FAST,),
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        parameters=(("self", "request"), ("self", "request", "max_cache_hit_length")),
        # where there is no limit to lower, it is handed a request that says to be shorter
        contains=("max_cache_hit_length = request.num_tokens - 1",),
    ),
    Seam((FAST,), "vllm.v1.request:Request", has=("num_tokens", "sampling_params")),
)

_FAST_WORKER = (
    Seam((FAST,), "vllm.config:ModelConfig", has=("get_vocab_size", "head_dtype", "max_logprobs")),
    Seam((FAST,), "vllm.v1.worker.gpu_worker:Worker", has=("model_runner",)),
    Seam(
        (FAST,),
        "vllm.v1.outputs:LogprobsTensors",
        accepts=("logprob_token_ids", "logprobs", "selected_token_ranks"),
        has=("to_cpu_nonblocking",),
    ),
    # V1
    Seam(
        (V1,),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        has=(
            "_sync_device",
            "device",
            "input_batch",
            "model",
            "model_config",
            "num_prompt_logprobs",
            "query_start_loc",
            "requests",
        ),
        contains=("self._get_prompt_logprobs_dict(",),
    ),
    Seam(
        (V1,),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",
        parameters=(("self", "hidden_states", "num_scheduled_tokens"),),
    ),
    Seam(
        (V1,),
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        has=("in_progress_prompt_logprobs_cpu", "num_computed_tokens", "prompt_token_ids", "sampling_params"),
    ),
    Seam((V1,), "vllm.v1.worker.gpu_input_batch:InputBatch", has=("req_id_to_index", "token_ids_cpu")),
    Seam((V1,), "vllm.v1.utils:CpuGpuBuffer", has=("np",)),
    # V2
    Seam(
        (V2,),
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        has=("device", "model", "model_config", "prompt_logprobs_worker"),
        contains=(
            "self.prompt_logprobs_worker.compute_prompt_logprobs(self.model.compute_logits, hidden_states, input_batch,"
            "self.req_states.all_token_ids.gpu, self.req_states.num_computed_tokens.gpu, self.req_states.prompt_len.np",
        ),
    ),
    Seam(
        (V2,),
        "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker",
        has=("in_progress_prompt_logprobs", "uses_prompt_logprobs"),
    ),
    Seam(
        (V2,),
        "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.add_request",
        parameters=(("self", "req_id", "req_idx", "sampling_params"),),
    ),
    Seam(
        (V2,),
        "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.remove_request",
        parameters=(("self", "req_id"),),
    ),
    Seam(
        (V2,),
        "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs",
        parameters=(
            (
                "self",
                "logits_fn",
                "hidden_states",
                "input_batch",
                "all_token_ids",
                "num_computed_tokens",
                "prompt_lens",
            ),
        ),
    ),
    Seam(
        (V2,),
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        has=(
            "idx_mapping_np",
            "num_computed_prefill_tokens_np",
            "num_scheduled_tokens",
            "prefill_len_np",
            "query_start_loc_np",
            "req_ids",
        ),
    ),
)

_TENSOR_PARALLEL = (
    Seam((TENSOR_PARALLEL,), "vllm.config:ModelConfig", has=("dtype", "get_hidden_size")),
    # every worker asks for its groups, also one that is alone in them
    Seam((FAST,), "vllm.distributed.parallel_state:get_pp_group", parameters=((),)),
    Seam((FAST,), "vllm.distributed.parallel_state:get_tp_group", parameters=((),)),
    Seam(
        (FAST,),
        "vllm.distributed.parallel_state:GroupCoordinator",
        has=("is_first_rank", "is_last_rank", "rank_in_group", "world_size"),
    ),
    Seam(
        (TENSOR_PARALLEL,),
        "vllm.distributed.parallel_state:GroupCoordinator.gather",
        parameters=(("self", "input_", "dst", "dim"),),
    ),
    Seam(
        (TENSOR_PARALLEL,),
        "vllm.distributed.parallel_state:GroupCoordinator.all_gather",
        parameters=(("self", "input_", "dim"),),
    ),
    Seam((TENSOR_PARALLEL,), "vllm.model_executor.layers.logits_processor:LogitsProcessor"),
    Seam(
        (TENSOR_PARALLEL, LORA),
        "vllm.model_executor.layers.logits_processor:LogitsProcessor._get_logits",
        parameters=_GET_LOGITS,
        contains=("self._gather_logits(logits)",),
    ),
    Seam(
        (TENSOR_PARALLEL,),
        "vllm.model_executor.layers.logits_processor:LogitsProcessor._gather_logits",
        parameters=(("self", "logits"),),
    ),
)

SEAMS = (
    *_ENGINE,
    *_REQUESTS,
    *_ENVIRONMENT,
    *_WORKER,
    *_LORA,
    *_FAST_FRONTEND,
    *_FAST_SCHEDULER,
    *_FAST_WORKER,
    *_TENSOR_PARALLEL,
)
"""All of them."""
