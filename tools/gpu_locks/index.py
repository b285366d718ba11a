"""Whether a package index has, for each pin of a lock, a file that the images can install; no such file is fetched.

uv resolves the pins for the images' platform, and writes the files that fit with their hashes. It compares no hashes
itself: its own dry run passes with wrong ones.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu_locks.locks import CheckError, Pin

PYTHONS = ("3.11", "3.12")
"""What the project supports."""
GLIBC_MINOR = 36
"""The images' glibc is 2.36, that of Debian 12."""
SOURCE_ONLY = ("antlr4-python3-runtime",)
"""Distributions without a wheel, which pip builds in the image. Pure Python; Hydra pins it to a release of 2021."""
_LAST_WORDS = 1500
"""Characters of a failed command's output that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file that fits the platform."""

    name: str
    sha256: str | None
    """None: the index gives none."""


def files_for(lock: Path, python: str) -> dict[str, list[File]]:
    """The files that fit, by distribution and version (`name==version`).

    Args:
        lock: a lock; its hashes play no part.
        python: version of CPython, such as 3.12.

    Raises:
        CheckError: uv fails: a pin has no file for the platform, or the index can't be reached.
    """
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", str(lock), "--quiet", "--no-deps", "--format", "pylock.toml"),
        *("--python-version", python, "--python-platform", f"x86_64-manylinux_2_{GLIBC_MINOR}"),
        *("--only-binary", ":all:"),
        *(word for name in SOURCE_ONLY for word in ("--no-binary", name)),
    ]
    return parse_pylock(run(command, f"resolving {lock.name} for Python {python}"))


def parse_pylock(text: str) -> dict[str, list[File]]:
    """The files of a lock as PEP 751 has it."""
    return {
        f"{package['name']}=={package['version']}": [
            _file(one) for one in [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        ]
        for package in tomllib.loads(text)["packages"]
    }


def problems(pins: Mapping[str, Pin], files: Mapping[str, Sequence[File]]) -> list[str]:
    """One line per pin of which no file that fits has a hash of the lock."""
    found = []
    for pin in pins.values():
        fitting = files.get(f"{pin.name}=={pin.version}", [])
        if not any(one.sha256 in pin.hashes for one in fitting):
            there = ", ".join(f"{one.name} (sha256 {one.sha256})" for one in fitting) or "no file"
            found.append(f"{pin.name}=={pin.version}: the index has {there}; the lock names {len(pin.hashes)} others")
    return found


def run(command: Sequence[str], step: str) -> str:
    """What a command that asks the package index prints.

    Raises:
        CheckError: it fails.
    """
    finished = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - uv and pip, by us
    if finished.returncode != 0:
        words = (finished.stderr or finished.stdout).strip()[-_LAST_WORDS:]
        raise CheckError(f"{step} failed. This step needs the package index:\n{words}")
    return finished.stdout


def _file(entry: Mapping[str, Any]) -> File:
    place = str(entry.get("url") or entry.get("path"))
    return File(name=entry.get("name") or place.rsplit("/", 1)[-1], sha256=entry.get("hashes", {}).get("sha256"))
