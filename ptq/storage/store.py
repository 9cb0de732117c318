"""Where do artifacts live, and which stage results can be used again?

Objects are immutable and named by the SHA-256 of their bytes; a write is complete or absent; every read is
verified, and a damaged object is set aside, never used. Stage records are small JSON files under the stage's
key. Nothing here knows what an object means. Where the bytes lie is the business of a backend.
"""

import hashlib
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlparse

from ptq.errors import ArtifactError, UsageError
from ptq.files import file_sha256
from ptq.records.base import ArtifactRef, digest
from ptq.storage.backend import Backend
from ptq.storage.cache import ObjectCache, user_cache
from ptq.storage.documents import artifact_refs, body_of, document_of
from ptq.storage.local_folder import LocalFolder
from ptq.uris import folder_of_uri, without_secrets

# Times a body is fetched, where what arrives is not what was stored.
_FETCH_ATTEMPTS = 4
_PUBLISH_ATTEMPTS = 100
# `ptq gc` leaves alone what was written within a day.
_YOUNG_S = 43_200.0
# Requests at once to a distant backend, each of which is mostly waiting.
_AT_ONCE = 8
_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SEQUENCE = re.compile(r"([0-9]{6})[-.]")

Item = TypeVar("Item")
Result = TypeVar("Result")
# What `Store.claim` finds: nothing, a claim that was left behind, one that somebody is at work on, a confirmed one.
ClaimState = Literal["first", "again", "held", "done"]


@dataclass(frozen=True, slots=True)
class StageEntry:
    """A finished stage: its record as JSON, how long it took, and when it ended (seconds since the epoch)."""

    stage: str
    key: str
    record: Any
    seconds: float
    finished_at: float


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """Returns the key of a stage: the SHA-256 of its name and of its inputs.

    Args:
        stage: the stage's name.
        inputs: everything the result depends on: records, the stage's part of the config, plain values, and the code
            and the versions of the libraries that compute it.
    """
    return digest({"stage": stage, "inputs": inputs})


def open_store(uri: str) -> "Store":
    """Returns the store at `uri`: a folder (a path, or file://...) or a bucket (s3://bucket/prefix).

    Raises:
        UsageError: the URI's scheme is not known.
        ArtifactError: the folder cannot be created or written.
    """
    root = folder_of_uri(uri)
    if root is not None:
        return Store(LocalFolder(root))
    _, open_backend = _BACKENDS.get(urlparse(uri).scheme, ("", None))
    if open_backend is None:
        raise UsageError(
            f"output.store is {without_secrets(uri)!r}; expected file:///absolute/folder, file://relative/folder, "
            f"a path or {' or '.join(form for form, _ in _BACKENDS.values())}."
        )
    return Store(open_backend(uri))


def _open_bucket(uri: str) -> Backend:
    # Imported here: boto3 takes half a second, which runs on a local folder need not wait for.
    from ptq.storage.s3_bucket import bucket_at

    return bucket_at(uri)


# Where bytes lie but in a folder, by the scheme of the URI: how that is written, and what opens it.
_BACKENDS: dict[str, tuple[str, Callable[[str], Backend]]] = {"s3": ("s3://bucket/prefix", _open_bucket)}


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
        if not self._was_put_lately(ref):
            self.backend.write(_object_name(ref), data)
        return ref

    def put_file(self, path: Path, name: str = "") -> ArtifactRef:
        """Stores the file at `path` under `name` (default: its own name) and returns its reference."""
        sha256 = file_sha256(path)
        ref = ArtifactRef(name=name or path.name, sha256=sha256, size_bytes=path.stat().st_size)
        if not self._was_put_lately(ref):
            self.backend.write_file(_object_name(ref), path)
        return ref

    def _was_put_lately(self, ref: ArtifactRef) -> bool:
        """Whether the object is there and young; an old one is written again, so that `ptq gc` takes it for used."""
        entry = self.backend.entry(_object_name(ref))
        is_there = entry is not None and entry.size_bytes == ref.size_bytes
        return is_there and entry is not None and entry.modified_at > time.time() - _YOUNG_S

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
        found = file_sha256(path)
        if found != ref.sha256:
            raise self._set_aside_damaged(ref, found)
        return path

    def _fetched(self, ref: ArtifactRef) -> Path:
        """The object in the cache, fetched where it is not there yet; what is fetched is digested on the way."""
        if self._cache is None:
            self._cache = user_cache()
        name = _object_name(ref)
        path = self._cache.find(ref.sha256)
        wrong: list[str] = []
        while path is None and len(wrong) < _FETCH_ATTEMPTS:
            try:
                path, found = self._cache.add(ref.sha256, lambda target: self.backend.fetch(name, target))
            except FileNotFoundError as error:
                raise self._absent(ref) from error
            if path is None and found in wrong:
                # The same wrong bytes twice: they are stored so, and were not changed on the way.
                raise self._set_aside_damaged(ref, found)
            wrong.append(found)
        if path is not None:
            return path
        raise ArtifactError(
            f"Object {ref.name} of {self.uri} was read {len(wrong)} times, each time with other bytes, never with the "
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
        if (content.get("stage"), content.get("key")) != (stage, key) or any(field not in content for field in fields):
            self._set_aside(name)
            return None
        entry = StageEntry(**{field: content[field] for field in fields})
        return entry if all(self._mapped(self._is_sound, set(artifact_refs(entry.record)))) else None

    def _mapped(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """What the function returns for each item; requests to a distant backend go out together."""
        listed = list(items)
        if len(listed) < 2 or self.backend.local_path("objects") is not None:
            return [function(item) for item in listed]
        with ThreadPoolExecutor(min(_AT_ONCE, len(listed))) as threads:
            return list(threads.map(function, listed))

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
        body, _ = self._read_tagged(name)
        if body is None:
            self._set_aside(name)
        return body

    def _read_tagged(self, name: str) -> tuple[dict[str, Any] | None, str]:
        """A document, None where its digest is wrong, and the tag of the bytes that were read."""
        wrong: list[bytes] = []
        for _ in range(_FETCH_ATTEMPTS):
            data, tag = self.backend.read(name)
            body = body_of(data)
            if body is not None or data in wrong:
                break  # the same wrong bytes twice: stored so, and not changed on the way
            wrong.append(data)
        return body, tag

    def _set_aside(self, name: str) -> None:
        self.backend.move(name, f"damaged/{name.rpartition('/')[2]}.{time.time_ns()}")

    def write_stage(self, entry: StageEntry) -> None:
        """Stores a finished stage. Its objects must have been stored before."""
        body = {
            "stage": entry.stage,
            "key": entry.key,
            "record": entry.record,
            "seconds": entry.seconds,
            "finished_at": entry.finished_at,
        }
        self.backend.write(f"stages/{entry.stage}/{entry.key}.json", document_of(body))

    def remember(self, kind: str, key: str, data: bytes) -> None:
        """Keeps bytes that make later work quicker, without being a result: the latest replace those before.

        Args:
            kind: what they are, a name of letters, digits, '_' and '-'.
            key: what they are for, in hexadecimal.
            data: the bytes, stored as an object.
        """
        ref = self.put_bytes(data, kind)
        body = {"name": ref.name, "sha256": ref.sha256, "size_bytes": ref.size_bytes}
        self.backend.write(f"remembered/{kind}/{key}.json", document_of(body))

    def recall(self, kind: str, key: str) -> bytes:
        """Returns what was remembered last, empty where there is nothing that can be used. See `remember`."""
        try:
            body = self._read_document(f"remembered/{kind}/{key}.json")
            return self.get_bytes(ArtifactRef(**body)) if body else b""
        except (FileNotFoundError, ArtifactError):
            return b""

    def note_stage(self, run_id: str, entry: StageEntry, *, cached: bool) -> None:
        """Notes that a run used a finished stage, and whether it was found rather than computed."""
        note = {
            "stage": entry.stage,
            "key": entry.key,
            "seconds": entry.seconds,
            "cached": cached,
            "noted_at": time.time_ns(),
        }
        name = f"{_run_folder(run_id)}/{entry.stage}.{entry.key[:16]}.json"
        self.backend.write(name, document_of(note))

    def run_stages(self, run_id: str) -> list[dict[str, Any]]:
        """Returns the notes of a run, in the order in which they were made: stage, key, seconds, cached."""
        names = [entry.name for entry in self.backend.entries(f"{_run_folder(run_id)}/")]
        notes = [note for note in self._mapped(self._read_listed, names) if note is not None]
        return sorted(notes, key=lambda note: note["noted_at"])

    def append(self, kind: str, name: str, body: Mapping[str, Any]) -> None:
        """Adds a document to those of that kind and name; those before it stay as they are."""
        self.backend.write(f"{_folder_of(kind, name)}/{time.time_ns()}-{uuid.uuid4().hex[:8]}.json", document_of(body))

    def appended(self, kind: str, name: str, *, last: int) -> list[dict[str, Any]]:
        """Returns the last documents of that kind and name, oldest first; a damaged one is left out, and in its place.

        `last` bounds how many are read.
        """
        names = sorted(entry.name for entry in self.backend.entries(f"{_folder_of(kind, name)}/"))
        found = self._mapped(self._read_listed, names[max(len(names) - last, 0) :])
        return [document for document in found if document is not None]

    def claim(self, kind: str, key: str, body: Mapping[str, Any], *, unconfirmed_s: float) -> ClaimState:
        """Claims what has to be done once, whoever does it. See `confirm`.

        Args:
            kind: what is done, a name of letters, digits, '.', '_' and '-'.
            key: to what, a name of the same characters.
            body: what to note of it, as JSON.
            unconfirmed_s: seconds after which a claim that nobody confirmed is taken over.

        Returns:
            `first`, where nobody claimed it before, and `again`, where a claim was taken over whose work may or may
            not have been done: the caller does it. `held`, where somebody else is at work, and `done`, where it was
            confirmed. Of several that claim at once one alone is told to do it, except on a server that ignores
            conditions.
        """
        name = f"claims/{_folder_of(kind, key)}.json"
        # Unlike every other: a server that was asked twice tells a claim of one's own by its bytes.
        mine = {**body, "state": "claimed", "claimant": uuid.uuid4().hex, "claimed_at": time.time()}
        try:
            found, tag = self._read_tagged(name)
        except FileNotFoundError:
            return "first" if self.backend.create(name, document_of(mine)) else "held"
        if found is None:
            self._set_aside(name)
            return "again" if self.backend.create(name, document_of(mine)) else "held"
        if found["state"] == "confirmed":
            return "done"
        if time.time() - found["claimed_at"] < unconfirmed_s:
            return "held"
        return "again" if self.backend.replace(name, document_of(mine), tag=tag) else "held"

    def confirm(self, kind: str, key: str, body: Mapping[str, Any]) -> None:
        """Notes that what was claimed has been done, and what to note of it; nobody does it again. See `claim`."""
        document = document_of({**body, "state": "confirmed", "confirmed_at": time.time()})
        self.backend.write(f"claims/{_folder_of(kind, key)}.json", document)

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
            names = self._history_names(model)
            last = self._last_of(names)
            if last is not None and last["version"] == version:
                self._point_to(model, last)
                return str(last["replaced"])
            document = {
                **entry,
                "model": model,
                "version": version,
                "replaced": last["version"] if last else "",
                "sequence": _sequence_of(names[-1]) + 1 if names else 0,
            }
            if self._claim(model, document):
                self._point_to(model, document)
                return str(document["replaced"])
        raise ArtifactError(
            f"{model} could not be published in {self.uri}: others were faster {_PUBLISH_ATTEMPTS} times. Run again."
        )

    def _claim(self, model: str, document: Mapping[str, Any]) -> bool:
        name = f"{_model_folder(model)}/history/{document['sequence']:06d}"
        if self.backend.has_conditions:
            return self.backend.create(f"{name}.json", document_of(document))
        self.backend.write(f"{name}-{time.time_ns()}-{uuid.uuid4().hex[:8]}.json", document_of(document))
        return True

    def _point_to(self, model: str, document: Mapping[str, Any]) -> None:
        """Moves the pointer forward to `document`, unless it is there or further."""
        name, data = f"{_model_folder(model)}/latest.json", document_of(document)
        if not self.backend.has_conditions:
            self._point_to_last(model, name)
            return
        for _ in range(_PUBLISH_ATTEMPTS):
            try:
                current, tag = self._read_tagged(name)
            except FileNotFoundError:
                current, tag = None, ""
            if current is not None and current["sequence"] >= document["sequence"]:
                return
            if self.backend.replace(name, data, tag=tag) if tag else self.backend.create(name, data):
                return
        raise ArtifactError(f"{self.uri}/{name} changes faster than it can be moved. Run again.")

    def _point_to_last(self, model: str, name: str) -> None:
        """Writes the history's last entry as the pointer until it still is the last afterwards.

        Of two that write at once, the one whose pointer came last looks at the history last, and sees both entries.
        """
        last = self._last_of(self._history_names(model))
        while last is not None:
            self.backend.write(name, document_of(last))
            written, last = last, self._last_of(self._history_names(model))
            if last == written:
                return

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
        return self._last_of(self._history_names(model))

    def history(self, model: str) -> list[dict[str, Any]]:
        """Returns the entries of all published versions of a model, oldest first."""
        documents = self._mapped(self._read_listed, self._history_names(model))
        return [document for document in documents if document is not None]

    def _history_names(self, model: str) -> list[str]:
        """The names of a model's history, oldest first."""
        entries = self.backend.entries(f"{_model_folder(model)}/history/")
        return sorted(entry.name for entry in entries if _SEQUENCE.match(entry.name.rpartition("/")[2]))

    def _last_of(self, names: list[str]) -> dict[str, Any] | None:
        return next((found for name in reversed(names) if (found := self._read_listed(name)) is not None), None)

    def _read_listed(self, name: str) -> dict[str, Any] | None:
        """A listed document, which stays where it is; None where it is not sound, or has gone since."""
        try:
            return self._read_tagged(name)[0]
        except FileNotFoundError:
            return None


def _object_name(ref: ArtifactRef) -> str:
    if not isinstance(ref.sha256, str) or not _HEX.fullmatch(ref.sha256):
        raise ArtifactError(f"Object {ref.name!r} has the SHA-256 {ref.sha256!r}; expected 64 hexadecimal digits.")
    return f"objects/{ref.sha256[:2]}/{ref.sha256}"


def _run_folder(run_id: str) -> str:
    if not _NAME.fullmatch(run_id):
        raise UsageError(f"The run's name is {run_id!r}; expected letters, digits, '.', '_' and '-' alone.")
    return f"runs/{run_id}"


def _model_folder(model: str) -> str:
    if not _NAME.fullmatch(model):
        raise UsageError(f"model.publish_as is {model!r}; expected letters, digits, '.', '_' and '-' alone.")
    return f"models/{model}"


def _folder_of(kind: str, name: str) -> str:
    for part in (kind, name):
        if not _NAME.fullmatch(part):
            raise UsageError(f"{part!r} cannot be a name in a store; expected letters, digits, '.', '_' and '-' alone.")
    return f"{kind}/{name}"


def _sequence_of(name: str) -> int:
    return int(name.rpartition("/")[2][:6])
