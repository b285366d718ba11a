"""Python packages read from their source files, never imported: what a name is, what it takes, and what it has."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
_LAZY_TARGET = ":"
"""Between module and name in a table of names that are imported when they are first used, as in vllm/__init__.py."""


class UnreadableError(Exception):
    """A source file that can't be read or parsed."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import binds a name to."""

    module: str
    """Full name."""
    name: str | None
    """In that module; None: the module itself."""


Binding = ast.ClassDef | Function | ast.Assign | ast.AnnAssign | Imported


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One parsed file."""

    name: str
    path: Path
    """Relative to the root of its tree."""
    source: str
    tree: ast.Module
    names: dict[str, Binding]
    """What its top level binds."""
    stars: tuple[str, ...]
    """Modules of which it imports all names."""


@dataclass(frozen=True, slots=True, eq=False)
class Definition:
    """Where a name is defined."""

    module: Module
    node: ast.Module | ast.ClassDef | Function | ast.Assign | ast.AnnAssign | None
    """None: imported from another package, or made by a module's `__getattr__`."""

    @property
    def place(self) -> str:
        """`file:line`."""
        line = getattr(self.node, "lineno", None)
        return f"{self.module.path}" if line is None else f"{self.module.path}:{line}"

    @property
    def source(self) -> str:
        """Its text."""
        if self.node is None or isinstance(self.node, ast.Module):
            return self.module.source
        lines = self.module.source.splitlines()
        return "\n".join(lines[self.node.lineno - 1 : self.node.end_lineno])


class SourceTree:
    """The packages below one folder. Each file is read once; what one package imports from another is not looked at."""

    def __init__(self, root: Path) -> None:
        """A tree of which nothing is read yet.

        Args:
            root: the folder that holds the packages, such as site-packages.
        """
        self._root = root
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """A module by its full name; None where there is no file for it.

        Raises:
            UnreadableError: there is one, and it can't be read or parsed.
        """
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def find(self, module: str, dotted: str) -> Definition | None:
        """What `dotted` is in a module, imports, aliases and base classes followed; None where there is no such name.

        Raises:
            UnreadableError: a file on the way can't be read or parsed.
        """
        first, *rest = dotted.split(".")
        found = self._resolve(module, first, frozenset())
        for name in rest:
            if found is None:
                return None
            found = self.member(found, name)
        return found

    def member(self, owner: Definition, name: str) -> Definition | None:
        """A name in a class, its base classes included, or in a module."""
        if isinstance(owner.node, ast.Module):
            return self._resolve(owner.module.name, name, frozenset())
        for one in self.lineage(owner):
            binding = _names(_bindings(_body_of(one), one.module.name, is_package=False)).get(name)
            if binding is not None and not isinstance(binding, Imported):
                return Definition(one.module, binding)
        return None

    def lineage(self, owner: Definition) -> list[Definition]:
        """A class and its base classes as far as they lie in its package, nearest first."""
        found: list[Definition] = []
        waiting = [owner]
        while waiting:
            one = waiting.pop(0)
            if isinstance(one.node, ast.ClassDef) and all(one.node is not other.node for other in found):
                found.append(one)
                bases = (self._evaluate(expression, one.module.name) for expression in one.node.bases)
                waiting = [*(base for base in bases if base is not None), *waiting]
        return found

    def attributes(self, owner: Definition) -> frozenset[str]:
        """Names that a class or its base classes declare, or assign to `self` in any of their methods."""
        return frozenset(name for one in self.lineage(owner) for name in self.attributes_of(one.node))

    def parameters(self, found: Definition) -> tuple[str, ...] | None:
        """How a function is called: names in order, with `/`, `*`, `*args` and `**kwargs` where Python writes them.

        Of a class, its constructor's; where it has none of its own, its annotated fields, as a dataclass, a NamedTuple
        or a Struct takes them. None: what was found can't be called, or can't be seen into.
        """
        if isinstance(found.node, Function):
            return self.parameters_of(found.node)
        if not isinstance(found.node, ast.ClassDef):
            return None
        constructor = self.member(found, "__init__")
        if constructor is not None and isinstance(constructor.node, Function):
            return self.parameters_of(constructor.node)
        fields: dict[str, None] = {}
        for one in reversed(self.lineage(found)):
            fields |= dict.fromkeys(_fields(one.node))
        return tuple(fields)

    @staticmethod
    def parameters_of(function: Function) -> tuple[str, ...]:
        """A function's, see `parameters`."""
        arguments = function.args
        positional = [one.arg for one in arguments.posonlyargs]
        names = [*positional, *(["/"] if positional else []), *(one.arg for one in arguments.args)]
        if arguments.vararg is not None:
            names.append(f"*{arguments.vararg.arg}")
        elif arguments.kwonlyargs:
            names.append("*")
        names += [one.arg for one in arguments.kwonlyargs]
        return (*names, *([] if arguments.kwarg is None else [f"**{arguments.kwarg.arg}"]))

    @staticmethod
    def attributes_of(node: ast.AST | None) -> Iterator[str]:
        """One class's, see `attributes`."""
        if not isinstance(node, ast.ClassDef):
            return
        for name, binding in _bindings(node.body, "", is_package=False):
            yield name
            if isinstance(binding, Function) and binding.args.args:
                yield from _assigned_to(binding.args.args[0].arg, binding)

    def _read(self, name: str) -> Module | None:
        path = self._path(name)
        if path is None:
            return None
        relative = path.relative_to(self._root)
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError) as exc:
            raise UnreadableError(f"{relative} can't be read: {exc}") from exc
        bound = list(_bindings(tree.body, name, is_package=path.name == "__init__.py"))
        stars = tuple(one.module for star, one in bound if star == "*" and isinstance(one, Imported))
        return Module(name, relative, source, tree, _names(bound), stars)

    def _path(self, name: str) -> Path | None:
        base = self._root.joinpath(*name.split("."))
        candidates = (base / "__init__.py", base.with_name(f"{base.name}.py"))
        try:
            return next((path for path in candidates if path.is_file()), None)
        except OSError as exc:
            raise UnreadableError(f"{base} can't be looked into: {exc}") from exc

    def _resolve(self, module_name: str, name: str, seen: frozenset[tuple[str, str]]) -> Definition | None:
        module = self.module(module_name)
        if module is None or (module_name, name) in seen:
            return None
        seen |= {(module_name, name)}
        binding = module.names.get(name)
        match binding:
            case None:
                return self._resolve_unbound(module, name, seen)
            case Imported():
                return self._follow(module, binding, seen)
            case ast.Assign(value=ast.Name(id=other)) if other != name:
                return self._resolve(module_name, other, seen) or Definition(module, binding)
            case _:
                return Definition(module, binding)

    def _follow(self, module: Module, binding: Imported, seen: frozenset[tuple[str, str]]) -> Definition | None:
        if binding.module.split(".")[0] != module.name.split(".")[0]:
            return Definition(module, None)
        if binding.name is not None:
            return self._resolve(binding.module, binding.name, seen)
        target = self.module(binding.module)
        return None if target is None else Definition(target, target.tree)

    def _resolve_unbound(self, module: Module, name: str, seen: frozenset[tuple[str, str]]) -> Definition | None:
        """A name that the top level does not bind: a submodule, or one that comes by `*`, a table or `__getattr__`."""
        submodule = self.module(f"{module.name}.{name}")
        if submodule is not None:
            return Definition(submodule, submodule.tree)
        target = _lazy_target(module, name)
        if target is not None:
            return self._follow(module, target, seen)
        for star in module.stars:
            found = self._resolve(star, name, seen)
            if found is not None:
                return found
        by_call = module.names.get("__getattr__")
        if isinstance(by_call, Function) and name in _strings(by_call):
            return Definition(module, None)
        return None

    def _evaluate(self, expression: ast.expr, module_name: str) -> Definition | None:
        """What a base class's expression names; None where that can't be found."""
        if isinstance(expression, ast.Subscript):  # Generic[T]
            expression = expression.value
        return self.find(module_name, ast.unparse(expression))


def _body_of(found: Definition) -> Sequence[ast.stmt]:
    return found.node.body if isinstance(found.node, ast.ClassDef) else []


def _bindings(body: Sequence[ast.stmt], module: str, *, is_package: bool) -> Iterator[tuple[str, Binding]]:
    """Names that statements bind, in whichever branch of an `if`, `try` or `with` they stand."""
    for statement in body:
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield statement.name, statement
            case ast.Assign() | ast.AnnAssign():
                yield from ((name, statement) for name in _target_names(statement))
            case ast.Import():
                for alias in statement.names:
                    name = alias.asname or alias.name.split(".")[0]
                    yield name, Imported(alias.name if alias.asname else name, None)
            case ast.ImportFrom():
                base = _absolute(statement, module, is_package=is_package)
                yield from ((alias.asname or alias.name, Imported(base, alias.name)) for alias in statement.names)
            case ast.If() | ast.Try() | ast.With():
                yield from _bindings(_branches(statement), module, is_package=is_package)


def _names(bindings: Iterable[tuple[str, Binding]]) -> dict[str, Binding]:
    """The binding of each name that counts: the last of several functions, as with overloads; otherwise the first.

    A definition or an import counts before any assignment, such as the None of a failed import.
    """
    names: dict[str, Binding] = {}
    for name, binding in bindings:
        earlier = names.get(name)
        both_functions = isinstance(earlier, Function) and isinstance(binding, Function)
        if earlier is None or isinstance(earlier, ast.Assign | ast.AnnAssign) or both_functions:
            names[name] = binding
    return names


def _branches(statement: ast.If | ast.Try | ast.With) -> list[ast.stmt]:
    handlers = [inner for handler in getattr(statement, "handlers", []) for inner in handler.body]
    return [*statement.body, *handlers, *getattr(statement, "orelse", []), *getattr(statement, "finalbody", [])]


def _target_names(statement: ast.Assign | ast.AnnAssign) -> list[str]:
    return [
        node.id
        for target in _targets(statement)
        for node in ast.walk(target)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]


def _absolute(statement: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    """The full name of the module that a relative import names."""
    if statement.level == 0:
        return statement.module or ""
    parts = module.split(".")
    parents = parts[: len(parts) - statement.level + is_package]
    return ".".join([*parents, *([statement.module] if statement.module else [])])


def _lazy_target(module: Module, name: str) -> Imported | None:
    """Where a table such as `{"LLM": ".entrypoints.llm:LLM"}` has a name from."""
    for binding in module.names.values():
        if not isinstance(binding, ast.Assign | ast.AnnAssign) or not isinstance(binding.value, ast.Dict):
            continue
        for key, value in zip(binding.value.keys, binding.value.values, strict=True):
            match key, value:
                case ast.Constant(value=found), ast.Constant(value=str(text)) if found == name and _LAZY_TARGET in text:
                    target, _, attribute = text.partition(_LAZY_TARGET)
                    return Imported(f"{module.name}{target}" if target.startswith(".") else target, attribute)
    return None


def _strings(node: ast.AST) -> frozenset[str]:
    return frozenset(
        one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)
    )


def _fields(node: ast.AST | None) -> Iterator[str]:
    """A class's annotated fields that its constructor takes."""
    if not isinstance(node, ast.ClassDef):
        return
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)) if "ClassVar" not in ast.unparse(statement.annotation):
                if not _is_no_argument(statement.value):
                    yield name


def _is_no_argument(value: ast.expr | None) -> bool:
    """Whether a field is declared as `field(init=False)`."""
    return isinstance(value, ast.Call) and any(
        one.arg == "init" and isinstance(one.value, ast.Constant) and one.value.value is False for one in value.keywords
    )


def _assigned_to(owner: str, function: Function) -> Iterator[str]:
    """Attributes that a function assigns to its first parameter."""
    for statement in _statements(function):
        for node in (node for target in _targets(statement) for node in ast.walk(target)):
            match node:
                case ast.Attribute(value=ast.Name(id=name), attr=attribute, ctx=ast.Store()) if name == owner:
                    yield attribute


def _targets(statement: ast.stmt) -> list[ast.expr]:
    match statement:
        case ast.Assign():
            return statement.targets
        case ast.AnnAssign() | ast.AugAssign() | ast.For() | ast.AsyncFor():
            return [statement.target]
        case ast.With() | ast.AsyncWith():
            return [item.optional_vars for item in statement.items if item.optional_vars is not None]
        case _:
            return []


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements below a node. Expressions, which are most of a file, are passed over."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(child)
