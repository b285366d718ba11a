"""Teachers with a LoRA adapter, loaded for real: equal to the merged model, or refused where they would not be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from teacher_service.engine.vllm.adapter import PATTERNS_SINCE
from teacher_service.errors import EngineStartError
from tests.integration import test_engines
from tests.integration.test_engine_options import TOLERANCE, largest_error, started
from tests.support.engines import Started
from tests.support.variants import write_adapter, write_merged

pytestmark = test_engines.pytestmark  # whatever starts vLLM needs the same


@asynccontextmanager
async def oracle(model: Path) -> AsyncIterator[Started]:
    """Plain transformers."""
    engine = build_engine("transformers", EngineOptions(model=str(model)))
    try:
        yield Started(engine, await engine.start())
    finally:
        await engine.close()


async def check_equals_merged(base: Path, adapter: Path, *, tensor_parallel_size: int = 1) -> None:
    """The adapted teacher answers as the merged model, unlike the base model, and says that it is another."""
    merged = write_merged(base, adapter, adapter.parent / "merged")
    async with (
        oracle(merged) as theirs,
        oracle(base) as plain,
        started(base, lora=str(adapter), tensor_parallel_size=tensor_parallel_size) as engine,
    ):
        assert await largest_error(engine, theirs) <= TOLERANCE
        assert await largest_error(engine, plain) > 1
        assert engine.info.weights_digest != plain.info.weights_digest


async def test_an_adapter_of_any_rank_equals_the_merged_model(float32_checkpoint: Path, tmp_path: Path) -> None:
    """24 is none of vLLM's ranks; the scale is the rank-stabilised one."""
    adapter = write_adapter(float32_checkpoint, tmp_path / "adapter", r=24, use_rslora=True)
    await check_equals_merged(float32_checkpoint, adapter)


async def test_a_spread_adapter_equals_the_merged_model(float32_checkpoint: Path, tmp_path: Path) -> None:
    """Each layer over two processes, the embedding among them."""
    adapter = write_adapter(float32_checkpoint, tmp_path / "adapter", embedding=True)
    await check_equals_merged(float32_checkpoint, adapter, tensor_parallel_size=2)


async def test_mixed_ranks_equal_the_merged_model(float32_checkpoint: Path, tmp_path: Path) -> None:
    """Ranks and scales by module, packed layers among them: where this vLLM reads them, else the start is refused."""
    adapter = write_adapter(
        float32_checkpoint, tmp_path / "adapter", rank_pattern={"v_proj": 24}, alpha_pattern={"down_proj": 4}
    )
    from vllm import __version__

    if tuple(map(int, __version__.split(".")[:2])) >= PATTERNS_SINCE:
        await check_equals_merged(float32_checkpoint, adapter)
        return
    with pytest.raises(EngineStartError, match="ranks or scales of their own"):
        async with started(float32_checkpoint, lora=str(adapter)):
            pass


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (
            {"prefix": "base_model.model.model.language_model."},
            r"the model has no layer .*language_model\.model\.layers",
        ),
        ({"trained": False}, r"has no effect: .* are the same with and without it"),
    ],
)
async def test_an_adapter_without_effect_is_refused(
    float32_checkpoint: Path, tmp_path: Path, variant: dict[str, Any], reason: str
) -> None:
    """vLLM loads it without a word, and the base model would answer under another digest."""
    adapter = write_adapter(float32_checkpoint, tmp_path / "adapter", **variant)
    with pytest.raises(EngineStartError, match=reason):
        async with started(float32_checkpoint, lora=str(adapter)):
            pass
