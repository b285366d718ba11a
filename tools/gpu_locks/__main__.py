"""`python -m tools.gpu_locks`: do the GPU locks resolve, and do their vLLM and verl fit this project?

It downloads two wheels of vLLM, some 300 MB each, and reads the Python files in them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from teacher_service.engine.vllm.fast.probe import SUPPORTED_VERSIONS, is_supported
from teacher_service.engine.vllm.seam_table import SEAMS
from teacher_service.engine.vllm.seams import Seam
from teacher_service.engine.vllm.seams import problems as seam_problems
from tools.gpu_locks import index, wheels
from tools.gpu_locks.locks import CheckError, Pin, pinned, read_lock
from tools.gpu_locks.verl_seams import TRAINER_VLLM_SEAMS, VERL_SEAMS

ROOT = Path(__file__).parents[2]
TEACHER, TRAINER = "teacher-gpu.lock", "trainer-gpu.lock"

Check = tuple[str, Callable[[], list[str]]]
"""What holds if it passes, and what finds the problems."""


def main(folder: Path = ROOT / "requirements") -> int:
    """Run all checks, one line each; 1 if any fails."""
    failed = False
    try:
        for holds, find_problems in _checks(folder):
            problems = find_problems()
            failed |= bool(problems)
            print("FAILED" if problems else "ok    ", holds, flush=True)  # noqa: T201 - for the user
            for problem in problems:
                print(f"       {problem}", flush=True)  # noqa: T201 - for the user
    except CheckError as exc:
        print(f"FAILED {exc}")  # noqa: T201 - for the user
        return 1
    return int(failed)


def version_problems(pin: Pin) -> list[str]:
    """Whether the fast route takes a vLLM."""
    if is_supported(pin.version):
        return []
    return [f"the fast route is tested on {', '.join(SUPPORTED_VERSIONS)}; pin one of them, or test this one"]


def _checks(folder: Path) -> Iterator[Check]:
    teacher, trainer = folder / TEACHER, folder / TRAINER
    vllm = pinned(read_lock(teacher), "vllm", teacher)
    yield f"{TEACHER}: vllm {vllm.version} is a version with the fast route", lambda: version_problems(vllm)
    for lock in (teacher, trainer):
        for python in index.PYTHONS:
            yield _resolves(lock, python)
    yield _fits(teacher, "vllm", SEAMS)
    yield _fits(trainer, "vllm", TRAINER_VLLM_SEAMS)
    yield _fits(trainer, "verl", VERL_SEAMS)


def _resolves(lock: Path, python: str) -> Check:
    pins = read_lock(lock)
    holds = f"{lock.name}: each of {len(pins)} pins has a file for Python {python}, with a hash of the lock"
    return holds, lambda: index.problems(pins, index.files_for(lock, python))


def _fits(lock: Path, name: str, seams: Sequence[Seam]) -> Check:
    pin = pinned(read_lock(lock), name, lock)

    def find_problems() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            return seam_problems(wheels.fetch(pin, Path(folder)), seams)

    return f"{lock.name}: {name} {pin.version} is as this project uses it, in {len(seams)} places", find_problems


if __name__ == "__main__":
    sys.exit(main())
