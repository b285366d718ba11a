"""Workers that start warm: forks of one process that has done the imports which all of them share.

On two cores a training run otherwise spends most of its start in a dozen processes that import torch one after the
other. The process here does it once, while the driver imports verl; what Ray takes for Python asks it for a fork
(`warm_worker.py`). It never imports Ray, whose C++ part reads its settings once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer.verl_adapter.cpu import warm_worker
from trainer.verl_adapter.cpu.environment import private_folder, set_environment

ADDRESS = "ray_kwargs.ray_init.address"
PY_EXECUTABLE = "ray_kwargs.ray_init.runtime_env.py_executable"
PRELOADED = (
    "torch",
    "torch._inductor.lowering",
    "torch.distributed.fsdp",
    "transformers",
    "tensordict",
    "datasets",
    "accelerate",
    "peft",
    "pandas",
    "fastapi",
    "uvicorn",
    "aiohttp",
    "zmq",
    "torchdata.stateful_dataloader",
)
"""What verl's workers import, as far as Ray is not imported with it."""
READ_AT_IMPORT = (
    "HF_",
    "TRANSFORMERS_",
    "TORCHDYNAMO_",
    "TORCH_COMPILE",
    "ATEN_",
    "DNNL_",
    "ONEDNN_",
    "OMP_",
    "LD_",
    "PYTHON",
)
"""How variables are named that are read when the modules above are imported, or before, and that matter without an
accelerator. vLLM changes others of torch's in the driver."""
NOT_READ_AT_IMPORT = frozenset({"PYTHONBREAKPOINT"})
"""Named likewise, and set by Ray for each worker."""
FORK_SAFE_THREADS = frozenset({"jemalloc_bg_thd"})
"""Native threads that start anew in a fork. Any other, and nothing is forked."""
_END_S = 5


@contextlib.contextmanager
def warm_workers(config: DictConfig, user_keys: Set[str]) -> Iterator[None]:
    """On a single machine without an accelerator, let Ray's workers be forks of one warm process.

    Args:
        config: the composed configuration; changed in place.
        user_keys: dotted keys that the command line names. With an address or an executable of the user's own,
            nothing is changed.
    """
    if config.trainer.device != "cpu" or not user_keys.isdisjoint({ADDRESS, PY_EXECUTABLE}):
        yield
        return
    set_environment()
    folder = private_folder("gkd-warm-")
    path = str(Path(folder, "socket"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(128)
        warm = subprocess.Popen(  # noqa: S603  # this very interpreter
            [sys.executable, "-m", __name__, f"{listener.fileno()}", folder],
            stdin=subprocess.PIPE,  # never written to: closed when this process ends, whatever ended it
            pass_fds=[listener.fileno()],
        )
    try:
        worker = [sys.executable, "-S", "-E", warm_worker.__file__, path]
        OmegaConf.update(config, PY_EXECUTABLE, shlex.join(worker), force_add=True)
        yield
    finally:
        warm.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        try:
            warm.wait(_END_S)
        except subprocess.TimeoutExpired:
            warm.kill()
            warm.wait()
        shutil.rmtree(folder, ignore_errors=True)


def serve(listener: socket.socket, folder: str) -> None:
    """Import, then fork a worker for whoever asks, until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel may forget ended workers
    imported_with = _read_at_import(os.environ)
    for name in PRELOADED:
        importlib.import_module(name)
    unsafe = _threads() - FORK_SAFE_THREADS
    if unsafe:
        print(f"workers start cold: threads {sorted(unsafe)} would be lost in a fork", file=sys.stderr)  # noqa: T201
        return
    gc.freeze()  # a collection in a fork would copy every page
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(folder, ignore_errors=True)
            return
        asking, _ = listener.accept()
        with asking:
            _answer(asking, imported_with, listener)


def _answer(asking: socket.socket, imported_with: Mapping[str, str], listener: socket.socket) -> None:
    asking.settimeout(warm_worker.TIMEOUT_S)
    try:
        length, descriptors, _, _ = socket.recv_fds(asking, 4, 3)
        request = json.loads(_receive(asking, int.from_bytes(length, "big")))
    except (OSError, EOFError, ValueError) as exc:
        print(f"a worker starts cold: {exc!r}", file=sys.stderr)  # noqa: T201  # the driver's log
        return
    other = {name for name, _ in _read_at_import(request["environ"]).items() ^ imported_with.items()}
    if other:
        print(f"a worker starts cold, for its own {', '.join(sorted(other))}", file=sys.stderr)  # noqa: T201
    elif request["argv"][0].endswith(".py"):
        if os.fork() == 0:
            listener.close()
            asking.close()
            _become_worker(request, descriptors)
        with contextlib.suppress(OSError):
            asking.sendall(warm_worker.FORKED)
    for one in descriptors:
        os.close(one)


def _become_worker(request: Mapping[str, Any], descriptors: list[int]) -> None:
    if request["leads_its_group"]:
        os.setpgid(0, 0)
    for standard, passed in enumerate(descriptors):
        os.dup2(passed, standard)
        os.close(passed)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked_signals"])
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # it was looked up with another TMPDIR
    sys.modules["numpy"].random.seed()  # Python's own generator does so by itself; torch's always starts alike
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def _receive(asking: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        chunk = asking.recv(size - len(received))
        if not chunk:
            raise EOFError(f"{len(received)} of {size} bytes came")
        received += chunk
    return bytes(received)


def _read_at_import(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(READ_AT_IMPORT) and name not in NOT_READ_AT_IMPORT
    }


def _threads() -> Set[str]:
    """Names of this process's threads but the first."""
    tasks = Path("/proc/self/task")
    return {(one / "comm").read_text().strip() for one in tasks.iterdir() if one.name != f"{os.getpid()}"}


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _listener:
        serve(_listener, sys.argv[2])
