"""Where are objects of a distant store kept for reading?

A folder of this machine, shared by its processes: objects by their SHA-256, verified at every use, the least
recently used removed above a size. `PTQ_CACHE_DIR` and `PTQ_CACHE_GIB` set it up.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from ptq.errors import ArtifactError, UsageError
from ptq.files import disk_errors, file_sha256

DEFAULT_GIB = 20.0
# A path that was handed out may be opened a little later.
_KEPT_S = 3600.0
_TEMPORARY = ".fetched-"


def user_cache() -> "ObjectCache":
    """Returns the cache that the environment names, by default `~/.cache/ptq` with 20 GiB.

    Raises:
        UsageError: `PTQ_CACHE_GIB` is no number.
        ArtifactError: the folder cannot be created.
    """
    root = os.environ.get("PTQ_CACHE_DIR") or str(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptq"
    )
    asked = os.environ.get("PTQ_CACHE_GIB") or str(DEFAULT_GIB)
    try:
        gib = float(asked)
    except ValueError as error:
        raise UsageError(f"PTQ_CACHE_GIB is {asked!r}; expected a number of gibibytes, such as 20.") from error
    return ObjectCache(Path(root).absolute(), limit_bytes=int(gib * 2**30))


class ObjectCache:
    """Objects by SHA-256 in a folder.

    Args:
        root: the folder; it is created.
        limit_bytes: size above which the least recently used objects go, except those used in the last hour.
    """

    def __init__(self, root: Path, *, limit_bytes: int) -> None:
        self.root = root
        self._limit_bytes = limit_bytes
        # Looking through the folder for every object would cost more than fetching many small ones.
        self._unchecked_bytes = limit_bytes
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)

    def find(self, sha256: str) -> Path | None:
        """Returns the verified file of an object, None if it is not there; a damaged file is removed.

        Raises:
            ArtifactError: the file cannot be read, or is a symbolic link.
        """
        path = self._path(sha256)
        try:
            with disk_errors(self.root):
                found = file_sha256(path)
        except FileNotFoundError:
            return None
        if found != sha256:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return path

    def add(self, sha256: str, fetch: Callable[[Path], str]) -> tuple[Path | None, str]:
        """Keeps what `fetch` writes, if it is the object.

        Args:
            sha256: the object's digest.
            fetch: writes a file and returns the SHA-256 of what it wrote.

        Returns:
            The kept file, None where the digest was another one; and that digest.

        Raises:
            ArtifactError: the disk is full or may not be written.
        """
        temporary = self.root / f"{_TEMPORARY}{uuid.uuid4().hex}"
        target = self._path(sha256)
        try:
            with disk_errors(self.root):
                found = fetch(temporary)
                if found != sha256:
                    return None, found
                target.parent.mkdir(exist_ok=True)
                self._unchecked_bytes += temporary.stat().st_size
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        if self._unchecked_bytes > self._limit_bytes // 64:
            self._unchecked_bytes = 0
            self._shrink()
        return target, found

    def _path(self, sha256: str) -> Path:
        path = self.root / sha256[:2] / sha256
        if path.is_symlink():
            raise ArtifactError(f"{path} is a symbolic link; expected a file of the cache. Remove it and run again.")
        return path

    def _shrink(self) -> None:
        """Removes what was used longest ago, until the limit is kept, and what killed processes left."""
        for path in self.root.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _KEPT_S:
                    path.unlink()
        files = []
        for path in self.root.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        size = sum(size for _, size, _ in files)
        for used_at, size_bytes, path in sorted(files):
            if size <= self._limit_bytes or used_at > time.time() - _KEPT_S:
                return
            path.unlink(missing_ok=True)
            size -= size_bytes
