"""The ways to a teacher's logprobs that `benchmarks.teacher` compares, and what each run of one costs.

Each way is asked the same: token ids in, arrays of the response rows' top-k out, decoded by the caller.

Legend: N tokens of a sequence, S response tokens, K top-k entries.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import psutil

from benchmarks.teacher_bound import FORMS
from benchmarks.teacher_meter import Answer, Batch, Processes, Sample, ScoringPath, TeacherBenchmarkError, cpu_s
from examples.sort_digits.processes import ManagedProcess, ProcessSupervisor
from examples.sort_digits.readiness import check_running, wait_for_own_teacher
from protos.arrays import Int32Array, ScoreArrays
from protos.codec import WireDtype, scores_from_pb, wire_dtype_to_pb
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm.arguments import CPU_BLOCK_TOKENS, CPU_WORKER, IN_PROCESS_EXECUTOR
from teacher_service.engine.vllm.launch import import_vllm
from teacher_service.engine.vllm.processes import EngineProcesses, children
from teacher_service.types import ScoreJob

MAX_LEN = 2048
MAX_NUM_LOGPROBS = 256
MAX_NUM_BATCHED_TOKENS = 2048
MAX_NUM_SEQS = 64
KV_CACHE_BYTES = 512 << 20
"""Holds every sequence of a step, several times over: a token takes 4 KB."""
SERVED_MODEL = "teacher"
START_TIMEOUT_S = 240.0
ANSWER_TIMEOUT_S = 600.0
STOP_GRACE_S = 25.0
IDLE_S = 1.0
MAX_IDLE_CPU_SHARE = 0.1
"""Of a core, for one engine that waits."""
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
PROTOBUF = {"Content-Type": "application/x-protobuf"}
CALIBRATION_ROWS = 384
PATHS = ("floor", "math_bound", "in_process", "grpc", "grpc_float16", "http", "openai", "token_endpoint", "flat")
SERVED = ("grpc", "grpc_float16", "http")
VLLM_SERVED = {"openai": "/v1/completions", "token_endpoint": "/inference/v1/generate"}


@dataclass(kw_only=True, slots=True)
class Floor:
    """vLLM that computes the hidden states of all tokens, and scores nothing."""

    llm: Any
    processes: Processes
    _num_asked: int = 0
    _forms: dict[int, int] = field(default_factory=dict)

    async def ask(self, token_ids: Int32Array, _score_start: int, _num_logprobs: int) -> Answer:
        """Generate one token."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self._num_asked += 1
        async for _ in self.llm.generate(tokens_input(token_ids.tolist()), sampling, f"floor-{self._num_asked}"):
            pass
        return Answer(scores=None)

    async def run_bound(self, batch: Batch, floor: Sample) -> Sample:
        """What was measured as the floor, and what no scoring of these rows can do without, by its fastest form."""
        form = await self._fastest_form(batch.num_logprobs)
        engine_s = self.processes.engine_cpu_s()
        seconds = await self._time_bound(batch.num_scored, batch.num_logprobs, form)
        return Sample(
            seconds=floor.seconds + seconds,
            num_tokens=batch.num_tokens,
            num_scored=batch.num_scored,
            engine_cpu_s=floor.engine_cpu_s + self.processes.engine_cpu_s() - engine_s,
        )

    async def _fastest_form(self, num_logprobs: int) -> int:
        if num_logprobs not in self._forms:
            times = []
            for form in range(len(FORMS)):
                tries = [await self._time_bound(CALIBRATION_ROWS, num_logprobs, form) for _ in range(3)]
                times.append(min(tries))
            self._forms[num_logprobs] = int(np.argmin(times))
        return self._forms[num_logprobs]

    def form_in_words(self, num_logprobs: int) -> str:
        """The form that counted."""
        return str(FORMS[self._forms[num_logprobs]])

    async def _time_bound(self, num_rows: int, num_logprobs: int, form: int) -> float:
        arguments = (num_rows, num_logprobs, form)
        (seconds,) = await self.llm.collective_rpc("time_bound", timeout=ANSWER_TIMEOUT_S, args=arguments)
        return float(seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paths:
    """All that were started, for one model."""

    floor: Floor
    scoring: Mapping[str, ScoringPath]
    """The floor among them, the bound not."""

    async def check_idle(self) -> None:
        """Look that no engine takes the processor from the one that is measured.

        Raises:
            TeacherBenchmarkError: one does, though it has nothing to do.
        """
        pids = {name: path.processes.engine for name, path in self.scoring.items()}
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        await asyncio.sleep(IDLE_S)
        for name, pid in pids.items():
            if (share := (cpu_s(pid) - before[name]) / IDLE_S) > MAX_IDLE_CPU_SHARE:
                raise TeacherBenchmarkError(
                    f"the idle engine behind {name} (pid {pid}) takes {share:.0%} of a core, "
                    f"{MAX_IDLE_CPU_SHARE:.0%} allowed: it would slow the others down"
                )


@asynccontextmanager
async def started_paths(
    checkpoint: Path, names: Sequence[str], supervisor: ProcessSupervisor, *, dtype: str
) -> AsyncIterator[Paths]:
    """Start what the named paths need, all at once; at the end it is closed.

    Raises:
        DemoError, TeacherBenchmarkError: a process did not start; the message names its log.
    """
    async with AsyncExitStack() as stack:
        service = server = None
        run = f"{checkpoint.name}"
        port_file = supervisor.temp_dir / f"{run}.json"
        if set(names) & set(SERVED):
            service = supervisor.start(
                f"service-{run}", _service_command(checkpoint, dtype, port_file), grace_s=STOP_GRACE_S
            )
            stack.callback(supervisor.stop, service)
        port = _free_port()
        if set(names) & set(VLLM_SERVED):
            server = supervisor.start(f"vllm-{run}", _vllm_command(checkpoint, dtype, port), grace_s=STOP_GRACE_S)
            stack.callback(supervisor.stop, server)
        floor = await stack.enter_async_context(_floor(checkpoint, dtype))
        paths = {"floor": ScoringPath(name="floor", processes=floor.processes, ask=floor.ask)}
        for name, fast_route in (("in_process", True), ("flat", False)):
            if name in names:
                paths[name] = await stack.enter_async_context(_engine(name, checkpoint, dtype, fast_route=fast_route))
        if service is not None:
            paths |= await _service_paths(service, port_file, supervisor, stack)
        if server is not None:
            paths |= await _vllm_paths(server, port, supervisor, stack)
        yield Paths(floor=floor, scoring={name: paths[name] for name in PATHS if name in {*names, "floor"} & {*paths}})


@asynccontextmanager
async def _floor(checkpoint: Path, dtype: str) -> AsyncIterator[Floor]:
    await asyncio.to_thread(import_vllm)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=dtype,
        max_model_len=MAX_LEN,
        block_size=CPU_BLOCK_TOKENS,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        distributed_executor_backend=IN_PROCESS_EXECUTOR,
        worker_cls=CPU_WORKER,
        worker_extension_cls="benchmarks.teacher_bound.BoundExtension",
        enforce_eager=True,
        enable_prefix_caching=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    earlier = children()
    llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
    processes = EngineProcesses(children() - earlier)
    try:
        yield Floor(llm=llm, processes=_own_processes(_pid_of_new_child(earlier)))
    finally:
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # else it logs the end of its process as a failure
        await asyncio.to_thread(llm.shutdown, timeout=STOP_GRACE_S)
        await asyncio.to_thread(processes.reap, timeout_s=STOP_GRACE_S)


@asynccontextmanager
async def _engine(name: str, checkpoint: Path, dtype: str, *, fast_route: bool) -> AsyncIterator[ScoringPath]:
    options = EngineOptions(
        model=str(checkpoint),
        dtype=dtype,
        max_model_len=MAX_LEN,
        max_num_logprobs=MAX_NUM_LOGPROBS,
        kv_cache_bytes=KV_CACHE_BYTES,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        enforce_eager=True,
        fast_route=fast_route,
    )
    engine, earlier, num_asked = build_engine("vllm", options), children(), 0

    async def ask(token_ids: Int32Array, score_start: int, num_logprobs: int) -> Answer:
        nonlocal num_asked
        num_asked += 1
        job = ScoreJob(
            request_id=f"{name}-{num_asked}", token_ids=token_ids, score_start=score_start, num_logprobs=num_logprobs
        )
        return Answer(scores=await engine.score(job))

    try:
        engine_info = await asyncio.wait_for(engine.start(), START_TIMEOUT_S)
        if fast_route and engine_info.warnings:
            raise TeacherBenchmarkError(f"{name}: {'; '.join(engine_info.warnings)}")
        yield ScoringPath(name=name, processes=_own_processes(_pid_of_new_child(earlier)), ask=ask)
    finally:
        await engine.close()


def _own_processes(engine: int) -> Processes:
    return Processes(engine, [os.getpid()], are_served=False)


def _pid_of_new_child(earlier: frozenset[Any]) -> int:
    (child,) = children() - earlier
    if child.pid is None:
        raise TeacherBenchmarkError("vLLM's engine process has no pid: it did not start")
    return child.pid


def _service_command(checkpoint: Path, dtype: str, port_file: Path) -> list[str]:
    flags = {
        "--model": checkpoint,
        "--engine": "vllm",
        "--dtype": dtype,
        "--max-model-len": MAX_LEN,
        "--max-num-logprobs": MAX_NUM_LOGPROBS,
        "--kv-cache-bytes": KV_CACHE_BYTES,
        "--max-num-batched-tokens": MAX_NUM_BATCHED_TOKENS,
        "--max-num-seqs": MAX_NUM_SEQS,
        "--grpc-port": 0,
        "--http-port": 0,
        "--port-file": port_file,
    }
    pairs = [text for name, value in flags.items() for text in (name, f"{value}")]
    return [sys.executable, "-m", "teacher_service", "serve", "--fast-route", "--enforce-eager", *pairs]


def _vllm_command(checkpoint: Path, dtype: str, port: int) -> list[str]:
    flags = {
        "--model": checkpoint,
        "--served-model-name": SERVED_MODEL,
        "--generation-config": "vllm",
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": dtype,
        "--max-model-len": MAX_LEN,
        "--max-logprobs": MAX_NUM_LOGPROBS,
        "--block-size": CPU_BLOCK_TOKENS,
        "--kv-cache-memory-bytes": KV_CACHE_BYTES,
        "--max-num-batched-tokens": MAX_NUM_BATCHED_TOKENS,
        "--max-num-seqs": MAX_NUM_SEQS,
        "--distributed-executor-backend": IN_PROCESS_EXECUTOR,
        "--worker-cls": CPU_WORKER,
        "--uvicorn-log-level": "warning",
    }
    pairs = [text for name, value in flags.items() for text in (name, f"{value}")]
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--disable-log-stats", *pairs
    ]  # fmt: skip


async def _service_paths(
    service: ManagedProcess, port_file: Path, supervisor: ProcessSupervisor, stack: AsyncExitStack
) -> dict[str, ScoringPath]:
    endpoint = await asyncio.to_thread(wait_for_own_teacher, service, port_file, supervisor, timeout_s=START_TIMEOUT_S)
    if "public route" in await asyncio.to_thread(service.log_path.read_text, errors="replace"):
        raise TeacherBenchmarkError(f"the service does not take the fast route; {service.last_words()}")
    processes, addresses = _served_processes(service), json.loads(await asyncio.to_thread(port_file.read_text))
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(endpoint, options=UNLIMITED))
    client = await stack.enter_async_context(_http_client(f"http://{addresses['http']}"))
    call: Any = channel.unary_unary("/teacher.v1.TeacherService/Score", None, None)  # bytes, so that they are counted

    async def ask_grpc(
        token_ids: Int32Array, score_start: int, num_logprobs: int, wire_dtype: WireDtype = WireDtype.FLOAT32
    ) -> Answer:
        payload = _request(token_ids, score_start, num_logprobs, wire_dtype)
        answer = await call(payload, timeout=ANSWER_TIMEOUT_S)
        return _answer(answer, len(token_ids) - score_start, num_logprobs)

    async def ask_http(token_ids: Int32Array, score_start: int, num_logprobs: int) -> Answer:
        payload = _request(token_ids, score_start, num_logprobs)
        response = await client.post("/v1/score", content=payload, headers=PROTOBUF)
        return _answer(_checked(response), len(token_ids) - score_start, num_logprobs)

    return {
        "grpc": ScoringPath(name="grpc", processes=processes, ask=ask_grpc),
        "grpc_float16": ScoringPath(
            name="grpc_float16", processes=processes, ask=functools.partial(ask_grpc, wire_dtype=WireDtype.FLOAT16)
        ),
        "http": ScoringPath(name="http", processes=processes, ask=ask_http),
    }


def _request(
    token_ids: Int32Array, score_start: int, num_logprobs: int, wire_dtype: WireDtype = WireDtype.FLOAT32
) -> bytes:
    message = pb.ScoreRequest(
        token_ids=token_ids.tolist(),
        score_start=score_start,
        num_logprobs=num_logprobs,
        wire_dtype=wire_dtype_to_pb(wire_dtype),
    )
    return message.SerializeToString()


def _answer(payload: bytes, num_scored: int, num_logprobs: int) -> Answer:
    message = pb.ScoreResponse.FromString(payload)
    scores = scores_from_pb(message, num_scored=num_scored, num_logprobs=num_logprobs, vocab_rows=None)
    return Answer(scores=scores, payload_bytes=len(payload))


async def _vllm_paths(
    server: ManagedProcess, port: int, supervisor: ProcessSupervisor, stack: AsyncExitStack
) -> dict[str, ScoringPath]:
    client = await stack.enter_async_context(_http_client(f"http://127.0.0.1:{port}"))
    deadline = time.monotonic() + START_TIMEOUT_S
    while not await _answers(client, "/health"):
        check_running(server)
        if time.monotonic() > deadline:
            raise TeacherBenchmarkError(
                f"vLLM's server is not ready after {START_TIMEOUT_S:.0f} s; {server.last_words()}"
            )
        await asyncio.to_thread(supervisor.pause, 0.2)
    processes = _served_processes(server)

    def ask_of(name: str, url: str) -> ScoringPath:
        async def ask(token_ids: Int32Array, score_start: int, num_logprobs: int) -> Answer:
            response = await client.post(url, json=vllm_body(name, token_ids, num_logprobs))
            payload = _checked(response)
            document = json.loads(payload)
            rows = (document["choices"][0] if name == "openai" else document)["prompt_logprobs"]
            scores = arrays_of_rows(rows[score_start:], token_ids[score_start:], num_logprobs)
            return Answer(scores=scores, payload_bytes=len(payload))

        return ScoringPath(name=name, processes=processes, ask=ask)

    known = (await client.get("/openapi.json")).json()["paths"]
    return {name: ask_of(name, url) for name, url in VLLM_SERVED.items() if url in known}


def vllm_body(name: str, token_ids: Int32Array, num_logprobs: int) -> dict[str, Any]:
    """The request of one of vLLM's own endpoints."""
    sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": num_logprobs}
    if name == "openai":
        return {"model": SERVED_MODEL, "prompt": token_ids.tolist()} | sampling
    return {"token_ids": token_ids.tolist(), "sampling_params": sampling | {"detokenize": False}}


def arrays_of_rows(rows: Sequence[Mapping[str, Any]], token_ids: Int32Array, num_logprobs: int) -> ScoreArrays:
    """vLLM's JSON rows, one object by token id each, as arrays; the tail is one minus the sum, as of any top-k."""
    shape = (len(rows), num_logprobs)
    ids, logprobs = np.full(shape, -1, np.int32), np.full(shape, np.nan, np.float32)
    sampled = np.array([row[f"{token}"]["logprob"] for row, token in zip(rows, token_ids, strict=True)], np.float32)
    for i, row in enumerate(rows):
        for token, entry in row.items():
            rank = entry["rank"]
            if rank <= num_logprobs:  # else it is the sampled one
                ids[i, rank - 1], logprobs[i, rank - 1] = int(token), entry["logprob"]
    with np.errstate(divide="ignore"):
        tail = np.log1p(-np.exp(logprobs).sum(1).clip(max=1)).astype(np.float32)
    return ScoreArrays(sampled_logprobs=sampled, topk_token_ids=ids, topk_logprobs=logprobs, log_tail_mass=tail)


def _served_processes(root: ManagedProcess) -> Processes:
    """A server's: of its descendants, the one that holds most memory is the engine."""
    top = psutil.Process(root.popen.pid)
    below = top.children(recursive=True)
    engine = max(below, key=lambda one: one.memory_info().rss)
    return Processes(engine.pid, [one.pid for one in (top, *below) if one.pid != engine.pid], are_served=True)


def _http_client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, limits=limits, trust_env=False)


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get(url, timeout=2.0)).is_success
    return False


def _checked(response: httpx.Response) -> bytes:
    if not response.is_success:
        raise TeacherBenchmarkError(f"{response.url} answered {response.status_code}: {response.text[:300]}")
    return response.content


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
