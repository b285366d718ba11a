"""Main memory: what is really free to this process, of the machine and of its container, and what it holds."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_PROCESS_CGROUP = Path("/proc/self/cgroup")


def free_bytes() -> int:
    """The least of what the machine and each control group above this process leave (cgroup v2; v1 by its files)."""
    left = [int(psutil.virtual_memory().available)]
    left += [found for folder in _groups() if (found := _left_in(folder)) is not None]
    return max(0, min(left))


def resident_bytes() -> int:
    """Main memory that this process and its children hold; what they share counts for each of them."""
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # a child may have ended meanwhile
            total += process.memory_info().rss
    return total


def _groups() -> list[Path]:
    """The control groups of this process, innermost first, up to the root that is mounted here."""
    try:
        lines = _PROCESS_CGROUP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUP / "memory" if controllers else _CGROUP
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / path.lstrip("/")
        # in a container the path may be the host's: its own group is then what is mounted at the root
        found += [one for one in (folder, *folder.parents) if one == root or root in one.parents]
    return found


def _left_in(folder: Path) -> int | None:
    """Limit less use, where the page cache that can be dropped does not count; None without a limit."""
    for limit_file, usage_file, key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, usage = (folder / limit_file).read_text().strip(), (folder / usage_file).read_text()
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit.isdigit():
            return int(limit) - int(usage) + int(stat.get(key, 0))
    return None
