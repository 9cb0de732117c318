"""What was published, what can be published again, and what may go?

Reads a model's history, publishes an earlier version again, and removes what neither a version of any model nor a
recent run needs. History is only ever added to. What an object means is not known here: a document needs every object
whose SHA-256 stands in it.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ptq.errors import UsageError
from ptq.storage.backend import Entry
from ptq.storage.store import Store

DAY_S = 86_400.0
# What a run has written, or is writing, may be named nowhere yet.
_KEPT_ANYWAY_S = DAY_S
_SHA256 = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_AT_ONCE = 8


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
        "stage records": records,
        "objects": entries["objects"],
        "half-written": unfinished,
        "damaged": entries["damaged"],
    }
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
