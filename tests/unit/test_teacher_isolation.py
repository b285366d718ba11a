"""The client needs gRPC, numpy, protobuf, tenacity and structlog, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

_BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"verl", "ray", "torch", "vllm", "transformers", "tensordict", "fastapi",
                                      "hydra", "omegaconf", "pandas", "pydantic", "teacher_service"}:
            raise ImportError(f"{name} is blocked: the client must do without it")

sys.meta_path.insert(0, Blocker())
"""

_SCORE = """
import asyncio
from tests.support.teacher_stub import running_stub
from trainer.teacher import TeacherClient

async def main():
    async with running_stub() as stub:
        async with TeacherClient(endpoints=[stub.endpoint]) as teacher:
            scores = await teacher.score([1, 2, 3], score_start=1, num_logprobs=4)
    print("shape", scores.topk_logprobs.shape)

asyncio.run(main())
"""

_ABANDON = """
import asyncio
from tests.support.teacher_stub import hangs, running_stub
from trainer.teacher import TeacherClient

async def main():
    async with running_stub() as stub:
        stub.script.append(hangs)
        async with TeacherClient(endpoints=[stub.endpoint]) as teacher:
            call = asyncio.ensure_future(teacher.score([1, 2, 3], score_start=1, num_logprobs=4))
            await stub.arrived.wait()
        try:
            await call
        except Exception as error:
            print("ended with", type(error).__name__)

asyncio.run(main())
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        # gRPC's core tells on stderr, at level info, that the stub in the same process hung up
        env=os.environ | {"GRPC_VERBOSITY": "ERROR"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_client_works_without_the_trainers_libraries() -> None:
    """A process in which verl, ray, torch, vllm and transformers can't be imported scores a sequence."""
    done = run(_BLOCK + _SCORE)
    assert done.returncode == 0, done.stderr
    assert "shape (2, 4)" in done.stdout


def test_the_import_blocker_blocks() -> None:
    """The test above would notice an import of torch."""
    done = run(_BLOCK + "import torch")
    assert "torch is blocked" in done.stderr


def test_a_process_ends_cleanly_after_closing_with_a_call_under_way() -> None:
    """The interpreter exits with no complaint about tasks, threads or sockets left open."""
    done = run(_ABANDON)
    assert done.returncode == 0, done.stderr
    assert "ended with TeacherClosedError" in done.stdout
    assert done.stderr == ""
