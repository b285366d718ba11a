"""Free memory: the machine's, or less where a control group allows less."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from teacher_service import memory

HUGE = 1 << 60


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups of this test's own, on a machine of endless memory."""
    root = tmp_path / "cgroup"
    monkeypatch.setattr(memory, "_CGROUP", root)
    monkeypatch.setattr(memory, "_PROCESS_CGROUP", tmp_path / "self")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": HUGE}))
    return root


def write_group(folder: Path, *, limit: str, usage: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")


def test_the_tightest_group_counts(cgroups: Path) -> None:
    """The inner group has no limit, the outer leaves 1000 - 700, of which 50 are droppable cache."""
    (cgroups.parent / "self").write_text("0::/pod/container\n")
    write_group(cgroups / "pod" / "container", limit="max", usage=600, inactive=0)
    write_group(cgroups / "pod", limit="1000", usage=700, inactive=50)
    assert memory.free_bytes() == 350


def test_a_containers_own_group_is_mounted_at_the_root(cgroups: Path) -> None:
    """The path names the host's tree, of which only the own group is visible."""
    (cgroups.parent / "self").write_text("0::/host/path/of/it\n")
    write_group(cgroups, limit="500", usage=100, inactive=0)
    assert memory.free_bytes() == 400


def test_version_one_has_other_names(cgroups: Path) -> None:
    """A hierarchy for memory, and other files in it."""
    (cgroups.parent / "self").write_text("4:cpu:/elsewhere\n9:memory:/job\n")
    folder = cgroups / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("900\n")
    (folder / "memory.usage_in_bytes").write_text("400\n")
    (folder / "memory.stat").write_text("total_inactive_file 25\n")
    assert memory.free_bytes() == 525


def test_without_groups_the_machine_counts(cgroups: Path) -> None:
    """No file at all, as on other systems."""
    assert memory.free_bytes() == HUGE


def test_a_group_over_its_limit_leaves_nothing(cgroups: Path) -> None:
    """Never a negative number."""
    (cgroups.parent / "self").write_text("0::/\n")
    write_group(cgroups, limit="500", usage=600, inactive=0)
    assert memory.free_bytes() == 0
