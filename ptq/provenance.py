"""Which versions of libraries and sources made a result?

The sources are those that this program runs, read when it starts: files that are edited or pulled later change nothing.
"""

import hashlib
import importlib.metadata
import sys
from collections.abc import Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

from ptq.errors import ArtifactError

# Distributions by the name they are imported under.
LIBRARIES = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "numba": "numba", "scipy": "scipy",
    "onnx": "onnx", "onnx_graphsurgeon": "onnx-graphsurgeon", "onnxruntime": "onnxruntime", "openvino": "openvino",
    "pytorch_quantization": "pytorch-quantization", "PIL": "pillow",
}  # fmt: skip
_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("ptq", "tasks", "flows")


def read_sources(root: Path) -> dict[str, bytes]:
    """Returns the content of every source of `ptq`, `tasks` and `flows` below a folder, by relative name, sorted."""
    found = (path for package in _PACKAGES for path in (root / package).rglob("*"))
    paths = sorted(path for path in found if path.suffix in (".py", ".j2") and path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


# What this program runs. `ptq`, `tasks` and `flows` import this module before any other of theirs.
SOURCES = read_sources(_ROOT)


@cache
def library_versions(names: tuple[str, ...] = tuple(LIBRARIES.values())) -> dict[str, str]:
    """Returns the installed version of each distribution, empty for one that is not installed."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def package_digest() -> str:
    """Returns the SHA-256 of all sources of `ptq`, `tasks` and `flows`, by relative name and content."""
    total = hashlib.sha256()
    for file, content in SOURCES.items():
        total.update(f"{file}\0".encode())
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def refuse_changed_sources() -> None:
    """Makes the import of a module fail whose file is not what it was when the program started.

    Its code would run under the key of the code that was there. What is loaded stays what it is, so a program that has
    loaded all that it needs is not disturbed.

    Raises:
        ArtifactError: a file has changed already, and may have been loaded since.
    """
    for file in SOURCES:
        _refuse_changed(file)
    if not any(isinstance(finder, _UnchangedSources) for finder in sys.meta_path):
        sys.meta_path.insert(0, _UnchangedSources())


def _refuse_changed(file: str) -> None:
    path = _ROOT / file
    if not path.is_file() or path.read_bytes() != SOURCES.get(file):
        raise ArtifactError(
            f"{file} was changed since this program started, which would mix the old code with the new, so nothing of "
            "it was kept. Start the program again: stages that have ended are found in the store."
        )


class _UnchangedSources(MetaPathFinder):
    """Finds nothing itself."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Leaves the module to the finders that follow.

        Raises:
            ArtifactError: the module's file was changed since the program started.
        """
        stem = fullname.replace(".", "/")
        if stem.partition("/")[0] in _PACKAGES:
            for file in (f"{stem}.py", f"{stem}/__init__.py"):
                if file in SOURCES or (_ROOT / file).is_file():
                    _refuse_changed(file)
