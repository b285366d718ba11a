"""The analytic teacher as the command line starts it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from teacher_service.engine.factory import EngineName, build_engine
from teacher_service.engine.options import EngineOptions
from teacher_service.errors import EngineStartError
from teacher_service.types import ScoreJob


@pytest.mark.parametrize(("model", "name"), [(None, "fake"), ("checkpoints/first", "first"), ("org/second", "second")])
async def test_the_fake_engine_takes_the_model_for_its_name(model: str | None, name: str) -> None:
    """So that two of them can be two teachers."""
    info = await build_engine("fake", EngineOptions(model=model)).start()
    assert info.model_name == name


async def test_the_fake_engine_takes_as_long_as_it_is_told() -> None:
    """For each sequence."""
    engine = build_engine("fake", EngineOptions(fake_latency_s=0.05))
    await engine.start()
    started_s = time.monotonic()
    await engine.score(ScoreJob(request_id="a", token_ids=np.arange(4, dtype=np.int32), score_start=1, num_logprobs=0))
    assert time.monotonic() - started_s >= 0.05


@pytest.mark.parametrize("name", ["transformers", "fake"])
def test_an_adapter_is_refused_where_it_would_be_ignored(name: EngineName) -> None:
    """Only vLLM applies it: the others would answer as the base model."""
    with pytest.raises(EngineStartError, match=rf"'{name}' can't apply the LoRA adapter a/b; take --engine vllm, or"):
        build_engine(name, EngineOptions(model="m", lora="a/b"))
