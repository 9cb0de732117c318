"""What was published, what can be published again, and what may go?

Reads a model's history, publishes an earlier version again, and removes what neither a version of any model nor a
recent run needs. History is only ever added to. What an object means is not known here: a document needs every object
whose SHA-256 stands in it.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ptq.backends import Entry
from ptq.errors import ArtifactError, UsageError
from ptq.records.base import ArtifactRef
from ptq.store import Store, artifact_refs, folder_of_uri, open_store

DAY_S = 86_400.0
# What a run has written, or is writing, may be named nowhere yet.
_KEPT_ANYWAY_S = DAY_S
_SHA256 = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_AT_ONCE = 8
# What `Store.publish` writes into an entry itself.
_OF_THE_PLACE = ("sequence", "replaced", "model", "version")


@dataclass(frozen=True, slots=True)
class Amount:
    """How many names of one kind, and their bytes."""

    kind: str
    count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Collection:
    """What `collect_garbage` kept and what it removed, or would remove, by kind."""

    kept: tuple[Amount, ...]
    removed: tuple[Amount, ...]
    is_dry_run: bool


@dataclass(frozen=True, slots=True)
class Restored:
    """A version that is latest again. `replaced` is the one that was, the same one if nothing had to be done."""

    model: str
    version: str
    replaced: str


def existing_store(uri: str) -> Store:
    """Returns the store at `uri`, which some run has written; nothing is created.

    Raises:
        UsageError: the URI's scheme is not known, or it names a folder that holds no store.
        ArtifactError: the folder cannot be written.
    """
    root = folder_of_uri(uri)
    if root is not None and not (root / "objects").is_dir():
        what = "is no store: it has no folder objects" if root.is_dir() else "does not exist"
        raise UsageError(f"{root} {what}. Expected the store of an earlier run. Give its folder or URI as --store.")
    return open_store(uri)


def read_history(store: Store, model: str) -> list[dict[str, Any]]:
    """Returns the entries of a model's published versions, oldest first.

    Raises:
        UsageError: no version of it was ever published; the message lists the models there are.
    """
    history = store.history(model)
    if not history:
        models = sorted({entry.name.split("/")[1] for entry in store.backend.entries("models/")})
        known = ", ".join(models) if models else "none"
        raise UsageError(
            f"No version of {model!r} was published in {store.uri}. The models there are: {known}. Give one of these, "
            "or another --store."
        )
    return history


def restore_version(store: Store, model: str, version: str, *, now: datetime) -> Restored:
    """Publishes an earlier version's entry again, as a new entry.

    Args:
        store: the store.
        model: name of the model.
        version: name of the version, or the beginning of it that only one version has.
        now: when it is published again.

    Raises:
        UsageError: the model or the version is not known, or several versions begin so.
        ArtifactError: objects of the version are gone or damaged; the message lists them.
    """
    history = read_history(store, model)
    names = list(dict.fromkeys(entry["version"] for entry in history))
    found = [name for name in names if name == version] or [name for name in names if name.startswith(version)]
    if len(found) != 1 or not version:
        what = f"has no version {version!r}" if not found else f"has {len(found)} versions that begin with {version!r}"
        raise UsageError(
            f"{model} {what}. Its versions, oldest first: {', '.join(names)}. Give one of these, or its first letters."
        )
    entry = next(entry for entry in reversed(history) if entry["version"] == found[0])
    missing = [f"{ref.name} ({ref.sha256[:12]})" for ref in _objects_of(entry) if not _is_usable(store, ref)]
    if missing:
        raise ArtifactError(
            f"{model} {found[0]} cannot be published again, for {store.uri} has lost {len(missing)} of its objects: "
            f"{', '.join(missing)}. Quantize its checkpoint {entry.get('checkpoint_sha256', '')[:12]} again."
        )
    replaced = history[-1]["version"]
    if replaced != found[0]:
        again = {key: value for key, value in entry.items() if key not in _OF_THE_PLACE}
        moment = now.astimezone(UTC).isoformat(timespec="seconds")
        replaced = store.publish(model, found[0], {**again, "restored_from": entry["sequence"], "published_at": moment})
    return Restored(model, found[0], replaced)


def _objects_of(entry: dict[str, Any]) -> list[ArtifactRef]:
    """What a version consists of; entries from before there was a list name the graph alone."""
    graph = ArtifactRef("model_int8.onnx", entry["onnx_sha256"], entry["onnx_size_bytes"])
    return list({ref.sha256: ref for ref in (graph, *artifact_refs(entry))}.values())


def _is_usable(store: Store, ref: ArtifactRef) -> bool:
    """Whether the object is whole in the store itself; this machine's cache may have one that the store has lost."""
    if not store.has(ref):
        return False
    try:
        store.get_path(ref)
    except ArtifactError:
        return False
    return True


def collect_garbage(store: Store, *, keep_days: float, now: float, delete: bool) -> Collection:
    """Removes what nothing needs any more, and says what it was.

    Half-written are files that no rename has ended, and uploads in parts that were neither completed nor aborted.

    Kept are the objects that any version of any model names, the stage records that runs of the last days noted, with
    the objects these name, and whatever was written within a day. A stage record goes when an object goes that it
    names. History, latest pointers and the notes of runs stay.

    A run may go on meanwhile: what it writes is young, and what it uses again it notes first. The notes are read a
    second time, after everything was listed, immediately before anything is removed.

    Args:
        store: the store.
        keep_days: how long a run's stages are kept after it noted them.
        now: seconds since the epoch.
        delete: whether to remove anything; otherwise only say what would be.

    Raises:
        UsageError: `keep_days` is negative.
        ArtifactError: the store cannot be read or written.
    """
    if keep_days < 0:
        raise UsageError(f"--keep-days is {keep_days:g}; expected 0 or a number of days above.")
    entries = {kind: list(store.backend.entries(f"{kind}/")) for kind in ("objects", "damaged")}
    unfinished = store.backend.unfinished(before=now, delete=False)
    records = [*store.backend.entries("stages/"), *store.backend.entries("remembered/")]
    named = dict(zip((entry.name for entry in records), _tokens(store, records), strict=True))
    since = now - keep_days * DAY_S
    kept_names, kept_objects = _needed(store, named, records, since=since)
    is_old = {entry.name: entry.modified_at < now - _KEPT_ANYWAY_S for entry in (*entries["objects"], *records)}
    for name, tokens in named.items():
        if not is_old[name]:
            kept_objects |= tokens
    lost = {
        _sha256_of(entry)
        for entry in entries["objects"]
        if is_old[entry.name] and _sha256_of(entry) not in kept_objects
    }
    removed = {
        # Records first: what is cut off here leaves objects that nothing names, never records that name nothing.
        "stage records": [e for e in records if e.name not in kept_names and is_old[e.name] and named[e.name] & lost],
        "objects": [entry for entry in entries["objects"] if _sha256_of(entry) in lost],
        "half-written": [entry for entry in unfinished if entry.modified_at < now - _KEPT_ANYWAY_S],
        "damaged": [entry for entry in entries["damaged"] if entry.modified_at < min(since, now - _KEPT_ANYWAY_S)],
    }
    if delete:
        for kind in ("stage records", "objects", "damaged"):
            for entry in removed[kind]:
                store.backend.delete(entry.name)
        store.backend.unfinished(before=now - _KEPT_ANYWAY_S, delete=True)
    every = {
        "stage records": records, "objects": entries["objects"], "half-written": unfinished,
        "damaged": entries["damaged"],
    }  # fmt: skip
    gone = {kind: set(group) for kind, group in removed.items()}
    kept = {kind: [entry for entry in group if entry not in gone[kind]] for kind, group in every.items()}
    return Collection(_amounts(kept), _amounts(removed), is_dry_run=not delete)


def _needed(
    store: Store, named: dict[str, set[str]], records: list[Entry], *, since: float
) -> tuple[set[str], set[str]]:
    """The records that recent runs need, and the objects that these and the published versions name."""
    published = list(store.backend.entries("models/"))
    objects = set().union(*_tokens(store, published))
    names = {entry.name for entry in records if entry.name.startswith("remembered/") and entry.modified_at >= since}
    runs = {entry.name.split("/")[1] for entry in store.backend.entries("runs/") if entry.modified_at >= since}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for notes in pool.map(store.run_stages, sorted(runs)):
            names |= {f"stages/{note['stage']}/{note['key']}.json" for note in notes}
    for name in names:
        objects |= named.get(name, set())
    # A stage that finished after the records were listed.
    late = [found for name in names - named.keys() if (found := store.backend.entry(name)) is not None]
    return names, objects.union(*_tokens(store, late))


def _tokens(store: Store, entries: Iterable[Entry]) -> list[set[str]]:
    """The SHA-256 digests that stand in each document."""

    def read(entry: Entry) -> set[str]:
        try:
            data, _ = store.backend.read(entry.name)
        except FileNotFoundError:
            return set()
        return {match.decode() for match in _SHA256.findall(data)}

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(read, entries))


def _sha256_of(entry: Entry) -> str:
    return entry.name.rpartition("/")[2]


def _amounts(groups: dict[str, list[Entry]]) -> tuple[Amount, ...]:
    return tuple(Amount(kind, len(group), sum(entry.size_bytes for entry in group)) for kind, group in groups.items())
