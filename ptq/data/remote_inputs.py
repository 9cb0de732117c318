"""What is in the checkpoints and images that a person names in S3, and where can they be read here?

Every object is identified by the SHA-256 of its bytes, as a local file is. The store remembers the digest of each
object that was read, and for which state of it; so an object that nobody touched is not read again. Bytes are kept
in the cache of this machine by their digest alone: no name from a bucket becomes the name of a file.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ptq.errors import ArtifactError, CheckpointError, ManifestError, PtqError
from ptq.files import disk_errors, file_sha256
from ptq.records.base import Progress, digest
from ptq.storage.cache import ObjectCache, user_cache
from ptq.storage.local_folder import LocalFolder
from ptq.storage.store import Store
from ptq.uris import is_remote

if TYPE_CHECKING:
    from ptq.storage.s3_reader import RemoteObject, RemoteObjects

# Requests at once, most of whose time is waiting; as many images are in memory.
READS_AT_ONCE = 16
# What was read is noted after so many objects, so that a run that is killed need not read them again.
_NOTED_EVERY = 500
CHECKPOINT_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".pth.tar", ".safetensors", ".onnx")


def checkpoint_file(path: str, store: Store | None = None) -> contextlib.AbstractContextManager[Path]:
    """Returns what yields the file of a checkpoint or ONNX file, local or in S3. See `Inputs.checkpoint`."""
    return Inputs(store).checkpoint(path) if is_remote(path) else contextlib.nullcontext(Path(path))


class Inputs:
    """Objects in S3 by content.

    Args:
        store: remembers what was read; None for a folder beside the cache.
        cache: keeps bytes on this machine; None takes the user's.
    """

    def __init__(self, store: Store | None = None, *, cache: ObjectCache | None = None) -> None:
        self.cache = cache or user_cache()
        self._store = store or Store(LocalFolder(self.cache.root / "inputs"))

    @cached_property
    def objects(self) -> "RemoteObjects":
        """The objects of the server that the environment names."""
        # Imported here: boto3 takes half a second, which runs on local files need not wait for.
        from ptq.storage.s3_reader import RemoteObjects

        return RemoteObjects()

    def listed(self, prefix: str) -> list["RemoteObject"]:
        """Returns what is under an s3:// URI, which is taken as a prefix, ordered by key."""
        return self.objects.listed(prefix)

    def file_digest(self, uri: str) -> str:
        """Returns the SHA-256 of one object, which is read only if it was never read as it is.

        Raises:
            FileNotFoundError: there is no such object.
            ArtifactError: it cannot be read.
        """
        return self.file(uri)[0]

    def file(self, uri: str) -> tuple[str, Path | None]:
        """Returns the SHA-256 of one object, and the file in the cache if it had to be read. See `file_digest`."""
        found = self.objects.find(uri)
        if found is None:
            raise FileNotFoundError(uri)
        key = digest({"uri": uri, "size_bytes": found.size_bytes, "state": found.state})
        known = self._recalled("input", key).get("sha256", "")
        if known:
            return known, None
        sha256, path = self._fetched(found)
        self._store.remember("input", key, json.dumps({"sha256": sha256}).encode())
        return sha256, path

    def local_path(self, uri: str) -> Path:
        """Returns a verified copy of one object in the cache, which must only be read. Raises as `file_digest`."""
        sha256, path = self.file(uri)
        path = path or self.cache.find(sha256)
        if path is None:
            found = self.objects.find(uri)
            if found is None:
                raise FileNotFoundError(uri)
            fetched, path = self._fetched(found)
            if fetched != sha256:
                raise ArtifactError(f"{uri} changed while it was read. Run again once nothing writes to it.")
        return path

    def digests(self, found: Sequence["RemoteObject"], *, name: str, progress: Progress | None = None) -> list[str]:
        """Returns the SHA-256 of every object; only those are read that changed since they were read last.

        Args:
            found: the objects, as listed.
            name: what the digests are remembered under; the latest replace those before.
            progress: called with the number of objects known and the number of all.

        Raises:
            ArtifactError: an object cannot be read, or changes while it is.
        """
        key = digest(name)
        known = self._recalled("input_digests", key)
        missing = [each for each in found if _state(each) not in known]
        done = len(found) - len(missing)
        noted = done

        def read(each: "RemoteObject") -> tuple[str, str]:
            try:
                return _state(each), self._fetched(each)[0]
            except FileNotFoundError as error:
                raise ArtifactError(f"{each.uri} went while it was read. Run again once nothing writes to it.") from (
                    error
                )

        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            for state, sha256 in pool.map(read, missing):
                known[state] = sha256
                done += 1
                if progress:
                    progress(done, len(found))
                if done - noted >= max(_NOTED_EVERY, len(known) // 4):
                    self._note(key, known)
                    noted = done
        kept = {_state(each): known[_state(each)] for each in found}
        if missing:
            self._note(key, kept)
        return [kept[_state(each)] for each in found]

    def image(self, uri: str, sha256: str) -> bytes:
        """Returns the bytes of an image that had this digest when it was indexed.

        Raises:
            ManifestError: it is gone.
            ArtifactError: it cannot be read.
        """
        cached = self.cache.find(sha256)
        if cached is not None:
            return cached.read_bytes()
        try:
            data = self.objects.read(uri)
        except FileNotFoundError as error:
            raise ManifestError(f"Image {uri} is gone since it was indexed. Restore it, or run again.") from error
        if hashlib.sha256(data).hexdigest() == sha256:
            self.cache.add(sha256, lambda target: _written(target, data, sha256))
        return data

    @contextlib.contextmanager
    def checkpoint(self, path: str) -> Iterator[Path]:
        """Yields the file of a checkpoint in S3, with the ending that it has.

        Raises:
            CheckpointError: there is none at that URI; what the block says of the file names the URI.
        """
        ending = _ending(path)
        with _checkpoint_errors(path):
            copy = self.local_path(path)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / f"checkpoint{ending}"
            try:
                os.link(copy, file)
            except OSError:  # another file system
                file.symlink_to(copy)
            try:
                yield file
            except PtqError as error:
                raise type(error)(str(error).replace(str(file), path)) from error

    def checkpoint_digest(self, uri: str) -> str:
        """Returns the SHA-256 of a checkpoint in S3; CheckpointError if there is none."""
        _ending(uri)
        with _checkpoint_errors(uri):
            return self.file_digest(uri)

    def any_checkpoint_digest(self, path: str) -> str:
        """Returns the SHA-256 of a checkpoint, local or in S3.

        Raises:
            CheckpointError: there is none.
        """
        if is_remote(path):
            return self.checkpoint_digest(path)
        try:
            return file_sha256(Path(path))
        except OSError as error:
            raise CheckpointError(
                f"Checkpoint {path} cannot be read: {error.strerror}. Expected the file that the event names."
            ) from error

    def _fetched(self, found: "RemoteObject") -> tuple[str, Path]:
        """An object's digest, and its file in the cache."""
        # The name that the cache gives to what is on its way: it removes such files after a kill.
        temporary = self.cache.root / f".fetched-{uuid.uuid4().hex}"
        try:
            with disk_errors(self.cache.root):
                sha256 = self.objects.fetch(found, temporary)
            path = self.cache.add(sha256, lambda target: _moved(temporary, target, sha256))[0]
        finally:
            temporary.unlink(missing_ok=True)
        assert path is not None
        return sha256, path

    def _recalled(self, kind: str, key: str) -> dict[str, str]:
        """What was noted, without what is no digest."""
        try:
            content = json.loads(self._store.recall(kind, key) or b"{}")
        except ValueError:
            return {}
        return {name: sha256 for name, sha256 in content.items() if isinstance(sha256, str) and len(sha256) == 64}

    def _note(self, key: str, known: dict[str, str]) -> None:
        self._store.remember("input_digests", key, json.dumps(known, sort_keys=True).encode())


@contextlib.contextmanager
def _checkpoint_errors(uri: str) -> Iterator[None]:
    """Turns FileNotFoundError into a CheckpointError that names `uri`."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"Checkpoint {uri} does not exist, or its bucket does not. Give the URI of a "
            f"{', '.join(CHECKPOINT_ENDINGS)} file, and check AWS_ENDPOINT_URL_S3."
        ) from error


def _state(found: "RemoteObject") -> str:
    return f"{found.size_bytes} {found.state} {found.uri}"


def checkpoint_ending(path: str) -> str:
    """Returns which of the endings of checkpoints a path has, empty where it has none.

    >>> checkpoint_ending("in/a.PTH"), checkpoint_ending("in/model_best.pth.tar"), checkpoint_ending("in/a.tar")
    ('.pth', '.pth.tar', '')
    """
    return next((ending for ending in CHECKPOINT_ENDINGS if PurePosixPath(path).name.lower().endswith(ending)), "")


def _ending(uri: str) -> str:
    ending = checkpoint_ending(uri)
    if not ending:
        raise CheckpointError(
            f'Checkpoint {uri} ends in "{PurePosixPath(uri).suffix[:20]}". Expected one of '
            f"{', '.join(CHECKPOINT_ENDINGS)}."
        )
    return ending


def _moved(source: Path, target: Path, sha256: str) -> str:
    source.replace(target)
    return sha256


def _written(target: Path, data: bytes, sha256: str) -> str:
    target.write_bytes(data)
    return sha256
