"""Which code does a stage's result depend on?

Reads the sources as they were when the program started, without importing them. From a stage's function it follows
names, through imports into `ptq` and `tasks`, to every function, class and assignment that can be reached, and digests
their syntax trees without docstrings and positions, so comments, docstrings and formatting change nothing. It also
tells which numeric libraries these name; their versions belong to the key as well.

Where names cannot be followed the answer is too much rather than too little: a module that is passed around counts
whole, and what a module does when it is imported counts for whoever imports it. Why symbols and not whole modules:
`docs/decisions/0002-code-digests-per-symbol.md`.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ptq.provenance import LIBRARIES, SOURCES, refuse_changed_sources

# What a result never depends on, and why.
NOT_COUNTED = {
    "ptq.storage.store": "moves bytes that are verified by their SHA-256",
    "ptq.storage.backend": "moves bytes that are verified by their SHA-256",
    "ptq.storage.s3_bucket": "moves bytes that are verified by their SHA-256",
    "ptq.storage.s3_reader": "moves bytes that are known by their SHA-256",
    "ptq.data.remote_inputs": "moves bytes that are known by their SHA-256",
    "ptq.storage.cache": "moves bytes that are verified by their SHA-256",
    "ptq.provenance": "is what makes the key",
    "tasks.runtime.code_digest": "is what makes the key",
    "tasks.runtime.stage": "decides whether a stage runs, not what it computes",
    "tasks.runtime.progress": "tells how far a stage has come",
}
# Decorators that make a definition; any other may register it somewhere, so the definition counts as done on import.
_PLAIN = frozenset({"dataclass", "cache", "lru_cache", "contextmanager", "runtime_checkable", "njit", "task"})
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_ON_IMPORT = ""
# With these a module reaches what it does not name, so all of it counts.
_DYNAMIC = {"globals", "eval", "exec", "__import__", "import_module"}

refuse_changed_sources()


@dataclass(frozen=True, slots=True)
class StageCode:
    """The code of a stage: its SHA-256, and the distributions of the numeric libraries it imports, sorted."""

    sha256: str
    libraries: tuple[str, ...]


@cache
def code_of_stage(function: Callable[..., Any]) -> StageCode:
    """Returns the code that a stage's function depends on, as it was when the program started.

    Raises:
        ValueError: the function does not come from a file.
    """
    name, tree = function.__module__, _sources_at_start()
    if name not in tree.sources:
        file = getattr(sys.modules.get(name), "__file__", None)
        if not file:
            raise ValueError(
                f"Stage {function.__name__} comes from no file, so its code cannot be told from another's."
            )
        tree.sources[name] = Path(file).read_bytes()
    return tree.code_of(name, function.__qualname__)


@cache
def _sources_at_start() -> "SourceTree":
    return SourceTree(SOURCES)


@dataclass(frozen=True, slots=True)
class _Module:
    """A parsed file: its statements by the name they give a value to, and what its imported names stand for.

    Under the name `_ON_IMPORT` is what it does when it is imported, other than to define and to import. `parts` are
    the digests of its symbols and the dotted names that they use, as far as they were asked for.
    """

    package: str
    statements: dict[str, list[ast.stmt]] = field(default_factory=lambda: {_ON_IMPORT: []})
    imports: dict[str, set[str]] = field(default_factory=dict)
    parts: dict[str, tuple[str, set[str]]] = field(default_factory=dict)


class SourceTree:
    """The modules of the packages, each parsed once.

    Args:
        files: content of files by their path relative to the folder that holds the packages.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        dotted = {file: file.removesuffix(".py").replace("/", ".") for file in files if file.endswith(".py")}
        self.sources = {name.removesuffix(".__init__"): files[file] for file, name in dotted.items()}
        self._packages = {name.removesuffix(".__init__") for name in dotted.values() if name.endswith(".__init__")}
        self._modules: dict[str, _Module] = {}

    def code_of(self, module: str, function: str) -> StageCode:
        """Returns the code that a function depends on; one that is not at the top of its module counts as all of it."""
        seen: dict[tuple[str, str], str] = {}
        libraries: set[str] = set()
        is_known = function in self._module(module).statements
        pending = [(module, function)] if is_known else list(self._targets(module))
        while pending:
            key = pending.pop()
            if key in seen or key[0] in NOT_COUNTED:
                continue
            seen[key], used = self._part(*key)
            loaded = self._loaded(key[0]) if key[1] == _ON_IMPORT else {key[0]}
            pending.extend((each, _ON_IMPORT) for each in loaded)
            pending.extend(target for name in used for target in self._targets(name))
            libraries.update(LIBRARIES[top] for top in {name.split(".")[0] for name in used} & LIBRARIES.keys())
        parts = "".join(f"{owner}:{symbol} {digest}\n" for (owner, symbol), digest in sorted(seen.items()))
        return StageCode(hashlib.sha256(parts.encode()).hexdigest(), tuple(sorted(libraries)))

    def _part(self, module: str, symbol: str) -> tuple[str, set[str]]:
        """The digest of a symbol's statements and the dotted names that they use."""
        found = self._module(module)
        if symbol not in found.parts:
            nodes = found.statements[symbol]
            used = set(found.imports.get("*", ()))
            for word, *attributes in _names(nodes, found.package):
                if not word:
                    used.update(attributes)
                elif word in _DYNAMIC or attributes[-1:] == ["import_module"]:
                    used.add(module)
                elif word in found.statements:
                    used.add(f"{module}.{word}")
                used.update(".".join([name, *attributes]) for name in found.imports.get(word, ()))
            digest = hashlib.sha256("".join(map(ast.dump, nodes)).encode()).hexdigest()
            found.parts[symbol] = digest, used
        return found.parts[symbol]

    def _targets(self, name: str) -> Iterator[tuple[str, str]]:
        """The symbols that a dotted name stands for; all of a module's where it does not name one of them."""
        module = self._module_of(name)
        rest = name.removeprefix(module).strip(".").split(".")
        if not module or module in NOT_COUNTED:
            return
        found = self._module(module)
        if rest[0] and rest[0] in found.statements:
            yield module, rest[0]
        elif rest[0] in found.imports:
            for elsewhere in found.imports[rest[0]]:
                yield from self._targets(".".join([elsewhere, *rest[1:]]))
        else:
            yield from ((module, symbol) for symbol in found.statements)

    def _loaded(self, module: str) -> set[str]:
        """The modules that are imported before a module: its packages, and what its imports name."""
        imported = {self._module_of(name) for names in self._module(module).imports.values() for name in names}
        return {each for each in (*_parents(module), *imported) if each in self.sources}

    def _module_of(self, name: str) -> str:
        return next((each for each in (name, *_parents(name)) if each in self.sources), "")

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            package = name if name in self._packages else name.rpartition(".")[0]
            self._modules[name] = _parsed(self.sources[name], package)
        return self._modules[name]


def _parents(name: str) -> list[str]:
    """The packages of a dotted name, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _parsed(source: bytes, package: str) -> _Module:
    tree, module = ast.parse(source), _Module(package)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if isinstance(node, ast.FunctionDef):
            # How a stage runs is no part of what it computes.
            node.decorator_list = [each for each in node.decorator_list if _decorator(each) != "stage"]
    for node in tree.body:
        for inner in () if isinstance(node, _DEFINITIONS) else ast.walk(node):
            for name, dotted in _imported(inner, package):
                module.imports.setdefault(name, set()).add(dotted)
        for name in _bound_names(node):
            module.statements.setdefault(name, []).append(node)
        if not _only_defines(node):
            module.statements[_ON_IMPORT].append(node)
    return module


def _only_defines(node: ast.stmt) -> bool:
    if isinstance(node, _DEFINITIONS):
        return {*map(_decorator, node.decorator_list)} <= _PLAIN
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) or (
        isinstance(node, ast.Assign | ast.AnnAssign) and all(isinstance(each, ast.Name | ast.Tuple) for each in targets)
    )


def _decorator(node: ast.expr) -> str:
    """The last name of a decorator: `njit` of `@numba.njit(cache=True)`."""
    return ast.unparse(node).partition("(")[0].rpartition(".")[2]


def _bound_names(node: ast.stmt) -> set[str]:
    """The names that a statement of a module gives a value to."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return found | {part.name for part in ast.walk(node) if isinstance(part, _DEFINITIONS)}


def _imported(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """The names that an import binds, each with the dotted name that it stands for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name, alias.name
            if not alias.asname:
                yield alias.name.split(".")[0], alias.name.split(".")[0]
    elif isinstance(node, ast.ImportFrom):
        start = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
        base = ".".join([*start, *([node.module] if node.module else [])])
        yield from ((alias.asname or alias.name, f"{base}.{alias.name}") for alias in node.names)


def _names(nodes: Iterable[ast.AST], package: str) -> Iterator[list[str]]:
    """The names that nodes use, each in its parts; what is imported there, under an empty name."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Attribute) and (dotted := _dotted(node)):
            # Read at once: a module's name by itself would count as the whole module.
            yield dotted
            continue
        if isinstance(node, ast.Name):
            yield [node.id]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"(ptq|tasks)\.[\w.:]+", node.value):
                yield ["", node.value.replace(":", ".")]
            elif node.value.isidentifier() or "[" in node.value:
                # An annotation in quotes.
                yield from ([word] for word in re.findall(r"\w+", node.value))
        yield from (["", dotted] for _, dotted in _imported(node, package))
        pending.extend(ast.iter_child_nodes(node))


def _dotted(node: ast.Attribute) -> list[str]:
    """`a.b.c` as ["a", "b", "c"]; empty for an attribute of something that is not a name."""
    parts: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        parts.insert(0, inner.attr)
        inner = inner.value
    return [inner.id, *parts] if isinstance(inner, ast.Name) else []
