"""vLLM's `AsyncLLM`, in process: by the fast route where it fits this vLLM, else by public prompt logprobs.

vLLM has no call that only scores: a request also generates one token, which takes one place of the context window.
The public route's prompt logprobs are those of temperature 1, whatever the request says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from protos.arrays import ScoreArrays
from teacher_service.engine import model_files
from teacher_service.engine.numerics import checked
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm import environment
from teacher_service.engine.vllm.adapter import Adapter
from teacher_service.engine.vllm.fast import frontend, kernel, probe, self_check
from teacher_service.engine.vllm.processes import EngineProcesses, children
from teacher_service.engine.vllm.routes import NUM_GENERATED_TOKENS, FastRoute, FlatRoute, Route
from teacher_service.errors import EngineDeadError, EngineError, EngineStartError
from teacher_service.types import EngineInfo, Price, ScoreJob

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

CPU_KV_CACHE_BYTES = 1 << 30
"""KV cache on a CPU where none is asked for: vLLM's own default takes nearly all memory of the machine."""
CPU_BLOCK_TOKENS = 32
"""Tokens of a cached block on a CPU. Only whole blocks before the first scored row are shared by siblings, and vLLM's
default there is 128."""
IN_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the model in the engine's own process. On a CPU vLLM would start a worker beside it, which spins on its queue
for a second after each step: a whole core taken from whoever shares the machine. The full name, since vLLM replaces the
short one."""
CPU_WORKER = "teacher_service.engine.vllm.cpu_worker.TeacherCPUWorker"
DEATH_POLL_S = 0.2
SHUTDOWN_TIMEOUT_S = 15.0
WORKER_EXTENSION = "teacher_service.engine.vllm.fast.worker.ScoringExtension"
SCHEDULER = "teacher_service.engine.vllm.fast.scheduler.PrefixCappedScheduler"
WORKER_TIMEOUT_S = 60.0
MIN_LORA_RANK = 16
"""vLLM's default; it takes adapters up to the rank that it was started with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    llm: AsyncLLM
    processes: EngineProcesses
    info: EngineInfo
    route: Route
    adapter: Adapter | None


class VllmEngine:
    """One vLLM engine. By the fast route all capabilities; else top-k and sampled logprobs at temperature 1."""

    def __init__(self, options: EngineOptions) -> None:
        """An engine that loads nothing yet."""
        self._options = options
        self._folder: environment.EngineFolder | None = None
        self._loading: asyncio.Task[_Running] | None = None
        self._earlier_children = frozenset[BaseProcess]()
        self._is_closed = False
        self._running: _Running | None = None
        self._in_flight: set[asyncio.Task[ScoreArrays]] = set()

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        # Loading blocks for seconds to minutes. AsyncLLM binds to the loop of its first request, not to the thread
        # that builds it, so a thread may build it and this loop use it.
        self._earlier_children = children()
        self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        running = await asyncio.shield(self._loading)
        if self._is_closed:
            raise EngineStartError(f"the engine was closed while it loaded {self._options.model!r}")
        self._running = running
        try:
            if running.adapter is not None:
                await running.llm.collective_rpc("detach_adapter_from_logits", timeout=WORKER_TIMEOUT_S)
            self._running = running = await self._take_fast_route(running)
            await self._warm_up(running.info)
            free_bytes = await _free_device_bytes(running.llm)
        except (EngineError, EngineDeadError) as exc:
            await self.close()
            raise EngineStartError(f"vLLM loaded {self._options.model!r} but can't score with it: {exc}") from exc
        self._running = running = replace(running, info=replace(running.info, device_free_bytes=free_bytes))
        return running.info

    def price(self, job: ScoreJob) -> Price:
        """See `Engine.price`."""
        if self._running is None:
            return Price(held_bytes=0)
        price = self._running.route.price(job)
        if self._running.info.device_free_bytes is not None:
            return price
        # in main memory each process has its own peak, and all may have it at once
        num_processes = self._options.tensor_parallel_size * self._options.data_parallel_size
        return replace(price, peak_bytes=num_processes * price.peak_bytes)

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        running = self._running
        if running is None:
            raise EngineDeadError("the engine holds no model: it is not started, or closed")
        with _vllm_errors_translated(running, job):
            return await self._unless_closed(_score(running, running.route, job))

    async def wait_dead(self) -> BaseException:
        """See `Engine.wait_dead`."""
        while True:
            # vLLM notices by itself when its process ends or reports a fatal error, but has nothing to await.
            if self._running is not None and self._running.llm.errored:
                return EngineDeadError(_cause_of_death(self._running))
            await asyncio.sleep(DEATH_POLL_S)

    async def close(self) -> None:
        """See `Engine.close`."""
        self._is_closed = True
        running, self._running = self._running, None
        if self._loading is not None and running is None:
            running = await self._abandon(self._loading)
        self._loading = None
        if running is not None:
            for request in self._in_flight:
                request.cancel()
            if running.llm.output_handler is not None:
                running.llm.output_handler.cancel()  # else it logs the end of its process as a failure
            await asyncio.to_thread(running.llm.shutdown, timeout=SHUTDOWN_TIMEOUT_S)
            await asyncio.to_thread(running.processes.reap, timeout_s=SHUTDOWN_TIMEOUT_S)
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.remove()

    async def _unless_closed(self, request: Coroutine[None, None, ScoreArrays]) -> ScoreArrays:
        task = asyncio.create_task(request)
        self._in_flight.add(task)
        try:
            return await task
        except asyncio.CancelledError as exc:
            caller = asyncio.current_task()
            if self._is_closed and not (caller is not None and caller.cancelling()):
                raise EngineDeadError("the engine was closed under this request; send it to another teacher") from exc
            raise
        finally:
            self._in_flight.discard(task)

    async def _abandon(self, loading: asyncio.Task[_Running]) -> _Running | None:
        """End a load that nobody waits for any more; what it has built, if it got so far."""
        while not loading.done():
            # The thread can't be stopped, but it fails at once when the process it waits for is gone.
            await asyncio.to_thread(EngineProcesses(children() - self._earlier_children).reap, timeout_s=0)
            await asyncio.wait({loading}, timeout=DEATH_POLL_S)
        return None if loading.cancelled() or loading.exception() else loading.result()

    async def _take_fast_route(self, running: _Running) -> _Running:
        """With the fast route, if it fits and scores a sequence as the public one does; else as it was, and said so."""
        if not self._options.fast_route:
            return running
        from vllm.platforms import current_platform

        route = FastRoute(kernel.scratch_bytes(current_platform.device_type, vocab_rows=running.info.vocab_rows))
        fast = replace(
            running,
            route=route,
            info=replace(running.info, route=route.name, capabilities=route.capabilities),
        )
        try:
            await _install_fast_route(running)
            job = self_check.make_job(running.info)
            with _vllm_errors_translated(running, job):
                public = await self._unless_closed(_score(running, running.route, job))
                ours = await self._unless_closed(_score(fast, fast.route, job))
            self_check.compare(ours, public, dtype=running.info.dtype)
        except (probe.ProbeError, EngineError) as exc:
            warning = (
                "scoring by vLLM's public route, several times slower and without temperature, entropy and candidates: "
                f"{exc}"
            )
            return replace(running, info=replace(running.info, warnings=(warning,)))
        return fast

    async def _warm_up(self, info: EngineInfo) -> None:
        """Score the shortest sequence: the first request compiles, and starts the listener that notices death."""
        job = ScoreJob(
            request_id="warm-up",
            token_ids=np.zeros(2, dtype=np.int32),
            score_start=1,
            num_logprobs=info.max_num_logprobs,
        )
        checked(await self.score(job), job, vocab_rows=info.vocab_rows)  # so that broken weights stop the start

    def _load(self) -> _Running:
        model = str(self._options.model)
        directory = model_files.locate_model(model)
        tokenizer = model_files.tokenizer_manifest(directory)
        adapter = None if self._options.lora is None else Adapter.read(self._options.lora)
        weights_digest = model_files.weights_digest(directory, *([] if adapter is None else [adapter.folder]))
        dtype = self._dtype_of(directory)
        environment.set_defaults()
        self._folder = environment.EngineFolder()
        try:
            llm = self._build(directory, dtype, adapter)
        except Exception as exc:
            self._folder.remove()
            raise EngineStartError(
                f"vLLM can't load model {model!r} from {directory}: {exc}; where its process failed, its log "
                "above names the cause. Usual ones: an architecture that this version lacks, or too little memory "
                "(lower max_model_len, kv_cache_bytes or gpu_memory_utilization)"
            ) from exc
        from vllm import __version__

        config = llm.vllm_config.model_config
        vocab_rows = int(config.get_vocab_size())
        route = FlatRoute(vocab_rows, step_tokens=int(llm.vllm_config.scheduler_config.max_num_batched_tokens))
        info = EngineInfo(
            name="vllm",
            version=str(__version__),
            model_name=model_files.model_name(model),
            weights_digest=weights_digest,
            tokenizer=tokenizer,
            vocab_rows=vocab_rows,
            dtype=str(config.dtype).removeprefix("torch."),
            max_model_len=int(config.max_model_len),
            max_request_tokens=int(config.max_model_len) - NUM_GENERATED_TOKENS,
            max_num_logprobs=min(self._options.max_num_logprobs, vocab_rows),
            capabilities=route.capabilities,
            route=route.name,
        )
        return _Running(
            llm=llm,
            processes=EngineProcesses(children() - self._earlier_children),
            info=info,
            route=route,
            adapter=adapter,
        )

    def _dtype_of(self, directory: Path) -> str:
        """The type asked for. vLLM's own `auto` would turn a float32 checkpoint into bfloat16."""
        asked = self._options.dtype
        return model_files.checkpoint_dtype(directory) or "auto" if asked == "auto" else asked

    def _build(self, directory: Path, dtype: str, adapter: Adapter | None) -> AsyncLLM:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        options = self._options
        is_cpu = current_platform.is_cpu()
        in_process = is_cpu and options.tensor_parallel_size * options.pipeline_parallel_size == 1
        enforce_eager = is_cpu if options.enforce_eager is None else options.enforce_eager
        if is_cpu and enforce_eager:
            environment.forbid_compiling()
        arguments = AsyncEngineArgs(
            model=str(directory),
            skip_tokenizer_init=True,  # ids in, ids out
            generation_config="vllm",  # the checkpoint's sampling defaults are no part of scoring
            dtype=dtype,
            quantization=options.quantization,
            enable_lora=adapter is not None,
            max_lora_rank=MIN_LORA_RANK if adapter is None else max(MIN_LORA_RANK, adapter.rank),
            max_model_len=options.max_model_len,
            max_logprobs=options.max_num_logprobs,
            seed=options.seed,
            gpu_memory_utilization=options.gpu_memory_utilization,
            block_size=CPU_BLOCK_TOKENS if is_cpu else None,
            kv_cache_memory_bytes=options.kv_cache_bytes or (CPU_KV_CACHE_BYTES if is_cpu else None),
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            data_parallel_size=options.data_parallel_size,
            distributed_executor_backend=IN_PROCESS_EXECUTOR if in_process else None,
            worker_cls=CPU_WORKER if is_cpu else "auto",
            worker_extension_cls=WORKER_EXTENSION,
            scheduler_cls=SCHEDULER if options.fast_route else None,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            enforce_eager=enforce_eager,
            enable_prefix_caching=options.fast_route,  # vLLM never reads it for public prompt logprobs
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        return AsyncLLM.from_engine_args(arguments)


async def _install_fast_route(running: _Running) -> None:
    """Prepare this process and vLLM's workers.

    Raises:
        ProbeError: this vLLM is another than the route was written for.
    """
    probe.check_frontend(running.info.version)
    frontend.install()
    for refusal in await running.llm.collective_rpc("install_scoring", timeout=WORKER_TIMEOUT_S):
        if refusal is not None:
            raise probe.ProbeError(refusal)


async def _free_device_bytes(llm: AsyncLLM) -> int | None:
    """Of the worker that has least left."""
    left = await llm.collective_rpc("free_device_bytes", timeout=WORKER_TIMEOUT_S)
    return min((one for one in left if one is not None), default=None)


async def _score(running: _Running, route: Route, job: ScoreJob) -> ScoreArrays:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        max_tokens=NUM_GENERATED_TOKENS,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **route.sampling(job),
    )
    adapter = None if running.adapter is None else running.adapter.request()
    outputs = running.llm.generate(tokens_input(job.token_ids.tolist()), sampling, job.request_id, lora_request=adapter)
    # Closing the generator, also by cancellation, aborts the request in the engine.
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if output.prompt_logprobs is not None:
                return route.score_arrays(output.prompt_logprobs, job)
    raise EngineError("vLLM answered without prompt logprobs; report this as a bug")


@contextlib.contextmanager
def _vllm_errors_translated(running: _Running, job: ScoreJob) -> Iterator[None]:
    from vllm.exceptions import VLLMError
    from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

    try:
        yield
    except VllmEngineDeadError as exc:
        raise EngineDeadError(_cause_of_death(running)) from exc
    except VLLMError as exc:
        raise EngineError(f"vLLM failed on {job.num_tokens} tokens with {job.num_logprobs} logprobs: {exc}") from exc


def _cause_of_death(running: _Running) -> str:
    cause = running.processes.cause_of_death() or str(running.llm.dead_error)
    return f"vLLM's engine is dead: {cause}"
