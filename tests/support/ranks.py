"""A module of the tests run as several ranks of torch.distributed over gloo."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path
from typing import Any

import torch

TIMEOUT_S = 240.0
ROOT = Path(__file__).parents[2]
ISOLATED = Path(sys.prefix) / "isolated"
"""Where set-up puts Megatron's core and Triton: in no other process's way."""


async def run_ranks(module: str, *arguments: str, folder: Path, world_size: int, isolated: bool = False) -> Any:
    """Start `python -m module ARGUMENTS OUTPUT` once per rank; returns what rank 0 saved at OUTPUT by torch.

    RANK, WORLD_SIZE and DIST_INIT_METHOD are in each one's environment; what is isolated can be imported if asked for.
    """
    output = folder / f"{world_size}.pt"
    environment = os.environ | {
        "WORLD_SIZE": f"{world_size}",
        "DIST_INIT_METHOD": f"file://{folder}/rendezvous-{world_size}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ISOLATED}" if isolated else f"{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", module, *arguments, f"{output}"]
    ranks = [
        await asyncio.create_subprocess_exec(
            *command, stdout=PIPE, stderr=STDOUT, cwd=folder, env=environment | {"RANK": f"{rank}"}
        )
        for rank in range(world_size)
    ]
    try:
        said = await asyncio.wait_for(asyncio.gather(*(one.communicate() for one in ranks)), TIMEOUT_S)
    finally:
        for one in ranks:
            if one.returncode is None:
                one.kill()
                await one.wait()
    for one, (text, _) in zip(ranks, said, strict=True):
        assert one.returncode == 0, text.decode()[-3000:]
    return torch.load(output)
