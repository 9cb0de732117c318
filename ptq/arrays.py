"""How do arrays become files?

npy and npz without pickles, with bytes that depend on the arrays alone.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def npz_from_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns arrays by name as one npz file without pickles."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def arrays_from_npz(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an npz file; pickles are refused."""
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def npy_from_array(array: np.ndarray) -> bytes:
    """Returns an array as an npy file without pickles."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
