"""What a lock pins: as `uv pip compile --generate-hashes` writes it for one platform."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?==(?P<version>[^\s;\\]+)")
_HASH = re.compile(r"--hash=sha256:(?P<digest>[0-9a-f]{64})")


class CheckError(Exception):
    """Why a check could not be done, in words for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """One distribution of a lock."""

    name: str
    version: str
    hashes: frozenset[str]
    """Sha256 of each file that may be installed."""

    @property
    def requirement(self) -> str:
        """As pip takes it from a file, hashes included."""
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{one}" for one in sorted(self.hashes))])


def read_lock(path: Path) -> dict[str, Pin]:
    """The pins of a lock, by name.

    Raises:
        CheckError: it can't be read, or a line is no pinned distribution with hashes.
    """
    try:
        joined = path.read_text().replace("\\\n", " ")
    except (OSError, UnicodeDecodeError) as exc:
        raise CheckError(f"{path.name} can't be read ({exc}); write it anew: make lock") from exc
    lines = [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    pins = [_read_pin(line, path) for line in lines]
    return {pin.name: pin for pin in pins}


def pinned(pins: Mapping[str, Pin], name: str, path: Path) -> Pin:
    """The pin of one distribution.

    Raises:
        CheckError: the lock has none.
    """
    if name not in pins:
        raise CheckError(f"{path.name} does not pin {name}; it pins {len(pins)} others. Write it anew: make lock")
    return pins[name]


def _read_pin(line: str, path: Path) -> Pin:
    found = _PIN.match(line)
    hashes = frozenset(one["digest"] for one in _HASH.finditer(line))
    if found is None or not hashes:
        raise CheckError(f"{path.name}: {line[:80]!r} is no pinned distribution with hashes; write it anew: make lock")
    return Pin(name=found["name"], version=found["version"], hashes=hashes)
