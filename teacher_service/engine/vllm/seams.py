"""Whether a vLLM is still what this project overrides and calls, found out from its source files alone.

`seam_table.py` lists every such place. The list serves the check of the locked versions (`make check-gpu-locks`) and
the fast route's probe before each start (`fast/probe.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from teacher_service.engine.vllm.source_tree import Definition, SourceTree, UnreadableError

Parameters = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seam:
    """A name of another project that ours relies on, and what must hold of it; with nothing else, that it exists."""

    used_by: tuple[str, ...]
    """Which of our parts need it."""
    path: str
    """`module:name` from where we have it, the name dotted; or a module alone."""
    parameters: tuple[Parameters, ...] = field(default=(), kw_only=True)
    """One of these it must take exactly, names in order, written as `SourceTree.parameters` does; one per version."""
    accepts: Parameters = field(default=(), kw_only=True)
    """Keywords that it must name among its parameters or fields."""
    has: tuple[str, ...] = field(default=(), kw_only=True)
    """Attributes that the class, or a base class in the same package, declares or assigns to `self`."""
    contains: tuple[str, ...] = field(default=(), kw_only=True)
    """Pieces of its source text; white space does not count."""

    @property
    def module(self) -> str:
        """Full name of the module."""
        return self.path.partition(":")[0]

    @property
    def name(self) -> str:
        """Dotted, in that module; empty: the module itself."""
        return self.path.partition(":")[2]


def problems(root: Path, seams: Iterable[Seam]) -> list[str]:
    """One line per expectation that does not hold: what, what was expected, what was found and where.

    Args:
        root: the folder that holds the packages, such as site-packages. Its files are read, never imported.
        seams: what to check.
    """
    tree = SourceTree(root)
    return [problem for seam in seams for problem in _problems_of(tree, seam)]


def for_parts(seams: Iterable[Seam], parts: Iterable[str]) -> list[Seam]:
    """Those that any of `parts` needs."""
    wanted = frozenset(parts)
    return [seam for seam in seams if not wanted.isdisjoint(seam.used_by)]


def _problems_of(tree: SourceTree, seam: Seam) -> list[str]:
    needed_by = f"needed by {', '.join(seam.used_by)}"
    try:
        found = _find(tree, seam)
        if found is None:
            return [f"{seam.path} is missing{_where(tree, seam)} ({needed_by})"]
        return [f"{seam.path} {wrong} ({found.place}; {needed_by})" for wrong in _violations(tree, seam, found)]
    except UnreadableError as exc:
        return [f"{seam.path}: {exc} ({needed_by})"]


def _find(tree: SourceTree, seam: Seam) -> Definition | None:
    if seam.name:
        return tree.find(seam.module, seam.name)
    module = tree.module(seam.module)
    return None if module is None else Definition(module, module.tree)


def _where(tree: SourceTree, seam: Seam) -> str:
    """The nearest thing around a missing name that is there."""
    module = tree.module(seam.module)
    if module is None:
        return f": there is no module {seam.module}"
    owner, _, _ = seam.name.rpartition(".")
    found = tree.find(seam.module, owner) if owner else None
    return f" in {module.path if found is None else found.place}"


def _violations(tree: SourceTree, seam: Seam, found: Definition) -> Iterator[str]:
    """Each ends a sentence that begins with the seam's name."""
    takes = tree.parameters(found)
    if seam.parameters and takes not in seam.parameters:
        expected = " or ".join(_in_words(one) for one in seam.parameters)
        yield f"takes {_in_words(takes)}, expected {expected}"
    unnamed = [name for name in seam.accepts if name not in (takes or ())]
    if unnamed:
        yield f"does not take {', '.join(unnamed)}; it takes {_in_words(takes)}"
    if seam.has:
        there = tree.attributes(found)
        lacking = [name for name in seam.has if name not in there]
        if lacking:
            yield f"has no {', '.join(lacking)}"
    source = _without_space(found.source) if seam.contains else ""
    for piece in seam.contains:
        if _without_space(piece) not in source:
            yield f"does not contain {piece!r}"


def _in_words(parameters: Parameters | None) -> str:
    return "nothing that could be read" if parameters is None else f"({', '.join(parameters)})"


def _without_space(text: str) -> str:
    return "".join(text.split())
