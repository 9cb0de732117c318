"""Which versions of libraries and sources made a result?"""

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

# Distributions by the name they are imported under.
LIBRARIES = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "numba": "numba", "scipy": "scipy",
    "onnx": "onnx", "onnx_graphsurgeon": "onnx-graphsurgeon", "onnxruntime": "onnxruntime", "openvino": "openvino",
    "pytorch_quantization": "pytorch-quantization", "PIL": "pillow",
}  # fmt: skip


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
    root = Path(__file__).resolve().parents[1]
    paths = [path for package in ("ptq", "tasks", "flows") for path in (root / package).rglob("*")]
    total = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".py", ".j2")):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
