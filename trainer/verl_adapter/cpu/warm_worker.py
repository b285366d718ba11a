"""What Ray starts in place of Python: asks the warm process for a fork of itself, or else becomes Python.

A script, run with `-S -E`: it imports little, since nothing but its start is left of the time that it is to save.
"""

import json
import os
import signal
import socket
import sys

FORKED = b"\1"
TIMEOUT_S = 60
"""How long to wait for the warm process, which may still be importing."""


def ask_for_fork(path: str, arguments: list[str]) -> bool:
    """Whether the warm process behind the socket at `path` forked a Python that runs `arguments`."""
    asked = {
        "argv": arguments,
        "cwd": os.getcwd(),
        "environ": dict(os.environ),
        "blocked_signals": [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "leads_its_group": os.getpgrp() == os.getpid(),
    }
    request = json.dumps(asked).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as warm:
            warm.settimeout(TIMEOUT_S)
            warm.connect(path)
            socket.send_fds(warm, [len(request).to_bytes(4, "big")], [0, 1, 2])
            warm.sendall(request)
            return warm.recv(1) == FORKED
    except OSError:
        return False


if __name__ == "__main__":
    if not ask_for_fork(sys.argv[1], sys.argv[2:]):
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])  # noqa: S606  # the program that Ray meant
