"""Where do images lie, and how are the folders, the digests and the bytes found there?

A folder of this machine or a prefix of a bucket, with the same questions and answers: paths are relative, with /.
What splits and classes are is the business of `index`.
"""

import bisect
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Protocol

from ptq.data.remote_inputs import READS_AT_ONCE, Inputs
from ptq.errors import ManifestError
from ptq.records.base import Progress
from ptq.uris import is_remote, s3_uri, split_uri

if TYPE_CHECKING:
    from ptq.storage.s3_reader import RemoteObject


class ImageTree(Protocol):
    """Images under a root. `str()` of a tree is the root as a person knows it."""

    @property
    def root(self) -> Path | str:
        """The folder, or the s3:// URI without a slash at the end."""
        ...

    @property
    def readers(self) -> int:
        """Threads that read at once."""
        ...

    def folders(self, inside: str = "") -> list[str]:
        """Returns the names of the folders in a folder, sorted, without hidden ones."""
        ...

    def files(self, inside: str) -> Iterable[str]:
        """Returns the paths, relative to a folder, of all files in it at any depth that are not hidden."""
        ...

    def leads_out(self, path: str) -> bool:
        """Whether a path of a manifest leads out of the root."""
        ...

    def absent(self, paths: Sequence[str]) -> list[str]:
        """Returns the paths at which there is no file."""
        ...

    def digests(self, paths: Sequence[str], *, progress: Progress | None) -> tuple[list[str], list[int]]:
        """Returns SHA-256 and size of every file.

        Raises:
            ManifestError: a file cannot be read.
        """
        ...

    def read(self, path: str, sha256: str) -> bytes:
        """Returns the bytes of a file that had this digest; ManifestError if it cannot be read."""
        ...


class LocalTree:
    """Images in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.readers = os.cpu_count() or 1

    def __str__(self) -> str:
        return str(self.root)

    def folders(self, inside: str = "") -> list[str]:
        """Returns the folders in a folder; see `ImageTree`."""
        entries = (self.root / inside).iterdir()
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))

    def files(self, inside: str) -> Iterator[str]:
        """Yields the files in a folder, links followed unless they lead back up; see `ImageTree`."""
        folder = self.root / inside
        return _files_below(folder, "", frozenset({_identity(folder.stat())}))

    def leads_out(self, path: str) -> bool:
        """Whether a path is absolute or has ..; see `ImageTree`."""
        return (
            PurePosixPath(path).is_absolute()
            or PureWindowsPath(path).is_absolute()
            or ".." in PurePosixPath(path).parts
        )

    def absent(self, paths: Sequence[str]) -> list[str]:
        """Returns the paths without a file; see `ImageTree`."""
        return [path for path in paths if not (self.root / path).is_file()]

    def digests(self, paths: Sequence[str], *, progress: Progress | None) -> tuple[list[str], list[int]]:
        """Reads every file; hashing and reading release the interpreter's lock. See `ImageTree`."""

        def digest(path: str) -> tuple[str, int]:
            data = self.read(path, "")
            return hashlib.sha256(data).hexdigest(), len(data)

        found = []
        with ThreadPoolExecutor(self.readers) as pool:
            for result in pool.map(digest, paths):
                found.append(result)
                if progress:
                    progress(len(found), len(paths))
        return [sha256 for sha256, _ in found], [size for _, size in found]

    def read(self, path: str, sha256: str) -> bytes:
        """Returns the bytes of a file; see `ImageTree`."""
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise ManifestError(
                f"Image {path} under {self.root} cannot be read: {error.strerror}. Restore the file or its "
                "permissions, or remove it from the data."
            ) from error


def _files_below(folder: Path, inside: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """The files in a folder and those in it, below `inside`; a folder among those `above` itself is left out."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ManifestError(
            f"Folder {folder} cannot be read: {error.strerror}. Restore its permissions, or remove it from the data."
        ) from error
    for entry in found:
        identity = _folder_identity(entry)
        if identity is None:
            yield f"{inside}{entry.name}"
        elif identity not in above:
            yield from _files_below(folder / entry.name, f"{inside}{entry.name}/", above | {identity})


def _folder_identity(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """Which folder an entry is, None where it is none: a file, or a link to itself."""
    try:
        return _identity(entry.stat()) if entry.is_dir() else None
    except OSError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class BucketTree:
    """Images under a prefix of a bucket, which is listed once. A path may be an s3:// URI of its own."""

    readers = READS_AT_ONCE

    def __init__(self, root: str, inputs: Inputs) -> None:
        self.root = root.rstrip("/")
        self._inputs = inputs
        self._others: dict[str, RemoteObject] = {}

    def __str__(self) -> str:
        return self.root

    @cached_property
    def _files(self) -> dict[str, "RemoteObject"]:
        """What is under the root, by relative path, in the order of the keys; hidden files and folders left out."""
        prefix = f"{self.root}/"
        found = ((each.uri[len(prefix) :], each) for each in self._inputs.listed(prefix))
        return {
            path: each
            for path, each in found
            if path and not path.endswith("/") and not any(part.startswith(".") for part in path.split("/"))
        }

    @cached_property
    def _paths(self) -> list[str]:
        return sorted(self._files)

    def _under(self, folder: str) -> Iterator[str]:
        start = f"{folder}/" if folder else ""
        for position in range(bisect.bisect_left(self._paths, start), len(self._paths)):
            if not self._paths[position].startswith(start):
                return
            yield self._paths[position][len(start) :]

    def folders(self, inside: str = "") -> list[str]:
        """Returns the folders in a folder; see `ImageTree`."""
        return sorted({path.partition("/")[0] for path in self._under(inside) if "/" in path})

    def files(self, inside: str) -> Iterator[str]:
        """Returns the files in a folder; see `ImageTree`."""
        return self._under(inside)

    def leads_out(self, path: str) -> bool:
        """Whether a path is absolute or has .., and is no s3:// URI; see `ImageTree`."""
        return not is_remote(path) and (path.startswith("/") or ".." in path.split("/"))

    def absent(self, paths: Sequence[str]) -> list[str]:
        """Returns the paths without an object; see `ImageTree`. Other buckets and prefixes are listed as well."""
        elsewhere = [split_uri(path) for path in paths if is_remote(path)]
        for bucket in {bucket for bucket, _ in elsewhere}:
            shared = os.path.commonprefix([key for each, key in elsewhere if each == bucket]).rpartition("/")[0]
            listed = self._inputs.listed(s3_uri(bucket, f"{shared}/" if shared else ""))
            self._others.update({each.uri: each for each in listed})
        return [path for path in paths if path not in (self._others if is_remote(path) else self._files)]

    def digests(self, paths: Sequence[str], *, progress: Progress | None) -> tuple[list[str], list[int]]:
        """Reads the objects that changed since the last time; see `ImageTree`."""
        found = [self._others[path] if is_remote(path) else self._files[path] for path in paths]
        sha256 = self._inputs.digests(found, name=self.root, progress=progress)
        return sha256, [each.size_bytes for each in found]

    def read(self, path: str, sha256: str) -> bytes:
        """Returns the bytes of an object, from the cache if they are there; see `ImageTree`."""
        return self._inputs.image(path if is_remote(path) else f"{self.root}/{path}", sha256)


def tree_at(root: Path | str, inputs: Inputs | None = None) -> ImageTree:
    """Returns the images under a folder or an s3:// URI."""
    if is_remote(root):
        return BucketTree(root, inputs or Inputs())
    return LocalTree(Path(root))
