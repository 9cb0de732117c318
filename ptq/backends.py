"""What does a store ask of the place where its bytes lie?

A backend keeps named byte strings: complete or absent, listed by prefix, created or replaced only if nobody else was
faster. A local folder is here, a bucket in `s3_backend.py`. What the names and the bytes mean is `store.py`'s business.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ptq.errors import ArtifactError
from ptq.files import disk_errors

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9._=-]+)*")
_FOLDERS = ("objects", "stages", "models", "runs", "inputs", "damaged", "tmp")


@dataclass(frozen=True, slots=True)
class Entry:
    """A kept name: its size, and when it was written (seconds since the epoch)."""

    name: str
    size_bytes: int
    modified_at: float


class Backend(Protocol):
    """A place for named byte strings. Names are relative, with `/` between parts; see `require_name`.

    Every method raises ArtifactError where the place cannot be reached, read or written.
    """

    @property
    def uri(self) -> str:
        """The URI of the whole place, without a slash at the end."""
        ...

    @property
    def has_conditions(self) -> bool:
        """Whether `create` and `replace` are atomic against other writers; some S3-compatible servers ignore them."""
        ...

    def local_path(self, name: str) -> Path | None:
        """Returns the file that holds `name`, whether or not it exists; None where bytes must be fetched first."""
        ...

    def entry(self, name: str) -> Entry | None:
        """Returns what is kept under `name`, None if nothing is."""
        ...

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yields what is kept under names that begin with `prefix`, in the order of the names."""
        ...

    def read(self, name: str) -> tuple[bytes, str]:
        """Returns the bytes and a tag that changes with them; FileNotFoundError if nothing is kept under `name`."""
        ...

    def fetch(self, name: str, target: Path) -> str:
        """Writes the bytes to the file `target` and returns their SHA-256; FileNotFoundError as `read`."""
        ...

    def write(self, name: str, data: bytes, *, sha256: str = "") -> None:
        """Keeps `data`, in place of what was there; `sha256` is their digest, where it is known already."""
        ...

    def write_file(self, name: str, path: Path, *, sha256: str) -> None:
        """Keeps the bytes of the file at `path`, whose digest is `sha256`, in place of what was there."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Keeps `data` if nothing is kept under `name` yet; returns whether it did."""
        ...

    def replace(self, name: str, data: bytes, *, tag: str) -> bool:
        """Keeps `data` if what is kept still has `tag`; returns whether it did."""
        ...

    def move(self, name: str, target: str) -> None:
        """Keeps the bytes under another name; nothing happens where they are gone."""
        ...

    def delete(self, name: str) -> None:
        """Forgets `name`; nothing happens where it is gone."""
        ...

    def unfinished(self, *, before: float, delete: bool) -> list[Entry]:
        """Returns what writers began before a moment and never ended, and forgets it if `delete`.

        Args:
            before: seconds since the epoch.
            delete: whether to forget what is returned.
        """
        ...


def require_name(name: str) -> str:
    """Returns `name` if it stays inside a store.

    Raises:
        ArtifactError: it has other characters than letters, digits and `._=-/`, or a part that is `.` or `..`.
    """
    if not _NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
        raise ArtifactError(
            f"The name {name[:120]!r} cannot be kept in a store. Expected parts of letters, digits, '.', '_', '=' and "
            "'-' with '/' between them, none of them '.' or '..'. Something outside the pipeline has written it."
        )
    return name


class LocalFolder:
    """A backend in a folder of this machine, shared by its processes."""

    has_conditions = True

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            for folder in _FOLDERS:
                (root / folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root / "tmp"):
                pass
        except OSError as error:
            raise ArtifactError(
                f"The store {root} cannot be written: {error.strerror}. Expected a folder with write "
                "permission; set output.store."
            ) from error
        self._real_root = root.resolve()

    @property
    def uri(self) -> str:
        """The folder as a file:// URI."""
        return self.root.as_uri()

    def local_path(self, name: str) -> Path:
        """Returns the file of `name`; see `Backend`.

        Raises:
            ArtifactError: a symbolic link leads out of the folder.
        """
        path = self.root / require_name(name)
        # Links may lead to the folder, not out of it.
        if not path.resolve().is_relative_to(self._real_root):
            raise ArtifactError(
                f"{path} leads out of the store to {path.resolve()}. Expected a file inside {self.root}. Remove the "
                "symbolic link and run again."
            )
        return path

    def entry(self, name: str) -> Entry | None:
        """Returns what is kept under `name`; see `Backend`."""
        path = self.local_path(name)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(name, status.st_size, status.st_mtime)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yields what is kept under a prefix; see `Backend`."""
        folder = self.root / prefix.rpartition("/")[0]
        names = sorted(
            path.relative_to(self.root).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        )
        for name in names:
            if name.startswith(prefix) and (entry := self.entry(name)) is not None:
                yield entry

    def read(self, name: str) -> tuple[bytes, str]:
        """Returns bytes and tag; see `Backend`."""
        with disk_errors(self.root):
            data = self.local_path(name).read_bytes()
        return data, hashlib.sha256(data).hexdigest()

    def fetch(self, name: str, target: Path) -> str:
        """Copies a file; see `Backend`."""
        with disk_errors(self.root):
            shutil.copyfile(self.local_path(name), target)
        with target.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def write(self, name: str, data: bytes, *, sha256: str = "") -> None:
        """Writes beside the folder's files and renames; see `Backend`."""
        with self._written() as temporary:
            _write_synced(temporary, data)
            temporary.replace(self._made_target(name))

    def write_file(self, name: str, path: Path, *, sha256: str) -> None:
        """Copies beside the folder's files and renames; see `Backend`."""
        with self._written() as temporary:
            shutil.copyfile(path, temporary)
            temporary.replace(self._made_target(name))

    def create(self, name: str, data: bytes) -> bool:
        """Links the written file to its name, which fails where there is one; see `Backend`."""
        with self._written() as temporary:
            _write_synced(temporary, data)
            try:
                os.link(temporary, self._made_target(name))
            except FileExistsError:
                return False
        return True

    def replace(self, name: str, data: bytes, *, tag: str) -> bool:
        """Compares and renames under a lock that ends with the process; see `Backend`."""
        target = self._made_target(name)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # The content, not inode and time: those come again when two files follow each other within a clock tick.
            with contextlib.suppress(FileNotFoundError):
                if self.read(name)[1] == tag:
                    self.write(name, data)
                    return True
            return False

    def move(self, name: str, target: str) -> None:
        """Renames a file; see `Backend`."""
        with contextlib.suppress(FileNotFoundError), disk_errors(self.root):
            self.local_path(name).replace(self._made_target(target))

    def delete(self, name: str) -> None:
        """Removes a file; see `Backend`."""
        with disk_errors(self.root):
            self.local_path(name).unlink(missing_ok=True)

    def unfinished(self, *, before: float, delete: bool) -> list[Entry]:
        """The files that no rename has ended; see `Backend`."""
        found = [entry for entry in self.entries("tmp/") if entry.modified_at < before]
        for entry in found if delete else ():
            self.delete(entry.name)
        return found

    def _made_target(self, name: str) -> Path:
        target = self.local_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    @contextlib.contextmanager
    def _written(self) -> Iterator[Path]:
        """A file that is gone afterwards unless it was renamed; what the disk refuses is an ArtifactError."""
        # Unique among machines that share the folder, too.
        temporary = self.root / "tmp" / uuid.uuid4().hex
        with disk_errors(self.root):
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
