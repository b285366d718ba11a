"""The layers of the code base as rules on its import graph; `test_layers.py` holds the code to them."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGES = ("protos", "teacher_service", "trainer")

Sources = Mapping[str, str]
"""Path relative to the root -> source text."""
Graph = Mapping[str, frozenset[str]]
"""Module -> what it imports, anywhere in the file: project modules and outside ones by their full names."""

FORBIDDEN = {
    "trainer": ("teacher_service", "examples", "tests"),
    "teacher_service": ("trainer", "examples", "tests"),
    "protos": ("trainer", "teacher_service", "examples", "tests"),
}
"""Package -> packages it never imports."""

LAYERS: Mapping[str, tuple[frozenset[str], ...]] = {
    "teacher_service": (
        frozenset({"__main__"}),
        frozenset({"bench", "check", "server"}),
        frozenset({"transports"}),
        frozenset({"scoring"}),
        frozenset({"admission", "dedupe", "engine", "validation"}),
        frozenset({"access", "config", "errors", "memory", "offload", "telemetry", "tls", "types"}),
    ),
    "trainer": (
        frozenset({"main_ppo"}),
        frozenset({"verl_adapter"}),
        frozenset({"losses", "metrics", "partition", "selection", "teacher"}),
        frozenset({"config", "errors", "types"}),
    ),
}
"""Package -> its components, top layer first. A component imports only layers below its own; those of the last
layer may import each other."""

OWNERS = {
    # the rollout on a CPU mends vLLM's weight loading inside vLLM's own worker
    "vllm": ("teacher_service.engine.vllm", "trainer.verl_adapter.cpu.rollout"),
    "fastapi": ("teacher_service.transports",),
    "starlette": ("teacher_service.transports",),
    "grpc": ("teacher_service.transports", "teacher_service.server", "trainer.teacher", "protos.teacher.v1"),
    "verl": ("trainer.verl_adapter", "trainer.main_ppo"),
    "ray": ("trainer.verl_adapter", "trainer.main_ppo"),
}
"""Outside library -> the modules and packages that may import it."""

PLUGINS = ("trainer.verl_adapter.cpu.plugin", "trainer.verl_adapter.registration")
"""Modules that exist to act when they are imported: a host program loads them by name, and no code here may."""

STUB_OWNERS = ("protos", "teacher_service.transports", "trainer.teacher")
"""Where the generated messages may be seen."""

HEAVY = frozenset({"fastapi", "grpc", "ray", "torch", "transformers", "verl", "vllm"})
"""What importing a config module must not load."""


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_stub(module: str) -> bool:
    return is_within(module, "protos") and module.endswith(("_pb2", "_pb2_grpc"))


def read_sources(root: Path) -> dict[str, str]:
    """Every module of the packages; generated stubs are known by name, but their text is nobody's to judge."""
    sources = {}
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        sources[relative] = "" if is_stub(module_name(relative)) else path.read_text()
    return sources


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def import_graph(sources: Sources) -> dict[str, frozenset[str]]:
    known = frozenset(module_name(path) for path in sources)
    return {module_name(path): frozenset(imported_modules(path, source, known)) for path, source in sources.items()}


def imported_modules(path: str, source: str, known: frozenset[str]) -> Iterator[str]:
    """Names of the modules that a file imports: at its top, inside functions, for types only, or by import_module."""
    for node in ast.walk(ast.parse(source, path)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = imported_base(path, node)
                # `from package import name` imports a module or something inside one: known names decide.
                yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def imported_base(path: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parents = path.removesuffix(".py").split("/")[: -node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


def forbidden_packages(graph: Graph) -> list[str]:
    """Trainer and service never import each other; the contract imports neither; none imports examples or tests."""
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if target.split(".")[0] in FORBIDDEN[module.split(".")[0]]
    ]


def upward_imports(graph: Graph) -> list[str]:
    """Inside a package, imports point to lower layers, never up and never sideways."""
    found = []
    for module, targets in graph.items():
        package, _, rest = module.partition(".")
        if package not in LAYERS or not rest:
            continue
        component = rest.split(".")[0]
        rank = layer_of(package, component)
        if rank is None:
            found.append(f"{module} has no layer; give {component!r} one in LAYERS")
            continue
        for target in sorted(targets):
            other = target.removeprefix(f"{package}.").split(".")[0]
            other_rank = layer_of(package, other) if is_within(target, package) and target != package else None
            allowed = other_rank is None or other == component or other_rank > rank
            both_at_the_bottom = rank == other_rank == len(LAYERS[package]) - 1
            if not allowed and not both_at_the_bottom:
                found.append(f"{module} imports {target}, which is no lower layer")
    return found


def layer_of(package: str, component: str) -> int | None:
    """Index of a component's layer, 0 at the top; None for a component without one."""
    return next((rank for rank, layer in enumerate(LAYERS[package]) if component in layer), None)


def foreign_libraries(graph: Graph) -> list[str]:
    """Each heavy library is imported by its owner alone."""
    return [
        f"{module} imports {target}, which belongs to {', '.join(OWNERS[target.split('.')[0]])}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if not any(is_within(module, owner) for owner in OWNERS.get(target.split(".")[0], (module,)))
    ]


def leaked_stubs(graph: Graph) -> list[str]:
    """Generated messages stop at the transports and at the trainer's client."""
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if is_stub(target) and not any(is_within(module, owner) for owner in STUB_OWNERS)
    ]


def imported_plugins(graph: Graph) -> list[str]:
    """A plugin acts when imported, so only its host may import it."""
    return [
        f"{module} imports {target}" for module, targets in graph.items() for target in targets.intersection(PLUGINS)
    ]


def cycles(graph: Graph) -> list[str]:
    """No module imports itself by way of others."""
    try:
        graphlib.TopologicalSorter({module: targets & graph.keys() for module, targets in graph.items()}).prepare()
    except graphlib.CycleError as exc:
        return [" -> ".join(exc.args[1])]
    return []


def side_effects(sources: Sources) -> list[str]:
    """Importing a module defines things and does nothing else."""
    return [
        f"{path}:{statement.lineno} runs at import: {ast.unparse(statement).splitlines()[0]}"
        for path, source in sources.items()
        if module_name(path) not in PLUGINS
        for statement in effective_statements(ast.parse(source, path).body)
    ]


def effective_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at module or class level that do more than import, define, name a value or document it."""
    for statement in body:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Pass():
                pass
            case ast.ClassDef():
                yield from effective_statements(statement.body)
            case ast.Expr(value=ast.Constant()):
                pass
            case ast.Assign() | ast.AnnAssign() if all(map(is_name, assigned_targets(statement))):
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from effective_statements([*statement.body, *statement.orelse])
            case ast.If(test=ast.Compare(left=ast.Name(id="__name__")), orelse=[]):
                pass
            case _:
                yield statement


def assigned_targets(statement: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return statement.targets if isinstance(statement, ast.Assign) else [statement.target]


def is_name(target: ast.expr) -> bool:
    """Whether an assignment binds a name of its own: `os.environ["X"] = ...` changes someone else's state."""
    return isinstance(target, ast.Name) or (isinstance(target, ast.Tuple) and all(map(is_name, target.elts)))


def loaded_heavy_modules(module: str, search_path: Path) -> list[str]:
    """Which of HEAVY a fresh interpreter holds after importing one module."""
    program = (
        "import importlib, json, sys; "
        f"sys.path.insert(0, {str(search_path)!r}); importlib.import_module({module!r}); "
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return sorted(HEAVY.intersection(json.loads(finished.stdout)))
