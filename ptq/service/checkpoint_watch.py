"""Which checkpoints lie under a watched prefix, and which of them are whole and not yet announced?

A checkpoint's version is its URI and the SHA-256 of its bytes: the same bytes copied again are nothing new. A file
counts once nobody has written to it for a while and it is whole as far as its format tells. Who is told of it, and that
this happens once, is not decided here.
"""

import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ptq.data.remote_inputs import checkpoint_ending
from ptq.errors import ArtifactError, UsageError
from ptq.records.base import digest
from ptq.service.checkpoint_locations import Found, place_of
from ptq.storage.store import Store
from ptq.uris import is_remote, s3_uri, split_uri

logger = logging.getLogger(__name__)

# Endings of files that a program is still writing, anywhere in a name: weights.tmp.pth.
_UNFINISHED = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".download", ".filepart", ".incomplete", ".swp")
# One of the files of a large checkpoint, of which none is a checkpoint.
_OF_SEVERAL = re.compile(r"-\d+-of-\d+\.")
# A file that cannot be read is tried again after so long.
_AGAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One version of a checkpoint, and the model that it belongs to."""

    uri: str
    model: str
    sha256: str
    size_bytes: int

    @property
    def id(self) -> uuid.UUID:
        """The same for the same URI and bytes, everywhere and always."""
        return uuid.uuid5(uuid.NAMESPACE_URL, f"{self.uri}#sha256={self.sha256}")


def watched_prefix(prefix: str) -> str:
    """Returns the one spelling of a prefix, without a slash at the end.

    Raises:
        UsageError: it is neither a folder nor an s3:// URI.

    >>> watched_prefix("s3://models/incoming/"), watched_prefix("file:///data/incoming")
    ('s3://models/incoming', '/data/incoming')
    """
    if is_remote(prefix):
        return s3_uri(*split_uri(prefix)).rstrip("/")
    path = prefix.removeprefix("file://")
    if not path or "://" in path:
        raise UsageError(f"prefix is {prefix!r}; expected a folder or s3://bucket/prefix.")
    return os.path.abspath(os.path.expanduser(path))


def model_of(uri: str, prefix: str) -> str:
    """Returns the model that a checkpoint under `prefix` belongs to, empty where it is none, or not under it.

    It is none where its ending is another one, and where it or a folder of it is hidden or a file still being written.

    >>> model_of("/in/resnet50/march/epoch7.pth", "/in"), model_of("/in/small.onnx", "/in")
    ('resnet50', 'small')
    >>> model_of("/in/resnet50/.epoch7.pth", "/in"), model_of("/in/resnet50/epoch7.pth.part", "/in")
    ('', '')
    """
    if not uri.startswith(f"{prefix}/"):
        return ""
    path = PurePosixPath(uri.removeprefix(f"{prefix}/"))
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_hidden = any(part.startswith((".", "~")) for part in path.parts)
    ending = checkpoint_ending(path.name)
    is_part = _OF_SEVERAL.search(path.name) is not None or (ending == ".bin" and path.name != "pytorch_model.bin")
    if not ending or is_part or is_hidden or set(suffixes) & set(_UNFINISHED):
        return ""
    return path.parts[0] if len(path.parts) > 1 else path.name[: -len(ending)]


class CheckpointWatch:
    """What has been seen under a prefix, over many polls and, with the store's memory, over restarts.

    Args:
        prefix: a folder or an s3:// URI.
        store: remembers the digest of each file, and that it was announced, as long as nobody touches the file.
        settle_s: seconds for which a file must not change before it counts.
        stalled_after_s: seconds after which a file that is not whole, and does not change either, is handed out as it
            is.
        now: the clock, in seconds since the epoch.

    Raises:
        UsageError: the prefix is neither a folder nor an s3:// URI.
    """

    def __init__(
        self,
        prefix: str,
        store: Store,
        *,
        settle_s: float,
        stalled_after_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.prefix = watched_prefix(prefix)
        self._store = store
        self._place = place_of(self.prefix, store)
        self._settle_s = settle_s
        self._stalled_after_s = stalled_after_s
        self._now = now
        self._known = self._recalled()
        self._has_news = False

    def poll(self) -> Iterator[Checkpoint]:
        """Lists the prefix and yields each checkpoint that counts and was not noted as announced.

        A checkpoint that cannot be read is left alone for a minute, with a warning; the others go on.

        Raises:
            ArtifactError: the place cannot be listed, or several checkpoints cannot be read.
        """
        begun = self._now()
        listed = [found for found in self._place.listed() if model_of(found.uri, self.prefix)]
        ended = self._now()
        self._forget_all_but({found.uri for found in listed})
        failures = 0
        for found in listed:
            known = self._known.get(found.uri)
            if known is None or known.state != found.state:
                self._known[found.uri] = _Known(found.state, ended)
                continue
            if known.is_announced or not found.size_bytes or begun - known.since < self._settle_s:
                continue
            try:
                is_ready = self._is_ready(found, known, stalled=begun - known.since >= self._stalled_after_s)
            except ArtifactError as error:
                logger.warning("%s Tried again in %.0f s.", error, _AGAIN_S)
                known.since = self._now() + _AGAIN_S
                failures += 1
                if failures > 1:
                    raise
                continue
            if is_ready:
                yield Checkpoint(found.uri, model_of(found.uri, self.prefix), known.sha256, found.size_bytes)

    def _is_ready(self, found: Found, known: "_Known", *, stalled: bool) -> bool:
        """Whether a settled checkpoint is handed out; what its bytes say of it is read once for each state."""
        if not known.sha256:
            reading = self._place.read(found)
            if reading is None:
                del self._known[found.uri]
                return False
            known.sha256, known.is_whole = reading.sha256, reading.is_whole
            self._has_news = True
            if not known.is_whole:
                logger.warning(
                    "%s (%d bytes) is not whole: its end is missing. It is announced as it is if nobody writes to it "
                    "for %.0f s.",
                    found.uri,
                    found.size_bytes,
                    self._stalled_after_s,
                )
        return known.is_whole or stalled

    def read(self, uri: str) -> Checkpoint | None:
        """Returns the version of a checkpoint that is there now, settled or not; None where there is none.

        Raises:
            ArtifactError: it cannot be read.
        """
        model = model_of(uri, self.prefix)
        found = self._place.find(uri) if model else None
        reading = self._place.read(found) if found and found.size_bytes else None
        return Checkpoint(uri, model, reading.sha256, found.size_bytes) if found and reading else None

    def note_announced(self, checkpoint: Checkpoint) -> None:
        """Notes that a version need not be handed out again."""
        known = self._known.get(checkpoint.uri)
        if known is not None and known.sha256 == checkpoint.sha256:
            known.is_announced = self._has_news = True

    def save(self) -> None:
        """Writes what is known into the store, if it was read or announced, with what others have found out meanwhile.

        Raises:
            ArtifactError: the store cannot be written.
        """
        if not self._has_news:
            return
        for uri, theirs in self._recalled().items():
            mine = self._known.get(uri)
            if mine is not None and mine.state == theirs.state and theirs.sha256 and not mine.is_announced:
                self._known[uri] = theirs
        content = {uri: known.to_json() for uri, known in self._known.items()}
        self._store.remember("watched", digest(self.prefix), json.dumps(content, sort_keys=True).encode())
        self._has_news = False

    def _forget_all_but(self, listed: set[str]) -> None:
        for uri in self._known.keys() - listed:
            del self._known[uri]
            self._has_news = True

    def _recalled(self) -> "dict[str, _Known]":
        try:
            content = json.loads(self._store.recall("watched", digest(self.prefix)) or b"{}")
            return {uri: _Known.of_json(values) for uri, values in content.items()}
        except (ValueError, TypeError, AttributeError):
            return {}


@dataclass(slots=True)
class _Known:
    """What is known of a file in one state, and since when it has been seen in it (seconds since the epoch)."""

    state: str
    since: float
    sha256: str = ""
    is_whole: bool = False
    is_announced: bool = False

    def to_json(self) -> list[str | float | bool]:
        return [self.state, self.since, self.sha256, self.is_whole, self.is_announced]

    @classmethod
    def of_json(cls, values: list) -> "_Known":
        state, since, sha256, is_whole, is_announced = values
        return cls(str(state), float(since), str(sha256), bool(is_whole), bool(is_announced))
