"""vLLM's `AsyncLLM`, in process, over its public prompt-logprobs route.

vLLM has no call that only scores: a request also generates one token, which takes one place of the context window.
Its prompt logprobs are those of temperature 1, whatever the request says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from protos.arrays import ScoreArrays
from teacher_service.engine import model_files
from teacher_service.engine.numerics import checked
from teacher_service.engine.vllm import environment
from teacher_service.engine.vllm.flat_logprobs import FlatLogprobs, score_arrays
from teacher_service.engine.vllm.processes import EngineProcesses, children
from teacher_service.errors import EngineDeadError, EngineError, EngineStartError
from teacher_service.types import EngineInfo, ScoreJob

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

CPU_KV_CACHE_BYTES = 1 << 30
"""KV cache on a CPU where none is asked for: vLLM's own default takes nearly all memory of the machine."""
IN_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the model in the engine's own process. On a CPU vLLM would start a worker beside it, which spins on its queue
for a second after each step: a whole core taken from whoever shares the machine. The full name, since vLLM replaces the
short one."""
CPU_WORKER = "teacher_service.engine.vllm.cpu_worker.AmxPermittedCPUWorker"
DEATH_POLL_S = 0.2
SHUTDOWN_TIMEOUT_S = 15.0
NUM_GENERATED_TOKENS = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    llm: AsyncLLM
    processes: EngineProcesses
    info: EngineInfo


class VllmEngine:
    """One vLLM engine. Top-k and sampled logprobs at temperature 1; the tail mass is one minus the top-k's."""

    def __init__(
        self,
        *,
        model: str,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_logprobs: int = 256,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        kv_cache_bytes: int | None = None,
        tensor_parallel_size: int = 1,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        enforce_eager: bool | None = None,
    ) -> None:
        """An engine that loads nothing yet. Arguments: `build_engine`."""
        self._model = model
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._max_num_logprobs = max_num_logprobs
        self._seed = seed
        self._gpu_memory_utilization = gpu_memory_utilization
        self._kv_cache_bytes = kv_cache_bytes
        self._tensor_parallel_size = tensor_parallel_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._enforce_eager = enforce_eager
        self._folder: environment.EngineFolder | None = None
        self._loading: asyncio.Task[_Running] | None = None
        self._earlier_children = frozenset[BaseProcess]()
        self._is_closed = False
        self._running: _Running | None = None
        self._in_flight: set[asyncio.Task[FlatLogprobs]] = set()

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        # Loading blocks for seconds to minutes. AsyncLLM binds to the loop of its first request, not to the thread
        # that builds it, so a thread may build it and this loop use it.
        self._earlier_children = children()
        self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        running = await asyncio.shield(self._loading)
        if self._is_closed:
            raise EngineStartError(f"the engine was closed while it loaded {self._model!r}")
        self._running = running
        try:
            await self._warm_up(running.info)
        except (EngineError, EngineDeadError) as exc:
            await self.close()
            raise EngineStartError(f"vLLM loaded {self._model!r} but can't score with it: {exc}") from exc
        return running.info

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        running = self._running
        if running is None:
            raise EngineDeadError("the engine holds no model: it is not started, or closed")
        with _vllm_errors_translated(running, job):
            flat_logprobs = await self._unless_closed(_prompt_logprobs(running.llm, job))
        vocab_rows = running.info.vocab_rows
        return checked(score_arrays(flat_logprobs, job, vocab_rows=vocab_rows), job, vocab_rows=vocab_rows)

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

    async def _unless_closed(self, request: Coroutine[None, None, FlatLogprobs]) -> FlatLogprobs:
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

    async def _warm_up(self, info: EngineInfo) -> None:
        """Score the shortest sequence: the first request compiles, and starts the listener that notices death."""
        job = ScoreJob(
            request_id="warm-up",
            token_ids=np.zeros(2, dtype=np.int32),
            score_start=1,
            num_logprobs=info.max_num_logprobs,
        )
        await self.score(job)

    def _load(self) -> _Running:
        directory = model_files.locate_model(self._model)
        tokenizer = model_files.tokenizer_manifest(directory)
        weights_digest = model_files.weights_digest(directory)
        dtype = self._dtype_of(directory)
        environment.set_defaults()
        self._folder = environment.EngineFolder()
        try:
            llm = self._build(directory, dtype)
        except Exception as exc:
            self._folder.remove()
            raise EngineStartError(
                f"vLLM can't load model {self._model!r} from {directory}: {exc}; where its process failed, its log "
                "above names the cause. Usual ones: an architecture that this version lacks, or too little memory "
                "(lower max_model_len, kv_cache_bytes or gpu_memory_utilization)"
            ) from exc
        from vllm import __version__

        config = llm.vllm_config.model_config
        vocab_rows = int(config.get_vocab_size())
        info = EngineInfo(
            name="vllm",
            version=str(__version__),
            model_name=model_files.model_name(self._model),
            weights_digest=weights_digest,
            tokenizer=tokenizer,
            vocab_rows=vocab_rows,
            dtype=str(config.dtype).removeprefix("torch."),
            max_model_len=int(config.max_model_len),
            max_request_tokens=int(config.max_model_len) - NUM_GENERATED_TOKENS,
            max_num_logprobs=min(self._max_num_logprobs, vocab_rows),
            capabilities=frozenset(),
        )
        return _Running(llm=llm, processes=EngineProcesses(children() - self._earlier_children), info=info)

    def _dtype_of(self, directory: Path) -> str:
        """The type asked for. vLLM's own `auto` would turn a float32 checkpoint into bfloat16."""
        return model_files.checkpoint_dtype(directory) or "auto" if self._dtype == "auto" else self._dtype

    def _build(self, directory: Path, dtype: str) -> AsyncLLM:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        is_cpu = current_platform.is_cpu()
        enforce_eager = is_cpu if self._enforce_eager is None else self._enforce_eager
        if is_cpu and enforce_eager:
            environment.forbid_compiling()
        arguments = AsyncEngineArgs(
            model=str(directory),
            skip_tokenizer_init=True,  # ids in, ids out
            generation_config="vllm",  # the checkpoint's sampling defaults are no part of scoring
            dtype=dtype,
            max_model_len=self._max_model_len,
            max_logprobs=self._max_num_logprobs,
            seed=self._seed,
            gpu_memory_utilization=self._gpu_memory_utilization,
            kv_cache_memory_bytes=CPU_KV_CACHE_BYTES if is_cpu and not self._kv_cache_bytes else self._kv_cache_bytes,
            tensor_parallel_size=self._tensor_parallel_size,
            distributed_executor_backend=IN_PROCESS_EXECUTOR if is_cpu and self._tensor_parallel_size == 1 else None,
            worker_cls=CPU_WORKER if is_cpu else "auto",
            max_num_batched_tokens=self._max_num_batched_tokens,
            max_num_seqs=self._max_num_seqs,
            enforce_eager=enforce_eager,
            enable_prefix_caching=False,  # vLLM never reads it for prompt logprobs
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        return AsyncLLM.from_engine_args(arguments)


async def _prompt_logprobs(llm: AsyncLLM, job: ScoreJob) -> FlatLogprobs:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        max_tokens=NUM_GENERATED_TOKENS,
        temperature=0.0,
        prompt_logprobs=job.num_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    outputs = llm.generate(tokens_input(job.token_ids.tolist()), sampling, job.request_id)
    # Closing the generator, also by cancellation, aborts the request in the engine.
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if output.prompt_logprobs is not None:
                flat_logprobs: FlatLogprobs = output.prompt_logprobs
                return flat_logprobs
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
