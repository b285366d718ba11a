"""Fixtures of the integration tests: tiny real checkpoints, and an environment that vLLM can't leave changed."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from teacher_service.engine.factory import build_engine
from teacher_service.engine.options import EngineOptions
from tests.support.engines import Started
from tests.support.models import write_checkpoint


@pytest.fixture(scope="session")
def float32_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny float32 model with its tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-float32", dtype=torch.float32)


@pytest.fixture(scope="session")
def bfloat16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny bfloat16 model with its tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-bfloat16", dtype=torch.bfloat16)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reference(float32_checkpoint: Path) -> AsyncIterator[Started]:
    """The transformers engine on the float32 checkpoint."""
    engine = build_engine("transformers", EngineOptions(model=str(float32_checkpoint)))
    yield Started(engine, await engine.start())
    await engine.close()


@pytest.fixture(scope="module")
def restored_environment() -> Iterator[None]:
    """Puts the environment back: vLLM sets variables, such as LD_PRELOAD, that later child processes would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    with warnings.catch_warnings():
        # vLLM never closes its ZeroMQ contexts: collect them here, not under some later test.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def socket_base(restored_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder where vLLM engines of this module keep their sockets: what stays there was left behind."""
    base = tmp_path_factory.mktemp("s")  # short: the path of a unix socket has at most 107 characters
    os.environ["VLLM_RPC_BASE_PATH"] = str(base)
    return base
