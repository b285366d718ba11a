"""Stands in for the trainer in tests of the demo: as untidy as Ray, and done in a moment.

Usage: demo_trainer.py BEHAVIOUR FOOTPRINT STUDENT TARGET STEPS, with BEHAVIOUR one of finish, fail, hang.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path


def daemon(footprint: Path) -> None:
    """What Ray leaves behind: an orphan in its own session, deaf to SIGTERM, with a port, shared memory and files."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    segment = shared_memory.SharedMemory(create=True, size=4096)
    # As after a kill: nothing of Python's unlinks it.
    resource_tracker.unregister(f"/{segment.name}", "shared_memory")
    listener = socket.create_server(("127.0.0.1", 0))
    left = {
        "pid": os.getpid(),
        "segment": f"/dev/shm/{segment.name}",  # noqa: S108 - where the kernel lists it
        "port": listener.getsockname()[1],
        "temp_file": tempfile.mkstemp(prefix="ray-socket-")[1],
    }
    partial = footprint.with_suffix(".partial")
    partial.write_text(json.dumps(left))
    partial.replace(footprint)
    time.sleep(600)


def main() -> None:
    if sys.argv[1] == "daemon":
        daemon(Path(sys.argv[2]))
        return
    behaviour, footprint, student, target, num_steps = sys.argv[1:]
    subprocess.Popen([sys.executable, __file__, "daemon", footprint])
    while not Path(footprint).exists():
        time.sleep(0.01)
    with Path(os.environ["VERL_FILE_LOGGER_PATH"]).open("w") as log:
        for step in range(1, int(num_steps) + 1):
            if step > 1 and behaviour == "fail":
                sys.exit("the trainer broke")
            if step > 1 and behaviour == "hang":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            metrics = {"actor/teacher_kl_loss": 2.0 / step, "gkd/scored_tokens": 10.0, "timing_s/step": 0.5}
            log.write(json.dumps({"step": step, "data": metrics}) + "\n")
            log.flush()
    shutil.copytree(student, target)


if __name__ == "__main__":
    main()
