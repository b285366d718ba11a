"""What vLLM reads from the environment, set so that nobody has to; a value that is already there wins."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_DEFAULTS = {
    # Scoring is a service among others on its machine: it reports to nobody and leaves the logs to its owner.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Its warnings are about choices that the service makes for it; what fails is an error.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # Pinning threads to cores starves whatever else runs on the same machine, such as the trainer.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # oneDNN keeps a kernel for each number of rows that it has met, 1,024 of them: on a CPU a gigabyte over a day.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    # FlashInfer's sampler compiles itself with nvcc, and a token that is sampled beside scoring is dropped.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # CUDA can't be used in a forked child of a process that may have touched it.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_SOCKET_FOLDER = "VLLM_RPC_BASE_PATH"
MAX_SOCKET_ROOT_BYTES = 53
"""Longest folder that the engine's can lie in. A socket's path may have 107 bytes: the engine's own folder takes 17 of
them, and vLLM's name of a socket 37."""
# inherited by the engine's process
_FOLDER_VARIABLES = (_SOCKET_FOLDER, "TMPDIR")


def set_defaults() -> None:
    """Set what is not set yet. Call it before vllm is imported: parts are read then."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def forbid_compiling() -> None:
    """Keep torch in the engine's process from compiling, unless the user says otherwise.

    vLLM compiles the ranking of logprobs whatever `enforce_eager` says, which costs a start on a CPU half a minute.
    """
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


class EngineFolder:
    """A folder of its own for one engine's sockets and temporary files: vLLM leaves them behind, so it goes with it."""

    def __init__(self) -> None:
        self._outer = {name: os.environ.get(name) for name in _FOLDER_VARIABLES}
        own_folder = tempfile.gettempdir()  # chosen now, for good: what follows is for the engine's process
        if len(os.fsencode(own_folder)) > MAX_SOCKET_ROOT_BYTES:
            own_folder = "/tmp"  # noqa: S108 - mkdtemp below it
        self._path = Path(tempfile.mkdtemp(prefix="teacher-", dir=self._outer[_SOCKET_FOLDER] or own_folder))
        for name in _FOLDER_VARIABLES:
            os.environ[name] = str(self._path)

    def remove(self) -> None:
        """Delete the folder and give the environment its former values back. Idempotent."""
        for name, value in self._outer.items():
            if os.environ.get(name) != str(self._path):
                continue
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(self._path, ignore_errors=True)
