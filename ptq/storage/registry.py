"""Which versions of a model were published, and which one is in service?"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ptq.errors import ArtifactError, UsageError
from ptq.records.base import ArtifactRef
from ptq.storage.documents import artifact_refs
from ptq.storage.store import Store, open_store
from ptq.uris import folder_of_uri

# What `Store.publish` writes into an entry itself.
_OF_THE_PLACE = ("sequence", "replaced", "model", "version")


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
