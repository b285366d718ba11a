"""Nothing in the service or the contract can be made to run what a caller sends."""

from __future__ import annotations

import ast
from pathlib import Path

import protos
import teacher_service
from tests.unit.import_rules import imported_modules

LOADERS = frozenset({"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve", "yaml"})
"""Modules that build any object from bytes."""
CALLS = frozenset({"eval", "exec"})
ROOTS = [Path(package.__path__[0]) for package in (teacher_service, protos)]


def dangers(path: str, source: str) -> list[str]:
    """Imports and calls that could."""
    found = [name for name in imported_modules(path, source, frozenset()) if name.split(".")[0] in LOADERS]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        unpickles = any(one.arg in {"allow_pickle", "weights_only"} for one in node.keywords)
        if name in CALLS or name == "torch.load" or unpickles:
            found.append(name)
    return found


def test_nothing_unpickles_or_evaluates() -> None:
    """No import of such a module and no call of that kind, anywhere."""
    sources = [path for root in ROOTS for path in root.rglob("*.py")]
    assert len(sources) > 40
    assert {f"{path}": found for path in sources if (found := dangers(f"{path}", path.read_text()))} == {}


def test_each_danger_is_seen() -> None:
    """The check above would catch one."""
    assert dangers("a/b.py", "def f():\n    import pickle") == ["pickle"]
    assert dangers("a/b.py", "from yaml import load") == ["yaml"]
    assert dangers("a/b.py", "torch.load(x)\nnp.load(x, allow_pickle=True)\neval(x)") == [
        "torch.load",
        "np.load",
        "eval",
    ]
