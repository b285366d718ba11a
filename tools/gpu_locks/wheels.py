"""The Python files of a pinned wheel for the images' platform."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from tools.gpu_locks.index import GLIBC_MINOR, PYTHONS, run
from tools.gpu_locks.locks import CheckError, Pin

OLDEST_GLIBC_MINOR = 17
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC_MINOR, OLDEST_GLIBC_MINOR - 1, -1)]
"""Of wheels that run in the images."""


def fetch(pin: Pin, folder: Path) -> Path:
    """Download a pin's wheel, its hash checked, and unpack its Python files; the folder that holds its packages.

    Args:
        pin: what to fetch.
        folder: an empty folder that exists.

    Raises:
        CheckError: pip fails, or finds no wheel.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pin.requirement}\n")
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"),
        *("--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", str(folder)),
        *("--python-version", PYTHONS[-1], "--implementation", "cp"),
        *(word for platform in [*PLATFORMS, "manylinux2014_x86_64"] for word in ("--platform", platform)),
        *("-r", str(requirement)),
    ]
    run(command, f"downloading {pin.name}=={pin.version}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckError(f"pip downloaded {len(wheels)} wheels of {pin.name}=={pin.version}, not one")
    unpacked = folder / "unpacked"
    unpack(wheels[0], unpacked)
    wheels[0].unlink()  # hundreds of megabytes
    return unpacked


def unpack(wheel: Path, folder: Path) -> None:
    """Take a wheel's Python files out, nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                archive.extract(name, folder)
