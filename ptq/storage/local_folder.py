"""How does a store keep its bytes in a folder?"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from ptq.errors import ArtifactError
from ptq.files import disk_errors, file_sha256
from ptq.storage.backend import Entry, require_name

_FOLDERS = ("objects", "stages", "models", "runs", "inputs", "damaged", "tmp")


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
        return file_sha256(target)

    def write(self, name: str, data: bytes) -> None:
        """Writes beside the folder's files and renames; see `Backend`."""
        with self._written() as temporary:
            _write_synced(temporary, data)
            temporary.replace(self._made_target(name))

    def write_file(self, name: str, path: Path) -> None:
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
