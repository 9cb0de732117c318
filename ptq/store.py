"""Where do artifacts live, and which stage results can be used again?

Objects are immutable and named by the SHA-256 of their bytes; a write is complete or absent; every read is
verified, and a damaged object is set aside, never used. Stage records are small JSON files under the stage's
key. Nothing here knows what an object means. Where the bytes lie is the business of a backend.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from ptq.backends import Backend, LocalFolder, disk_errors
from ptq.errors import ArtifactError, UsageError
from ptq.object_cache import ObjectCache, file_digest, user_cache
from ptq.records import ArtifactRef, digest

# Times a body is fetched, where what arrives is not what was stored.
_FETCH_ATTEMPTS = 4
_PUBLISH_ATTEMPTS = 100
_HEX = re.compile(r"^[0-9a-f]{64}$")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
NUMERIC_LIBRARIES = (
    "torch", "torchvision", "numpy", "numba", "onnx", "onnx-graphsurgeon", "onnxruntime", "openvino",
    "pytorch-quantization", "pillow",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StageEntry:
    """A finished stage: its record as JSON, how long it took, and when it ended (seconds since the epoch)."""

    stage: str
    key: str
    record: Any
    seconds: float
    finished_at: float


@cache
def library_versions() -> dict[str, str]:
    """Returns the installed version of every library that touches numbers, by distribution name."""
    return {name: importlib.metadata.version(name) for name in NUMERIC_LIBRARIES}


@cache
def source_digest() -> str:
    """Returns the SHA-256 of all sources of the `ptq` package, by relative name and content."""
    root = Path(__file__).parent
    total = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.j2")]):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """Returns the key of a stage: the SHA-256 of its name, its inputs, the core's sources and the libraries' versions.

    Args:
        stage: the stage's name.
        inputs: everything the result depends on: records, the stage's part of the config, plain values.
    """
    return digest({"stage": stage, "inputs": inputs, "sources": source_digest(), "libraries": library_versions()})


def open_store(uri: str) -> "Store":
    """Returns the store at `uri`: a folder (a path, or file://...) or a bucket (s3://bucket/prefix).

    Raises:
        UsageError: the URI's scheme is not known.
        ArtifactError: the folder cannot be created or written.
    """
    if "://" not in uri:
        return Store(LocalFolder(Path(uri).expanduser().absolute()))
    parsed = urlparse(uri)
    if parsed.scheme == "s3":
        # Imported here: boto3 takes half a second, which runs on a local folder need not wait for.
        from ptq.s3_backend import S3Bucket

        return Store(S3Bucket(uri))
    if parsed.scheme != "file":
        raise UsageError(
            f"output.store is {uri!r}; expected file:///absolute/folder, file://relative/folder, a path or "
            "s3://bucket/prefix."
        )
    if parsed.fragment or parsed.query:
        raise UsageError(
            f"output.store is {uri!r}; write # and ? in a file:// URI as %23 and %3F, or give a plain path."
        )
    return Store(LocalFolder(Path(unquote(parsed.netloc + parsed.path)).expanduser().absolute()))


class Store:
    """Objects by SHA-256, stages by key, runs and models by name, kept by a backend.

    Args:
        backend: where the bytes lie.
        cache: where objects of a backend that is not local are kept for reading; None takes the user's.
    """

    def __init__(self, backend: Backend, *, cache: ObjectCache | None = None) -> None:
        self.backend = backend
        self._cache = cache

    @property
    def uri(self) -> str:
        """The store's URI."""
        return self.backend.uri

    def object_uri(self, ref: ArtifactRef) -> str:
        """Returns the URI of a stored object."""
        return f"{self.backend.uri}/{_object_name(ref)}"

    def put_bytes(self, data: bytes, name: str) -> ArtifactRef:
        """Stores `data` and returns its reference; a known object is not written again."""
        ref = ArtifactRef(name=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        if not self.has(ref):
            self.backend.write(_object_name(ref), data)
        return ref

    def put_file(self, path: Path, name: str = "") -> ArtifactRef:
        """Stores the file at `path` under `name` (default: its own name) and returns its reference."""
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        ref = ArtifactRef(name=name or path.name, sha256=sha256, size_bytes=path.stat().st_size)
        if not self.has(ref):
            self.backend.write_file(_object_name(ref), path)
        return ref

    def get_path(self, ref: ArtifactRef) -> Path:
        """Returns the path of a verified object; it must only be read.

        Raises:
            ArtifactError: the object is absent or damaged; a damaged one is set aside under `damaged/`.
        """
        path = self.backend.local_path(_object_name(ref))
        if path is None:
            return self._fetched(ref)
        if not path.is_file():
            raise self._absent(ref)
        found = file_digest(path)
        if found != ref.sha256:
            raise self._set_aside_damaged(ref, found)
        return path

    def _fetched(self, ref: ArtifactRef) -> Path:
        """The object in the cache, fetched where it is not there yet."""
        if self._cache is None:
            self._cache = user_cache()
        found: list[str] = []
        for _ in range(_FETCH_ATTEMPTS):
            cached = self._cache.find(ref.sha256)
            if cached is not None:
                return cached
            try:
                with self._cache.written(ref.sha256) as target:
                    found.append(self.backend.fetch(_object_name(ref), target))
            except FileNotFoundError as error:
                raise self._absent(ref) from error
            if found[-1] != ref.sha256 and found.count(found[-1]) > 1:
                break  # the same wrong bytes twice: they are stored so, and were not changed on the way
        cached = self._cache.find(ref.sha256)
        if cached is not None:
            return cached
        if found.count(found[-1]) > 1:
            raise self._set_aside_damaged(ref, found[-1])
        raise ArtifactError(
            f"Object {ref.name} of {self.uri} was read {len(found)} times, each time with other bytes, never with the "
            f"SHA-256 {ref.sha256[:12]}. Expected a connection that leaves bytes alone. Check network and proxies, "
            "and run again."
        )

    def _absent(self, ref: ArtifactRef) -> ArtifactError:
        return ArtifactError(
            f"Object {ref.name} ({ref.sha256[:12]}) is not in the store {self.uri}. Run the stage again."
        )

    def _set_aside_damaged(self, ref: ArtifactRef, found: str) -> ArtifactError:
        aside = f"damaged/{ref.sha256}.{time.time_ns()}"
        self.backend.move(_object_name(ref), aside)
        return ArtifactError(
            f"Object {ref.name} in the store {self.uri} is damaged: its SHA-256 is {found[:12]}, expected "
            f"{ref.sha256[:12]}. It was set aside as {aside}; run again and the stage that made it is repeated."
        )

    def get_bytes(self, ref: ArtifactRef) -> bytes:
        """Returns the bytes of a verified object. See `get_path`."""
        return self.get_path(ref).read_bytes()

    def has(self, ref: ArtifactRef) -> bool:
        """Whether the object is there with the right size."""
        entry = self.backend.entry(_object_name(ref))
        return entry is not None and entry.size_bytes == ref.size_bytes

    def read_stage(self, stage: str, key: str) -> StageEntry | None:
        """Returns the finished stage of that key, None if there is none that can be used.

        A record that cannot be parsed, or that names an object which is gone or damaged, is not used.
        """
        name = f"stages/{stage}/{key}.json"
        try:
            content = self._read_document(name)
        except FileNotFoundError:
            return None
        if content is None:
            return None
        fields = ("stage", "key", "record", "seconds", "finished_at")
        if content.get("key") != key or any(field not in content for field in fields):
            self._set_aside(name)
            return None
        entry = StageEntry(**{field: content[field] for field in fields})
        return entry if all(self._is_sound(ref) for ref in artifact_refs(entry.record)) else None

    def _is_sound(self, ref: ArtifactRef) -> bool:
        """Whether the object can be used: verified where that is a read of this machine, else of the right size.

        What must be fetched is verified when it is read; to fetch everything a cached stage names would cost more
        than the stage.
        """
        if self.backend.local_path(_object_name(ref)) is None:
            return self.has(ref)
        try:
            self.get_path(ref)
        except ArtifactError:
            return False
        return True

    def _read_document(self, name: str) -> dict[str, Any] | None:
        """A JSON document whose digest is right; None, and set aside, where it is not. FileNotFoundError if absent."""
        data, _ = self.backend.read(name)
        try:
            content = json.loads(data)
            body = {field: value for field, value in content.items() if field != "digest"}
            is_sound = content.get("digest") == digest(body)
        except (ValueError, AttributeError):
            is_sound = False
        if not is_sound:
            self._set_aside(name)
            return None
        return body

    def _set_aside(self, name: str) -> None:
        self.backend.move(name, f"damaged/{name.rpartition('/')[2]}.{time.time_ns()}")

    def write_stage(self, entry: StageEntry) -> None:
        """Stores a finished stage. Its objects must have been stored before."""
        body = {
            "stage": entry.stage, "key": entry.key, "record": entry.record,
            "seconds": entry.seconds, "finished_at": entry.finished_at,
        }  # fmt: skip
        self.backend.write(f"stages/{entry.stage}/{entry.key}.json", _document(body))

    def note_stage(self, run_id: str, entry: StageEntry, *, cached: bool) -> None:
        """Notes that a run used a finished stage, and whether it was found rather than computed."""
        note = {
            "stage": entry.stage, "key": entry.key, "seconds": entry.seconds, "cached": cached,
            "noted_at": time.time_ns(),
        }  # fmt: skip
        name = f"{_run_folder(run_id)}/{entry.stage}.{entry.key[:16]}.json"
        self.backend.write(name, json.dumps(note, sort_keys=True).encode())

    def run_stages(self, run_id: str) -> list[dict[str, Any]]:
        """Returns the notes of a run, in the order in which they were made: stage, key, seconds, cached."""
        entries = self.backend.entries(f"{_run_folder(run_id)}/")
        notes = [json.loads(self.backend.read(entry.name)[0]) for entry in entries]
        return sorted(notes, key=lambda note: note["noted_at"])

    def publish(self, model: str, version: str, entry: Mapping[str, Any]) -> str:
        """Appends a version to a model's history and moves `latest.json` to it.

        An entry of the history claims its number by being created: of two that publish at once the second takes the
        next number, and the pointer only moves to a higher one. A server that ignores conditions gets names that
        cannot meet, and `latest` is then the last of the history.

        Args:
            model: name under `models/`.
            version: name of the version; publishing one that is already latest changes nothing.
            entry: what the version is, as JSON.

        Returns:
            The version that was latest before; empty if there was none.

        Raises:
            ArtifactError: the store cannot be written.
        """
        for _ in range(_PUBLISH_ATTEMPTS):
            history = self.history(model)
            last = history[-1] if history else None
            if last is not None and last["version"] == version:
                self._point_to(model, last)
                return str(last["replaced"])
            document = {
                **entry, "model": model, "version": version, "replaced": last["version"] if last else "",
                "sequence": last["sequence"] + 1 if last else 0,
            }  # fmt: skip
            if self._claim(model, document):
                self._point_to(model, document)
                return str(document["replaced"])
        raise ArtifactError(
            f"{model} could not be published in {self.uri}: others were faster {_PUBLISH_ATTEMPTS} times. Run again."
        )

    def _claim(self, model: str, document: Mapping[str, Any]) -> bool:
        name = f"{_model_folder(model)}/history/{document['sequence']:06d}"
        if self.backend.has_conditions:
            return self.backend.create(f"{name}.json", _document(document))
        self.backend.write(f"{name}-{time.time_ns()}-{uuid.uuid4().hex[:8]}.json", _document(document))
        return True

    def _point_to(self, model: str, document: Mapping[str, Any]) -> None:
        """Moves the pointer forward to `document`, unless it is there or further."""
        name, data = f"{_model_folder(model)}/latest.json", _document(document)
        if not self.backend.has_conditions:
            self.backend.write(name, data)
            return
        for _ in range(_PUBLISH_ATTEMPTS):
            try:
                current = self._read_document(name)
                _, tag = self.backend.read(name)
            except FileNotFoundError:
                current, tag = None, ""
            if current is None:
                if self.backend.create(name, data):
                    return
            elif current["sequence"] >= document["sequence"] or self.backend.replace(name, data, tag=tag):
                return
        raise ArtifactError(f"{self.uri}/{name} changes faster than it can be moved. Run again.")

    def latest(self, model: str) -> dict[str, Any] | None:
        """Returns the entry of the published version of a model, None if none was published."""
        if self.backend.has_conditions:
            try:
                found = self._read_document(f"{_model_folder(model)}/latest.json")
            except FileNotFoundError:
                return None
            if found is not None:
                return found
        # No pointer that can be trusted: it is the last entry of the history.
        history = self.history(model)
        return history[-1] if history else None

    def history(self, model: str) -> list[dict[str, Any]]:
        """Returns the entries of all published versions of a model, oldest first."""
        names = [entry.name for entry in self.backend.entries(f"{_model_folder(model)}/history/")]
        documents = [self._read_document(name) for name in names]
        return [document for document in documents if document is not None]


def _object_name(ref: ArtifactRef) -> str:
    if not _HEX.match(ref.sha256):
        raise ArtifactError(f"Object {ref.name!r} has the SHA-256 {ref.sha256!r}; expected 64 hexadecimal digits.")
    return f"objects/{ref.sha256[:2]}/{ref.sha256}"


def _run_folder(run_id: str) -> str:
    if not _NAME.match(run_id):
        raise UsageError(f"The run's name is {run_id!r}; expected letters, digits, '.', '_' and '-' alone.")
    return f"runs/{run_id}"


def _model_folder(model: str) -> str:
    if not _NAME.match(model):
        raise UsageError(f"model.publish_as is {model!r}; expected letters, digits, '.', '_' and '-' alone.")
    return f"models/{model}"


def _document(body: Mapping[str, Any]) -> bytes:
    """JSON with the digest of what it says."""
    return json.dumps({**body, "digest": digest(body)}, indent=1, sort_keys=True).encode()


def artifact_refs(value: Any) -> Iterator[ArtifactRef]:
    """Yields every object reference inside the JSON form of a record."""
    if isinstance(value, Mapping):
        if set(value) == {"name", "sha256", "size_bytes"}:
            yield ArtifactRef(**value)
        else:
            for item in value.values():
                yield from artifact_refs(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from artifact_refs(item)


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
