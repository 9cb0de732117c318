"""How are files written, digested and protected against a disk that fails?

Every write is complete or absent. Nothing here knows of stores.
"""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ptq.errors import ArtifactError


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


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turns what the disk refuses under `root` into ArtifactError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArtifactError(
            f"The folder {root} cannot be used: {error.strerror}. Expected free space, and permission to read and "
            "write. Nothing partial was left; mend it and run again."
        ) from error


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of the bytes of `path`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path]) -> str:
    """Returns the SHA-256 of a file; of several, that of their digests one after the other."""
    digests = [file_sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Writes a file outside the store, complete or not at all.

    Raises:
        ArtifactError: the file cannot be written.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(temporary, 0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
