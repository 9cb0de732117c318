"""What does a source file import?"""

import ast
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name, written out in full, and whether importing the file imports it."""

    name: str
    at_import: bool

    @property
    def top(self):
        return self.name.split(".")[0]

    def is_in(self, module):
        return self.name == module or self.name.startswith(f"{module}.")


def imports_of(source, file):
    """Every import of a file: plain, from, relative, deferred, and import_module with a literal name."""
    package = list(Path(file).parent.parts)
    found = []
    pending = [(ast.parse(source), True)]
    while pending:
        node, at_import = pending.pop()
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and is_dynamic_import(node):
            names = [node.args[0].value]
        found.extend(Import(name=name, at_import=at_import) for name in names)
        is_deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        pending.extend((child, at_import and not is_deferred) for child in ast.iter_child_nodes(node))
    return found


def is_dynamic_import(call):
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    is_literal = bool(call.args) and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    return function in {"import_module", "__import__"} and is_literal
