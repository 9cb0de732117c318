"""Where do artifacts live, and which stage results can be used again?

Objects are immutable and named by the SHA-256 of their bytes; a write is complete or absent; every read is
verified, and a damaged object is set aside, never used. Stage records are small JSON files under the stage's
key. Nothing here knows what an object means. Local folders only.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from ptq.errors import ArtifactError, UsageError
from ptq.records import ArtifactRef, digest

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
    """Returns the store at `uri`.

    Raises:
        UsageError: the URI's scheme is not known.
        ArtifactError: the folder cannot be created or written.
    """
    if "://" not in uri:
        return Store(Path(uri).expanduser().absolute())
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file"):
        raise UsageError(
            f"output.store is {uri!r}; expected file:///absolute/folder, file://relative/folder or a path."
        )
    if parsed.fragment or parsed.query:
        raise UsageError(
            f"output.store is {uri!r}; write # and ? in a file:// URI as %23 and %3F, or give a plain path."
        )
    location = unquote(parsed.netloc + parsed.path) if parsed.scheme else uri
    return Store(Path(location).expanduser().absolute())


class Store:
    """A store in a local folder: `objects/` by SHA-256, `stages/` by key, `models/` by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            for name in ("objects", "stages", "models", "damaged", "tmp"):
                (root / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root / "tmp"):
                pass
        except OSError as error:
            raise ArtifactError(
                f"The store {root} cannot be written: {error.strerror}. Expected a folder with write "
                "permission; set output.store."
            ) from error

    @property
    def uri(self) -> str:
        """The store's URI."""
        return self.root.as_uri()

    def object_uri(self, ref: ArtifactRef) -> str:
        """Returns the URI of a stored object."""
        return self._object_path(ref).as_uri()

    def _object_path(self, ref: ArtifactRef) -> Path:
        if not _HEX.match(ref.sha256):
            raise ArtifactError(f"Object {ref.name!r} has the SHA-256 {ref.sha256!r}; expected 64 hexadecimal digits.")
        return self.root / "objects" / ref.sha256[:2] / ref.sha256

    def put_bytes(self, data: bytes, name: str) -> ArtifactRef:
        """Stores `data` and returns its reference; a known object is not written again."""
        ref = ArtifactRef(name=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        target = self._object_path(ref)
        if not (target.is_file() and target.stat().st_size == len(data)):
            self._write(target, data)
        return ref

    def put_file(self, path: Path, name: str = "") -> ArtifactRef:
        """Stores the file at `path` under `name` (default: its own name) and returns its reference."""
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        ref = ArtifactRef(name=name or path.name, sha256=sha256, size_bytes=path.stat().st_size)
        target = self._object_path(ref)
        if not (target.is_file() and target.stat().st_size == ref.size_bytes):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.root / "tmp" / f"{sha256}.{os.getpid()}.{time.monotonic_ns()}"
            with _disk_errors(self.root):
                shutil.copyfile(path, temporary)
                temporary.replace(target)
        return ref

    def _write(self, target: Path, data: bytes) -> None:
        with _disk_errors(self.root):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.root / "tmp")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                Path(temporary).replace(target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def get_path(self, ref: ArtifactRef) -> Path:
        """Returns the path of a verified object; it must only be read.

        Raises:
            ArtifactError: the object is absent or damaged; a damaged one is set aside under `damaged/`.
        """
        path = self._object_path(ref)
        if not path.is_file():
            raise ArtifactError(
                f"Object {ref.name} ({ref.sha256[:12]}) is not in the store {self.root}. Run the stage again."
            )
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != ref.sha256:
            aside = self.root / "damaged" / f"{ref.sha256}.{time.time_ns()}"
            path.replace(aside)
            raise ArtifactError(
                f"Object {ref.name} in the store {self.root} is damaged: its SHA-256 is {found[:12]}, expected "
                f"{ref.sha256[:12]}. It was set aside as {aside}; run again and the stage that made it is repeated."
            )
        return path

    def get_bytes(self, ref: ArtifactRef) -> bytes:
        """Returns the bytes of a verified object. See `get_path`."""
        return self.get_path(ref).read_bytes()

    def has(self, ref: ArtifactRef) -> bool:
        """Whether the object is there with the right size."""
        path = self._object_path(ref)
        return path.is_file() and path.stat().st_size == ref.size_bytes

    def read_stage(self, stage: str, key: str) -> StageEntry | None:
        """Returns the finished stage of that key, None if there is none that can be used.

        A record that cannot be parsed, or that names an object which is gone or damaged, is not used.
        """
        path = self._stage_path(stage, key)
        try:
            content = json.loads(path.read_text())
            body = {name: content[name] for name in ("stage", "key", "record", "seconds", "finished_at")}
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            self._set_aside(path)
            return None
        if content.get("digest") != digest(body) or body["key"] != key:
            self._set_aside(path)
            return None
        entry = StageEntry(**body)
        return entry if all(self._is_sound(ref) for ref in artifact_refs(entry.record)) else None

    def _is_sound(self, ref: ArtifactRef) -> bool:
        try:
            self.get_path(ref)
        except ArtifactError:
            return False
        return True

    def _set_aside(self, path: Path) -> None:
        path.replace(self.root / "damaged" / f"{path.name}.{time.time_ns()}")

    def _stage_path(self, stage: str, key: str) -> Path:
        return self.root / "stages" / stage / f"{key}.json"

    def write_stage(self, entry: StageEntry) -> None:
        """Stores a finished stage. Its objects must have been stored before."""
        body = {
            "stage": entry.stage, "key": entry.key, "record": entry.record,
            "seconds": entry.seconds, "finished_at": entry.finished_at,
        }  # fmt: skip
        text = json.dumps({**body, "digest": digest(body)}, indent=1, sort_keys=True)
        self._write(self._stage_path(entry.stage, entry.key), text.encode())

    def note_stage(self, run_id: str, entry: StageEntry, *, cached: bool) -> None:
        """Notes that a run used a finished stage, and whether it was found rather than computed."""
        note = {"stage": entry.stage, "key": entry.key, "seconds": entry.seconds, "cached": cached}
        name = f"{entry.stage}.{entry.key[:16]}.json"
        self._write(self._run_folder(run_id) / name, json.dumps(note, sort_keys=True).encode())

    def run_stages(self, run_id: str) -> list[dict[str, Any]]:
        """Returns the notes of a run, in the order in which they were made: stage, key, seconds, cached."""
        paths = sorted(self._run_folder(run_id).glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [json.loads(path.read_text()) for path in paths]

    def _run_folder(self, run_id: str) -> Path:
        if not _NAME.match(run_id):
            raise UsageError(f"The run's name is {run_id!r}; expected letters, digits, '.', '_' and '-' alone.")
        return self.root / "runs" / run_id

    def publish(self, model: str, version: str, entry: Mapping[str, Any]) -> str:
        """Appends a version to a model's history and moves `latest.json` to it.

        Args:
            model: name under `models/`.
            version: name of the version; publishing one that is already latest changes nothing.
            entry: what the version is, as JSON.

        Returns:
            The version that was latest before; empty if there was none.
        """
        folder = self._model_folder(model)
        history = folder / "history"
        history.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel however the process ends
            latest = self.latest(model)
            replaced = str(latest["version"]) if latest else ""
            if replaced == version:
                return str(latest.get("replaced", "")) if latest else ""
            document = {**entry, "model": model, "version": version, "replaced": replaced}
            data = json.dumps(document, indent=1, sort_keys=True).encode()
            # A version that comes back is a new entry: history is never overwritten.
            self._write(history / f"{len(list(history.iterdir())):06d}-{version}.json", data)
            self._write(folder / "latest.json", data)
        return replaced

    def latest(self, model: str) -> dict[str, Any] | None:
        """Returns the entry of the published version of a model, None if none was published."""
        path = self._model_folder(model) / "latest.json"
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None

    def _model_folder(self, model: str) -> Path:
        if not _NAME.match(model):
            raise UsageError(f"model.publish_as is {model!r}; expected letters, digits, '.', '_' and '-' alone.")
        return self.root / "models" / model


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


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"The store {root} cannot be written: {error.strerror}. Expected free space and write permission; nothing "
            "partial was left."
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Writes a file outside the store, complete or not at all.

    Raises:
        ArtifactError: the file cannot be written.
    """
    with _disk_errors(path.parent):
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
