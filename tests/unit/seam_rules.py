"""What this project's own source names, passes and overrides of another package, found by reading it.

`test_seams.py` and `test_gpu_locks.py` hold the tables of seams against it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from teacher_service.engine.vllm.seams import Parameters, Seam
from teacher_service.engine.vllm.source_tree import Function, SourceTree

ROOT = Path(__file__).parents[2]


def installed_root(package: str) -> Path:
    """The folder that holds an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]).parent


def parsed(*folders: str) -> dict[str, ast.Module]:
    """The files below folders of this project, by path; the table itself names everything."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {f"{path.relative_to(ROOT)}": ast.parse(path.read_text()) for path in paths if path.name != "seam_table.py"}


def imported(files: Mapping[str, ast.Module], package: str) -> dict[str, str]:
    """What is imported from a package, as a seam's path -> the file that does so."""
    found: dict[str, str] = {}
    for path, tree in files.items():
        for node in ast.walk(tree):
            match node:
                case ast.Import():
                    names = [alias.name for alias in node.names]
                case ast.ImportFrom(module=str(module)):
                    names = [f"{module}:{alias.name}" for alias in node.names]
                case _:
                    continue
            found |= {name: path for name in names if re.split("[.:]", name)[0] == package}
    return found


def named_in_strings(files: Mapping[str, ast.Module], pattern: str) -> dict[str, str]:
    """Strings that match a pattern as a whole -> the file that holds them."""
    return {
        node.value: path
        for path, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(pattern, node.value)
    }


def unlisted(used: Mapping[str, str], seams: Iterable[Seam]) -> list[str]:
    """Which of the paths no seam has, itself or a part of it."""
    listed = [seam.path for seam in seams]
    return [
        f"{path} uses {name}"
        for name, path in sorted(used.items())
        if not any(one == name or one.startswith((f"{name}.", f"{name}:")) for one in listed)
    ]


class Heir(NamedTuple):
    """A class of this project with a base class in another package."""

    name: str
    own: list[ast.ClassDef]
    """It, and its base classes in this project."""
    base: str
    """The other package's class, as a seam's path."""


def heirs(files: Mapping[str, ast.Module], package: str) -> list[Heir]:
    """All of them; a class with two such bases is there twice."""
    bases = {name: path for tree in files.values() for name, path in _base_names(tree, package)}
    classes = {node.name: node for tree in files.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    lineages = {name: _own_lineage(node, classes) for name, node in classes.items()}
    return [
        Heir(name, own, bases[base])
        for name, own in lineages.items()
        for base in dict.fromkeys(base for one in own for base in _names(one.bases) if base in bases)
    ]


def unlisted_overrides(
    files: Mapping[str, ast.Module], theirs: SourceTree, package: str, seams: Iterable[Seam]
) -> list[str]:
    """Methods that a base class has too, and no seam with its parameters, or none that ours can serve.

    Constructors are left out: ours call, or pass on, what they are handed.
    """
    listed = {
        found.node: seam.parameters
        for seam in seams
        if seam.parameters and (found := theirs.find(seam.module, seam.name)) is not None
    }
    problems = []
    for heir in heirs(files, package):
        owner = theirs.find(*heir.base.split(":"))
        assert owner is not None, f"{heir.base} is missing"
        for method in _methods(heir.own):
            found = theirs.member(owner, method.name)
            if found is None or method.name == "__init__":
                continue
            ours = SourceTree.parameters_of(method)
            if found.node not in listed:
                problems.append(f"{heir.name}.{method.name} overrides {found.place}, which no seam names")
            elif not all(serves(ours, one) for one in listed[found.node]):
                problems.append(f"{heir.name}.{method.name} takes {ours}, which does not serve {listed[found.node]}")
    return problems


def unlisted_attributes(files: Mapping[str, ast.Module], package: str, seams: Sequence[Seam]) -> list[str]:
    """Attributes that our classes read of `self`, do not define, and no seam of their base class names."""
    problems = []
    for heir in heirs(files, package):
        listed = {name for seam in seams if seam.path == heir.base for name in seam.has}
        listed |= {seam.name.rpartition(".")[2] for seam in seams if seam.path.startswith(f"{heir.base}.")}
        own = {name for one in heir.own for name in SourceTree.attributes_of(one)}
        problems += [
            f"{heir.name} reads {name} of {heir.base}" for name in sorted(_read_of_self(heir.own) - own - listed)
        ]
    return problems


def _methods(classes: Iterable[ast.ClassDef]) -> Iterator[Function]:
    yield from (node for one in classes for node in one.body if isinstance(node, Function))


def keywords_of(files: Mapping[str, ast.Module], function: str, *, dicts_of: Sequence[str] = ()) -> set[str]:
    """Keywords with which a function is called by its name, and keys of the dicts that `dicts_of` return."""
    found = set()
    for node in (node for tree in files.values() for node in ast.walk(tree)):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name == function:
                found |= {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            case ast.FunctionDef(name=name) if name in dicts_of:
                found |= _returned_keys(node)
    return found


def _returned_keys(function: ast.FunctionDef) -> set[str]:
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    dicts = [node for value in returned if isinstance(value, ast.Dict) for node in ast.walk(value)]
    keys = [key for node in dicts if isinstance(node, ast.Dict) for key in node.keys]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _read_of_self(classes: Iterable[ast.ClassDef]) -> set[str]:
    found = set()
    for node in (node for one in classes for node in ast.walk(one)):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Load()) if not name.startswith("__"):
                found.add(name)
    return found


def _base_names(tree: ast.Module, package: str) -> Iterator[tuple[str, str]]:
    """Names that stand for a class of a package -> its path: imported ones, and aliases of what is imported."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == package:
                found |= {alias.asname or alias.name: f"{module}:{alias.name}" for alias in node.names}
    yield from found.items()
    for node in ast.walk(tree):
        match node:
            case (
                ast.AnnAssign(target=ast.Name(id=alias), value=ast.Attribute() as value)
                | ast.Assign(targets=[ast.Name(id=alias)], value=ast.Attribute() as value)
            ):
                root = ast.unparse(value).split(".")[0]
                if root in found:
                    yield alias, found[root]


def _own_lineage(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> list[ast.ClassDef]:
    found = [node]
    for name in _names(node.bases):
        if name in classes and classes[name] is not node:
            found += [one for one in _own_lineage(classes[name], classes) if one not in found]
    return found


def _names(expressions: Sequence[ast.expr]) -> list[str]:
    return [one.id for one in expressions if isinstance(one, ast.Name)]


def serves(ours: Parameters, theirs: Parameters) -> bool:
    """Whether a function with our parameters can be called as one with theirs is, by position or by name."""
    positional, named = _split(ours)
    wanted_positional, wanted_named = _split(theirs)
    catches_all = any(one.startswith("*") and one.strip("*") and not one.startswith("**") for one in ours)
    catches_named = any(one.startswith("**") for one in ours)
    extra = wanted_positional[len(positional) :]
    return (
        positional[: len(wanted_positional)] == wanted_positional[: len(positional)]
        and (not extra or (catches_all and catches_named))
        and (catches_named or not (set(wanted_named) - set(named) - set(positional)))
        and (catches_named or not any(one.startswith("**") for one in theirs))
        and (catches_all or not any(re.match(r"\*\w", one) for one in theirs))
    )


def _split(parameters: Parameters) -> tuple[list[str], list[str]]:
    """Positional names without the first, which is bound; and names that are passed by keyword alone."""
    stars = [at for at, one in enumerate(parameters) if one.startswith("*")]
    end = stars[0] if stars else len(parameters)
    return list(parameters[1:end]), [one for one in parameters[end:] if not one.startswith("*")]
