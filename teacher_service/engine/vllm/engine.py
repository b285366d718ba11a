"""vLLM's `AsyncLLM`, in process: by the fast route where it fits this vLLM, else by public prompt logprobs.

vLLM has no call that only scores: a request also generates one token. The public route's prompt logprobs are those of
temperature 1, whatever the request says.

The fast route never keeps the service from starting. What it relies on is checked before vLLM gets any class of it.
What fails later, up to the first scored sequence, leads to the public route and to one warning with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import numpy as np

from protos.arrays import ScoreArrays
from teacher_service.engine.numerics import checked
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm import environment, launch
from teacher_service.engine.vllm.adapter import MERGE, Adapter, AdapterError, check_effect, check_placed
from teacher_service.engine.vllm.fast import frontend, probe, self_check
from teacher_service.engine.vllm.launch import (
    DEATH_POLL_S,
    Checkpoint,
    Running,
    cause_of_death,
    in_words,
    on_every_worker,
)
from teacher_service.engine.vllm.processes import EngineProcesses, children
from teacher_service.engine.vllm.routes import NUM_GENERATED_TOKENS, FastRoute
from teacher_service.errors import EngineDeadError, EngineError, EngineStartError
from teacher_service.types import EngineInfo, Price, ScoreJob

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from teacher_service.engine.vllm.fast.worker import Installed

SHUTDOWN_TIMEOUT_S = 15.0
"""Seconds that vLLM's processes may take to end by themselves."""
FIRST_SCORES_TIMEOUT_S = {True: 300.0, False: 1800.0}
"""Seconds between a loaded model and its readiness, by whether it is tried by the fast route: kernels are compiled and
compared, and a full step is scored. The fast route's are few, so that a start by the public route may still follow
before a supervisor gives the process up."""


class VllmEngine:
    """One vLLM engine. By the fast route all capabilities; else top-k and sampled logprobs at temperature 1."""

    def __init__(self, options: EngineOptions) -> None:
        """An engine that loads nothing yet."""
        self._options = options
        self._folder: environment.EngineFolder | None = None
        self._loading: asyncio.Task[Running] | None = None
        self._earlier_children = frozenset[BaseProcess]()
        self._is_closed = False
        self._running: Running | None = None
        self._in_flight: set[asyncio.Task[ScoreArrays]] = set()

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        self._earlier_children = children()
        await asyncio.to_thread(launch.import_vllm)
        checkpoint = await asyncio.to_thread(launch.read_checkpoint, self._options)
        reason = await asyncio.to_thread(probe.refusal) if self._options.fast_route else None
        if self._options.fast_route and reason is None:
            try:
                await self._launch(checkpoint, fast=True)
            except AdapterError as exc:
                await self._end()
                raise EngineStartError(str(exc)) from exc
            except Exception as exc:
                if self._is_closed:
                    raise
                reason = f"the fast route failed at its start: {in_words(exc)}"
                await self._end()
        if self._running is None:
            await self._launch_public(checkpoint)
        return self._explain(reason)

    def price(self, job: ScoreJob) -> Price:
        """See `Engine.price`."""
        if self._running is None:
            return Price(held_bytes=0)
        price = self._running.route.price(job)
        if self._running.info.device_free_bytes is not None:
            return price
        # in main memory each process has its own peak, and all may have it at once
        num_ranks = self._options.tensor_parallel_size
        return replace(
            price,
            peak_bytes=num_ranks * self._options.data_parallel_size * price.peak_bytes,
            held_device_bytes=num_ranks * price.held_device_bytes,
        )

    async def score(self, job: ScoreJob) -> ScoreArrays:
        """See `Engine.score`."""
        running = self._running
        if running is None:
            raise EngineDeadError("the engine holds no model: it is not started, or closed")
        return await self._score(running, job)

    async def wait_dead(self) -> BaseException:
        """See `Engine.wait_dead`."""
        while True:
            # vLLM notices by itself when its process ends or reports a fatal error, but has nothing to await.
            if self._running is not None and self._running.llm.errored:
                return EngineDeadError(cause_of_death(self._running))
            await asyncio.sleep(DEATH_POLL_S)

    async def close(self) -> None:
        """See `Engine.close`."""
        self._is_closed = True
        await self._end()

    async def _end(self) -> None:
        """Free what is loaded, or being loaded, with its processes and its memory."""
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

    async def _score(self, running: Running, job: ScoreJob) -> ScoreArrays:
        with _vllm_errors_translated(running, job):
            return await self._unless_closed(_score(running, job))

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

    async def _abandon(self, loading: asyncio.Task[Running]) -> Running | None:
        """End a load that nobody waits for any more; what it has built, if it got so far."""
        while not loading.done():
            # The thread can't be stopped, but it fails at once when the process it waits for is gone.
            await asyncio.to_thread(EngineProcesses(children() - self._earlier_children).reap, timeout_s=0)
            await asyncio.wait({loading}, timeout=DEATH_POLL_S)
        return None if loading.cancelled() or loading.exception() else loading.result()

    async def _launch_public(self, checkpoint: Checkpoint) -> None:
        try:
            await self._launch(checkpoint, fast=False)
        except AdapterError as exc:
            await self._end()
            raise EngineStartError(str(exc)) from exc
        except (EngineError, EngineDeadError, TimeoutError) as exc:
            await self._end()
            raise EngineStartError(f"vLLM loaded {self._options.model!r} but can't score with it: {exc}") from exc

    async def _launch(self, checkpoint: Checkpoint, *, fast: bool) -> None:
        """Load the model, take a route, score first sequences, and measure the memory that is left.

        Raises:
            Exception: anything that vLLM or the fast route raises.
        """
        config = await asyncio.to_thread(launch.configure, self._options, checkpoint, fast=fast)
        # Loading blocks for seconds to minutes. AsyncLLM binds to the loop of its first request, not to the thread
        # that builds it, so a thread may build it and this loop use it.
        self._loading = asyncio.create_task(asyncio.to_thread(self._load, checkpoint, config))
        running = await asyncio.shield(self._loading)
        if self._is_closed:
            raise EngineStartError(f"the engine was closed while it loaded {self._options.model!r}")
        self._running = running
        scope = asyncio.timeout(FIRST_SCORES_TIMEOUT_S[fast])
        try:
            async with scope:
                self._running = await self._prepare(running, fast=fast)
        except TimeoutError as exc:
            if not scope.expired():
                raise
            limit_s = FIRST_SCORES_TIMEOUT_S[fast]
            raise TimeoutError(f"vLLM did not score its first sequences within {limit_s:.0f} s") from exc

    async def _prepare(self, running: Running, *, fast: bool) -> Running:
        if running.adapter is not None:
            await _load_adapter(running, running.adapter)
        if fast:
            running = await self._take_fast_route(running)
        await self._warm_up(running)
        if running.adapter is not None:
            job = self_check.make_job(running.info)
            base = await self._score(replace(running, adapter=None), job)
            check_effect(await self._score(running, job), base, running.adapter)
        return replace(running, info=replace(running.info, device_free_bytes=await self._measure(running)))

    async def _take_fast_route(self, running: Running) -> Running:
        """With the fast route, if it scores a sequence as the public one does; else as it was, with the reason.

        Raises:
            EngineDeadError: vLLM died of it.
        """
        job = self_check.make_job(running.info)
        try:
            frontend.install()
            installed = await on_every_worker(running, "install_scoring", timeout_s=launch.INSTALL_TIMEOUT_S)
            fast = _by_fast_route(running, installed)
            public, ours = await self._score(running, job), await self._score(fast, job)
            self_check.compare(ours, public, dtype=running.info.dtype)
        except (probe.ProbeError, EngineError) as exc:
            return replace(running, info=replace(running.info, route_reason=str(exc)))
        return fast

    async def _warm_up(self, running: Running) -> None:
        """Score the shortest sequence: the first request compiles, and starts the listener that notices death."""
        job = ScoreJob(
            request_id="warm-up",
            token_ids=np.zeros(2, dtype=np.int32),
            score_start=1,
            num_logprobs=running.info.max_num_logprobs,
        )
        # so that broken weights stop the start
        checked(await self._score(running, job), job, vocab_rows=running.info.vocab_rows)

    def _explain(self, reason: str | None) -> EngineInfo:
        """What a loaded engine is, with the reason and a warning where it is not on the fast route.

        Args:
            reason: why the fast route was not even tried; None: it was, or is switched off.
        """
        running = self._running
        assert running is not None  # noqa: S101 - an invariant
        reason = reason or running.info.route_reason
        info = running.info
        if reason is not None:
            warning = (
                "scoring by vLLM's public route, several times slower and without temperature, entropy and candidates: "
                f"{reason}"
            )
            info = replace(info, route_reason=reason, warnings=(*info.warnings, warning))
        self._running = replace(running, info=info)
        return info

    async def _measure(self, running: Running) -> int | None:
        """Device memory left for scoring, of the worker that has least; None: vLLM computes in main memory."""
        if _device_type() == "cpu":
            return None
        info, config = running.info, running.llm.vllm_config.scheduler_config
        length = min(info.max_request_tokens, config.max_num_batched_tokens)
        full_step = [
            ScoreJob(
                request_id=f"full-step-{number}",
                token_ids=np.zeros(length, dtype=np.int32),
                score_start=1,
                num_logprobs=min(1, info.max_num_logprobs),
            )
            for number in range(min(config.max_num_seqs, config.max_num_batched_tokens // length))
        ]
        # vLLM's allocator then holds what a step of the largest size takes
        await asyncio.gather(*(self._score(running, job) for job in full_step))
        left = await on_every_worker(running, "free_device_bytes")
        return min((one for one in left if one is not None), default=None)

    def _load(self, checkpoint: Checkpoint, config: VllmConfig) -> Running:
        self._folder = environment.EngineFolder()
        try:
            return launch.load(self._options, checkpoint, config, earlier_children=self._earlier_children)
        except EngineStartError:
            self._folder.remove()
            raise


async def _load_adapter(running: Running, adapter: Adapter) -> None:
    """Load it before the first request: a failure there would end vLLM's process.

    Raises:
        AdapterError: vLLM refuses it, or would leave out a part of it.
    """
    await on_every_worker(running, "detach_adapter_from_logits")
    try:
        await running.llm.add_lora(adapter.request())
    except Exception as exc:
        raise AdapterError(f"vLLM can't load the LoRA adapter {adapter.folder}: {in_words(exc)}; {MERGE}") from exc
    check_placed(await on_every_worker(running, "adapter_placement"), adapter)


def _by_fast_route(running: Running, installed: Sequence[Installed]) -> Running:
    route = FastRoute(max(one["scratch_bytes"] for one in installed))
    notes = dict.fromkeys(note for one in installed for note in one["notes"])
    info = replace(running.info, route=route.name, capabilities=route.capabilities, warnings=tuple(notes))
    return replace(running, route=route, info=info)


def _device_type() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


async def _score(running: Running, job: ScoreJob) -> ScoreArrays:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        max_tokens=NUM_GENERATED_TOKENS,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **running.route.sampling(job),
    )
    adapter = None if running.adapter is None else running.adapter.request()
    outputs = running.llm.generate(tokens_input(job.token_ids.tolist()), sampling, job.request_id, lora_request=adapter)
    # Closing the generator, also by cancellation, aborts the request in the engine.
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if output.prompt_logprobs is not None:
                return running.route.score_arrays(output.prompt_logprobs, job)
    raise EngineError("vLLM answered without prompt logprobs; report this as a bug")


@contextlib.contextmanager
def _vllm_errors_translated(running: Running, job: ScoreJob) -> Iterator[None]:
    from vllm.exceptions import VLLMError
    from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

    try:
        yield
    except VllmEngineDeadError as exc:
        raise EngineDeadError(cause_of_death(running)) from exc
    except VLLMError as exc:
        raise EngineError(f"vLLM failed on {job.num_tokens} tokens with {job.num_logprobs} logprobs: {exc}") from exc
