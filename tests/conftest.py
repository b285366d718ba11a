"""What holds for every test run: its temporary files are gone when it ends, and SIGTERM ends it in order."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import FrameType

import pytest

_FOLDER = pytest.StashKey[Path]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Keep temporary files in a folder of this run alone: pytest's own would keep those of the last three runs."""
    if config.option.basetemp is None:
        # short: sockets lie below it, and the path of one has at most 107 bytes
        config.stash[_FOLDER] = Path(tempfile.mkdtemp(prefix="gkd-tests-"))
        config.option.basetemp = config.stash[_FOLDER] / "t"
        os.environ["TMPDIR"] = tempfile.tempdir = str(config.stash[_FOLDER])  # children's too
    signal.signal(signal.SIGTERM, _end_in_order)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # as in a shell's background job; the programs that tests start and interrupt would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Also after a failure or an interrupt."""
    if _FOLDER in config.stash:
        shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


def _end_in_order(_number: int, _frame: FrameType | None) -> None:
    """Do as for Ctrl-C, which tears fixtures down; once, since a second time would cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.raise_signal(signal.SIGINT)
