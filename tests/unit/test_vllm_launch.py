"""vLLM's engine around the model: memory of every worker, prices of each route, and the model's whole length."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from protos.arrays import ScoreArrays
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm import engine as vllm_engine
from teacher_service.engine.vllm import launch
from teacher_service.engine.vllm.engine import VllmEngine
from teacher_service.engine.vllm.extension import TeacherExtension
from teacher_service.engine.vllm.processes import EngineProcesses
from teacher_service.engine.vllm.routes import FastRoute, FlatRoute
from teacher_service.errors import EngineDeadError, EngineError
from teacher_service.types import Price, ScoreJob


def score_job(num_tokens: int, num_logprobs: int = 0, *, score_start: int = 1) -> ScoreJob:
    return ScoreJob(
        request_id="r",
        token_ids=np.zeros(num_tokens, dtype=np.int32),
        score_start=score_start,
        num_logprobs=num_logprobs,
    )


class Engines:
    """Stands for vLLM's client of several engine processes."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.engine_core = self
        self.llm = self
        self.errored = False
        self.dead_error = "no cause known"
        self.processes = EngineProcesses([])
        self.core_engines = list(answers)
        self._answers = answers
        self.calls: list[tuple[Any, ...]] = []

    async def _call_utility_async(self, *args: Any, engine: str) -> Any:
        self.calls.append(args)
        answer = self._answers[engine]
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await asyncio.Event().wait()
        return answer


async def test_each_worker_of_each_engine_answers() -> None:
    """Two replicas of two workers: the second engine's are there too."""
    engines: Any = Engines({"a": [1, 2], "b": [3, 4]})
    assert await launch.on_every_worker(engines, "free_device_bytes", timeout_s=5) == [1, 2, 3, 4]
    assert engines.calls == [("collective_rpc", "free_device_bytes", 5, (), None)] * 2


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (RuntimeError("no such\n method"), EngineError, "failed in work: RuntimeError: no such method"),
        (None, TimeoutError, "did not finish work within 0 s"),
    ],
)
async def test_a_worker_that_fails_or_hangs_is_an_error(answer: Any, kind: type[Exception], message: str) -> None:
    """Also where it is not the first engine's."""
    engines: Any = Engines({"a": [1], "b": answer})
    with pytest.raises(kind, match=message):
        await launch.on_every_worker(engines, "work", timeout_s=0.05)


async def test_nothing_is_waited_for_in_a_dead_engine() -> None:
    """A process that ends during a call never answers it."""
    engines: Any = Engines({"a": None})
    calling = asyncio.create_task(launch.on_every_worker(engines, "work", timeout_s=1e6))
    await asyncio.sleep(0)
    engines.errored = True
    with pytest.raises(EngineDeadError, match="vLLM's engine is dead: no cause known, during work"):
        await asyncio.wait_for(calling, 60)


def test_what_the_allocator_holds_unused_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 free on the device, 50 taken from it, of which 35 are in use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 35)
    extension = TeacherExtension()
    extension.model_runner = SimpleNamespace(device=torch.device("cuda", 0))
    assert extension.free_device_bytes() == 45
    extension.model_runner = SimpleNamespace(device=torch.device("cpu"))
    assert extension.free_device_bytes() is None


@pytest.mark.parametrize(
    ("max_request_tokens", "max_num_seqs", "lengths"),
    [(4096, 1024, [4096, 4096]), (100_000, 1024, [8192]), (5000, 1024, [5000]), (16, 20, [16] * 20)],
)
async def test_memory_is_measured_after_a_step_of_the_largest_size(
    monkeypatch: pytest.MonkeyPatch, max_request_tokens: int, max_num_seqs: int, lengths: list[int]
) -> None:
    """All rows of the step are scored before; the worker with least memory counts."""
    scored: list[ScoreJob] = []

    async def score(self: VllmEngine, running: Any, job: ScoreJob) -> ScoreArrays:
        scored.append(job)
        return ScoreArrays(sampled_logprobs=np.zeros(job.num_scored, dtype=np.float32))

    monkeypatch.setattr(VllmEngine, "_score", score)
    monkeypatch.setattr(vllm_engine, "_device_type", lambda: "cuda")
    engines: Any = Engines({"a": [7_000, 5_000], "b": [None, 6_000]})
    engines.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=max_num_seqs)
    )
    info = SimpleNamespace(max_request_tokens=max_request_tokens, max_num_logprobs=8)
    engines.info = info
    running: Any = engines
    assert await VllmEngine(EngineOptions(model="m"))._measure(running) == 5_000
    assert [job.num_tokens for job in scored] == lengths
    assert {job.score_start for job in scored} == {1}


@pytest.mark.parametrize(
    ("text_config", "places"),
    [
        ({"model_type": "qwen3"}, 33),
        ({"model_type": "gpt2", "rope_scaling": None}, 33),
        ({"model_type": "qwen2", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 33),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, 32),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, 32),
        ({"model_type": "llama4_text"}, 32),
    ],
)
def test_the_generated_token_has_a_place_behind_the_models_last(text_config: dict[str, Any], places: int) -> None:
    """Unless the model computes otherwise from a certain length on."""
    model_config = SimpleNamespace(max_model_len=32, hf_text_config=SimpleNamespace(**text_config))
    assert launch.make_room(SimpleNamespace(model_config=model_config)) == places - 32  # type: ignore[arg-type]
    assert model_config.max_model_len == places


def test_each_route_has_prices_of_its_own() -> None:
    """At V = 1,000 and K = 3: V1 makes a sequence's logits at once, V2 1,024 rows of a step, ours a fixed block."""
    job = score_job(10, 3)
    assert FlatRoute(1_000, step_tokens=8, chunk_rows=None).price(job) == Price(
        held_bytes=400 * 10 + 220 * 10 * 6, peak_bytes=12 * 1_000 * 8
    )
    assert FlatRoute(1_000, step_tokens=8_192, chunk_rows=1_024).price(job) == Price(
        held_bytes=400 * 10 + 220 * 10 * 6,
        peak_bytes=12 * 1_000 * 1_024 + 12 * 4 * 8_192,
        held_device_bytes=12 * 4 * 10,
    )
    assert FastRoute(scratch_bytes=77).price(job) == Price(
        held_bytes=400 * 10 + 64 * 9 * 6, peak_bytes=77, held_device_bytes=8 * 9 * 6
    )
