"""The folder of a run: what lies where, and whose it is."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.sort_digits.errors import DemoError

MARKER = ".sort-digits-demo"
"""File that says that a demo run made the folder; locked while one is using it."""


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        """The folder itself, absolute."""
        self.logs = self.path / "logs"
        """`teacher.log` and `trainer.log`."""
        self.checkpoints = self.path / "checkpoints"
        """What the trainer saves."""
        self.student = self.path / "student"
        """The distilled student, a Hugging Face checkpoint."""
        self.metrics = self.path / "metrics.jsonl"
        """The trainer's metrics, one line per step."""
        self.summary = self.path / "summary.json"
        """The numbers of the run."""
        self.curves = self.path / "curves.png"
        """The run as a picture."""
        self.hydra = self.path / "hydra"
        """Hydra's record of the trainer's configuration."""

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder, or empty the one of an earlier run, and keep other runs out of it meanwhile.

        Raises:
            DemoError: the folder holds what no demo wrote, or another run is using it.
            OSError: it can't be made or emptied.
        """
        marker = self.path / MARKER
        if self.path.exists() and not self.path.is_dir():
            raise DemoError(f"--output-dir {self.path} is no folder; name a new or an empty one")
        if self.path.is_dir() and not marker.is_file() and any(self.path.iterdir()):
            raise DemoError(
                f"--output-dir {self.path} holds files that no demo run wrote, so it is left alone; "
                "name a new or an empty folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with marker.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise DemoError(f"another demo run is using {self.path}; wait, or name another --output-dir") from exc
            self._empty()
            yield

    def _empty(self) -> None:
        for one in self.path.iterdir():
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one)
            elif one.name != MARKER:
                one.unlink()
