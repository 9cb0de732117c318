"""How are files listed and read where checkpoints arrive: in a folder or in a bucket?

Reads alone, whole files in little memory. Which of the files are checkpoints, and which are new, is not known here.
"""

import json
import logging
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ptq.data.remote_inputs import Inputs, checkpoint_ending
from ptq.errors import ArtifactError
from ptq.files import file_sha256
from ptq.storage.store import Store
from ptq.uris import is_remote

logger = logging.getLogger(__name__)

# What torch.save writes, whatever a trainer calls it.
_ZIP_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".pth.tar")
_ZIP = b"PK\x03\x04"
# The largest header that the safetensors library reads, too.
_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint as its place describes it; `state` is another one after every write."""

    uri: str
    size_bytes: int
    state: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a checkpoint's bytes say of it."""

    sha256: str
    is_whole: bool


class Place(Protocol):
    """Where checkpoints lie. Every method raises ArtifactError where the place cannot be reached."""

    def listed(self) -> Iterator[Found]:
        """Yields every object under the prefix."""
        ...

    def find(self, uri: str) -> Found | None:
        """Returns one, None if it is gone."""
        ...

    def read(self, found: Found) -> Reading | None:
        """Reads it with little memory; returns None where it went or changed meanwhile."""
        ...


def place_of(prefix: str, store: Store) -> Place:
    """Returns the folder or the bucket of a prefix; the store remembers the digests of objects in S3."""
    return _Bucket(prefix, store) if is_remote(prefix) else _Folder(Path(prefix))


def is_whole(path: Path, *, ending: str) -> bool:
    """Whether a checkpoint's format says that nothing of it is missing; True for formats that do not tell.

    Args:
        path: the file.
        ending: its ending as `checkpoint_ending` gives it; the name of a copy may have none.
    """
    with path.open("rb") as stream:
        if ending == ".safetensors":
            return _has_all_tensors(stream)
        if ending in _ZIP_ENDINGS:
            return _has_zip_end(stream)
    return True


def _has_zip_end(stream: BinaryIO) -> bool:
    """Whether a zip file has its directory, which is written last; True for what is no zip file."""
    head = stream.read(len(_ZIP))
    if not _ZIP.startswith(head):
        return True
    return head == _ZIP and zipfile.is_zipfile(stream)


def _has_all_tensors(stream: BinaryIO) -> bool:
    """Whether the bytes of the last tensor in the header of a safetensors file end where the file ends."""
    length = int.from_bytes(stream.read(8), "little")
    size = stream.seek(0, os.SEEK_END)
    if not 2 <= length <= min(_HEADER_BYTES, size - 8):
        return False
    stream.seek(8)
    try:
        header = json.loads(stream.read(length))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return False
    return 8 + length + max(ends, default=0) == size


class _Folder:
    """Checkpoints in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._unreadable: set[str] = set()

    def listed(self) -> Iterator[Found]:
        if not self._root.is_dir():
            raise ArtifactError(
                f"The watched folder {self._root} {'is no folder' if self._root.exists() else 'does not exist'}. "
                "Expected a folder with a folder for each model. Create or mount it, or correct prefix."
            )
        for name in sorted(self._names()):
            path = os.path.join(self._root, name)
            if not os.path.isdir(path):
                yield from self._files([path])
                continue
            # A model's folder may be a link; below it none is followed, for it may lead back up.
            for folder, folders, files in os.walk(path, onerror=self._warn):
                folders.sort()
                yield from self._files(os.path.join(folder, file) for file in sorted(files))

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._root)
        except OSError as error:
            raise ArtifactError(
                f"The watched folder {self._root} cannot be listed: {error.strerror}. Expected permission to read."
            ) from error

    def _files(self, paths: Iterable[str]) -> Iterator[Found]:
        return (found for path in paths if (found := self.find(path)) is not None)

    def _warn(self, error: OSError) -> None:
        if str(error.filename) not in self._unreadable:
            self._unreadable.add(str(error.filename))
            logger.warning("%s is not watched: %s.", error.filename, error.strerror)

    def find(self, uri: str) -> Found | None:
        try:
            uri.encode()
            status = os.stat(uri)
        except (OSError, UnicodeEncodeError):
            # Gone since, a link to nothing, or a name that no event can carry.
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"
        return Found(uri, status.st_size, state)

    def read(self, found: Found) -> Reading | None:
        path = Path(found.uri)
        try:
            reading = Reading(file_sha256(path), is_whole(path, ending=checkpoint_ending(path.name)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArtifactError(
                f"Checkpoint {path} cannot be read: {error.strerror}. Expected permission to read it."
            ) from error
        return reading if self.find(found.uri) == found else None


class _Bucket:
    """Checkpoints in S3."""

    def __init__(self, prefix: str, store: Store) -> None:
        self._prefix = prefix
        self._inputs = Inputs(store)

    def listed(self) -> Iterator[Found]:
        for each in self._inputs.listed(f"{self._prefix}/"):
            yield Found(each.uri, each.size_bytes, f"{each.size_bytes} {each.state}")

    def find(self, uri: str) -> Found | None:
        found = self._inputs.objects.find(uri)
        return None if found is None else Found(uri, found.size_bytes, f"{found.size_bytes} {found.state}")

    def read(self, found: Found) -> Reading | None:
        ending = checkpoint_ending(found.uri)
        try:
            sha256, path = self._inputs.file(found.uri)
            return Reading(sha256, is_whole(path or self._inputs.local_path(found.uri), ending=ending))
        except FileNotFoundError:
            return None
