"""Which code does a stage's result depend on?

Reads sources without importing them. From a stage's function it follows names, through imports into `ptq` and
`tasks`, to every function, class and module-level assignment that can be reached, and digests those symbols alone. A
symbol counts by its syntax tree without docstrings and positions, so comments, docstrings and formatting change
nothing. It also tells which numeric libraries those symbols name; their versions belong to the key as well.

Where names cannot be followed the answer is too much rather than too little: a module that is passed around counts
whole, so does one that imports by a computed name; the statements that a module runs on import count for each of its
symbols, and a local name counts as the module's symbol of that name.
"""

import ast
import contextlib
import copy
import gc
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ptq.provenance import LIBRARIES

# What a result never depends on, and why.
NOT_COUNTED = {
    "ptq.storage.store": "moves bytes that are verified by their SHA-256",
    "ptq.storage.backend": "moves bytes that are verified by their SHA-256",
    "ptq.storage.s3_bucket": "moves bytes that are verified by their SHA-256",
    "ptq.storage.s3_reader": "moves bytes that are known by their SHA-256",
    "ptq.data.remote_inputs": "moves bytes that are known by their SHA-256",
    "ptq.storage.cache": "moves bytes that are verified by their SHA-256",
    "tasks.runtime.code_digest": "is what makes the key",
    "tasks.runtime.stage": "decides whether a stage runs, not what it computes",
    "tasks.runtime.progress": "tells how far a stage has come",
    "tasks.runtime.retries": "decides whether a stage is tried again",
}
_DYNAMIC = frozenset({"import_module", "__import__", "globals", "eval", "exec"})
_DYNAMIC_ATTRIBUTE = "import_module"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True)
class StageCode:
    """The code of a stage: its SHA-256, the symbols that count, and the distributions they name, both sorted."""

    sha256: str
    symbols: tuple[str, ...]
    libraries: tuple[str, ...]


@cache
def code_of_stage(function: Callable[..., Any]) -> StageCode:
    """Returns the code that a stage's function depends on, read once per process.

    Raises:
        ValueError: the function does not come from a file.
    """
    module = sys.modules.get(function.__module__)
    file = getattr(module, "__file__", None)
    if not file:
        raise ValueError(f"Stage {function.__name__} comes from no file, so its code cannot be told from another's.")
    tree = _installed_sources()
    name = tree.module_of(Path(file)) or tree.add(function.__module__, Path(file))
    return tree.code_of(name, function.__qualname__)


@cache
def _installed_sources() -> "SourceTree":
    return SourceTree(Path(__file__).resolve().parents[1])


@dataclass(slots=True)
class _Symbol:
    """What a name of a module stands for: its statements as text, and the dotted names they use."""

    text: str = ""
    names: set[tuple[str, ...]] = field(default_factory=set)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    is_dynamic: bool = False


@dataclass(slots=True)
class _Module:
    """A parsed file: statements by the name they give a value to, and imported names.

    Under the empty name are the statements that do something else when the module is imported.
    """

    name: str
    path: Path
    statements: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str]]
    stars: list[str]

    @property
    def package(self) -> str:
        """What relative imports start from."""
        return self.name if self.path.stem == "__init__" else self.name.rpartition(".")[0]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Holds the garbage collector: it would pass over the growing trees again and again, half of the time taken."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class SourceTree:
    """The sources of the packages `ptq` and `tasks` below a folder, each file parsed once.

    Args:
        root: the folder that holds the packages.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._paths: dict[str, Path] = {}
        self._modules: dict[str, _Module] = {}
        self._symbols: dict[tuple[str, str], _Symbol] = {}
        for package in ("ptq", "tasks"):
            for path in (root / package).rglob("*.py"):
                parts = path.relative_to(root).with_suffix("").parts
                self._paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def module_of(self, path: Path) -> str:
        """Returns the dotted name of a file of the tree, empty for another file."""
        resolved = path.resolve()
        return next((name for name, known in self._paths.items() if known.resolve() == resolved), "")

    def add(self, module: str, path: Path) -> str:
        """Adds a file that is outside the packages and returns its name."""
        self._paths[module] = path
        return module

    def code_of(self, module: str, function: str) -> StageCode:
        """Returns the code that a function at the top of a module depends on; its decorators do not count.

        A function that is not at the top of its module counts as the whole module.
        """
        with _no_collection():
            return self._code_of(module, function)

    def _code_of(self, module: str, function: str) -> StageCode:
        seen: dict[tuple[str, str], _Symbol] = {}
        libraries: set[str] = set()
        is_known = function in self._module(module).statements
        pending = [(module, function)] if is_known else list(self._whole(module))
        while pending:
            key = pending.pop()
            if key in seen or key[0] in NOT_COUNTED:
                continue
            symbol = seen[key] = self._symbol(*key, decorated=key != (module, function))
            pending.extend((owner, "") for owner in (key[0], *_parents(key[0])) if owner in self._paths)
            if symbol.is_dynamic:
                pending.extend(self._whole(key[0]))
            for target in self._used(key[0], symbol):
                if isinstance(target, str):
                    libraries.add(target)
                else:
                    pending.append(target)
        total = hashlib.sha256()
        for (owner, name), symbol in sorted(seen.items(), key=lambda item: item[0]):
            total.update(f"{owner}\0{name}\0{symbol.text}\0".encode())
        symbols = tuple(sorted(f"{owner}.{name}" for owner, name in seen if name))
        return StageCode(total.hexdigest(), symbols, tuple(sorted(libraries)))

    def _symbol(self, module: str, name: str, *, decorated: bool) -> _Symbol:
        if (module, name) not in self._symbols or not decorated:
            found = self._module(module)
            nodes = found.statements[name]
            symbol = _symbol_of(nodes if decorated else [_undecorated(node) for node in nodes], found)
            if not decorated:
                return symbol
            self._symbols[module, name] = symbol
        return self._symbols[module, name]

    def _whole(self, module: str) -> Iterator[tuple[str, str]]:
        """Every symbol of a module, and of those it star-imports."""
        found = self._module(module)
        yield from ((module, name) for name in found.statements)
        for other in found.stars:
            yield from self._whole(other)

    def _used(self, module: str, symbol: _Symbol) -> Iterator[tuple[str, str] | str]:
        """What the names of a symbol stand for: symbols of the tree, or distributions."""
        owner = self._module(module)
        for name, *attributes in symbol.names:
            if name and name in owner.statements:
                yield module, name
            for imports in (symbol.imports, owner.imports):
                if name in imports:
                    yield from self._imported(*imports[name], tuple(attributes))
            for other in owner.stars:
                if name in self._module(other).statements:
                    yield other, name

    def _imported(self, module: str, name: str, attributes: tuple[str, ...]) -> Iterator[tuple[str, str] | str]:
        """What `from module import name`, followed by attributes, stands for; an empty name is the module itself."""
        steps = [*([name] if name else []), *attributes]
        while steps and f"{module}.{steps[0]}" in self._paths:
            module = f"{module}.{steps.pop(0)}"
        if module not in self._paths:
            yield from (LIBRARIES[part] for part in (*module.split("."), *steps) if part in LIBRARIES)
        elif module in NOT_COUNTED:
            return
        elif steps and steps[0] in self._module(module).statements:
            yield module, steps[0]
        elif steps and steps[0] in self._module(module).imports:
            yield from self._imported(*self._module(module).imports[steps[0]], tuple(steps[1:]))
        else:
            yield from self._whole(module)

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _parsed(name, self._paths[name])
        return self._modules[name]


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _undecorated(node: ast.stmt) -> ast.stmt:
    if not isinstance(node, _DEFINITIONS):
        return node
    bare = copy.copy(node)
    bare.decorator_list = []
    return bare


def _parsed(name: str, path: Path) -> _Module:
    module = _Module(name, path, {"": []}, {}, [])
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imports.update(_bindings(node, module.package))
            module.stars += _stars(node, module.package)
            continue
        bound = _bound_names(node)
        for each in bound:
            module.statements.setdefault(each, []).append(node)
        is_definition = bool(bound) and isinstance(node, (*_DEFINITIONS, ast.Assign, ast.AnnAssign))
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_definition and not is_text and not _is_main_guard(node):
            module.statements[""].append(node)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    module.imports.update(_bindings(inner, module.package))
    return module


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in {
        part.value for part in ast.walk(node.test) if isinstance(part, ast.Constant)
    }


def _bound_names(node: ast.stmt) -> set[str]:
    """The names that a statement of a module gives a value to."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)} | {
        part.name for part in ast.walk(node) if isinstance(part, _DEFINITIONS)
    }


def _bindings(node: ast.Import | ast.ImportFrom, package: str) -> dict[str, tuple[str, str]]:
    """Imported names with the module and the name in it that each stands for; an empty name is the module."""
    if isinstance(node, ast.ImportFrom):
        base = _base(node, package)
        return {alias.asname or alias.name: (base, alias.name) for alias in node.names if alias.name != "*"}
    return {
        alias.asname or alias.name.split(".")[0]: (alias.name if alias.asname else alias.name.split(".")[0], "")
        for alias in node.names
    }


def _base(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *(node.module.split(".") if node.module else [])])


def _stars(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    is_star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    base = _base(node, package) if isinstance(node, ast.ImportFrom) and is_star else ""
    return [base] if base.split(".")[0] in ("ptq", "tasks") else []


def _symbol_of(nodes: Iterable[ast.stmt], module: _Module) -> _Symbol:
    symbol = _Symbol()
    words: list[str] = []
    for node in nodes:
        _read(node, words, symbol, module)
    symbol.text = "".join(words)
    return symbol


def _read(node: ast.AST, words: list[str], symbol: _Symbol, module: _Module) -> None:
    """Adds a node without its docstring to `words`, and what it uses to `symbol`."""
    words.append(f"({type(node).__name__}")
    if isinstance(node, ast.Attribute) and (dotted := _dotted(node)):
        # Read at once: a module's name by itself would count as the whole module.
        words.append(f" {dotted} {type(node.ctx).__name__})")
        symbol.names.add(dotted)
        symbol.is_dynamic |= node.attr == _DYNAMIC_ATTRIBUTE
        return
    _note(node, words, symbol, module)
    has_docstring = isinstance(node, _DEFINITIONS) and ast.get_docstring(node, clean=False) is not None
    for name in node._fields:
        value = getattr(node, name, None)
        if isinstance(value, ast.AST):
            _read(value, words, symbol, module)
        elif isinstance(value, list):
            words.append("[")
            for item in value[1:] if has_docstring and name == "body" else value:
                if isinstance(item, ast.AST):
                    _read(item, words, symbol, module)
                else:
                    words.append(repr(item))
            words.append("]")
        else:
            words.append(f" {value!r}")
    words.append(")")


def _note(node: ast.AST, words: list[str], symbol: _Symbol, module: _Module) -> None:
    """Adds the names that a node uses."""
    if isinstance(node, ast.Name):
        symbol.names.add((node.id,))
        symbol.is_dynamic |= node.id in _DYNAMIC
    elif isinstance(node, ast.Import | ast.ImportFrom):
        symbol.imports.update(_bindings(node, module.package))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".j2"):
        template = module.path.parent / node.value
        words.append(hashlib.sha256(template.read_bytes()).hexdigest() if template.is_file() else "")
    for field_name in ("annotation", "returns"):
        quoted = getattr(node, field_name, None)
        if isinstance(quoted, ast.Constant) and isinstance(quoted.value, str):
            _read(ast.parse(quoted.value, mode="eval"), words, symbol, module)


def _dotted(node: ast.Attribute) -> tuple[str, ...]:
    """`a.b.c` as ("a", "b", "c"); empty for an attribute of something that is not a name."""
    parts: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return (inner.id, *reversed(parts)) if isinstance(inner, ast.Name) else ()
