"""Looking for new checkpoints: by watching a prefix, or as a bucket tells of them."""

import math
import threading
import time
from itertools import islice

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_logger, get_run_logger

from ptq.errors import ArtifactError, PtqError, UsageError
from ptq.records.base import digest
from ptq.service.bucket_notifications import created_objects
from ptq.service.checkpoint_watch import Checkpoint, CheckpointWatch, model_of
from ptq.storage.store import Store, open_store
from ptq.uris import is_remote
from tasks.service.announcements import Announced, Logger, announce, api, claim, confirm

# To read a large collection for the first time takes that much longer than to watch it.
LONGEST_READING_S = 6 * 3600.0
_WATCHED = "watched-prefix"
_AWAY = (ArtifactError, ConnectionError)
# Clocks are not exact: what must not have changed for so long is looked at a little later.
_MARGIN_S = 0.1
_MOST_WAITING = 100_000
_READ_AT_ONCE = 20
_AGAIN_S = 30.0


@task(timeout_seconds=LONGEST_READING_S, cache_policy=NO_CACHE)
def watch_prefix(
    prefix: str,
    store_uri: str,
    *,
    watch_for_s: float,
    interval_s: float,
    settle_s: float,
    stalled_after_s: float,
    skip_existing: bool,
) -> int:
    """Look at a prefix again and again until the time is over; returns how many checkpoints were announced.

    A look that fails since a server is away is repeated at the next one; the task fails only if all of them did.
    """
    logger = get_run_logger()
    store = open_store(store_uri)
    watch = CheckpointWatch(prefix, store, settle_s=settle_s, stalled_after_s=stalled_after_s)
    begun = time.monotonic()
    end = begun + max(watch_for_s, settle_s + _MARGIN_S)
    pause_s = interval_s if watch_for_s else settle_s + _MARGIN_S
    # When what the first look has seen counts, if nobody writes to it.
    settled_at = math.inf
    skips, announced = skip_existing, 0
    failure: Exception | None = None
    while True:
        looked_at = time.monotonic()
        try:
            if skips:
                skips = _skip(store, watch, is_last=looked_at > settled_at, logger=logger)
            else:
                announced += len(_look(store, watch, logger).sent)
            if settled_at == math.inf:
                settled_at = time.monotonic() + settle_s
                end = max(end, settled_at + _MARGIN_S)
        except _AWAY as error:
            failure = error
            logger.warning("%s Looked at again in %.0f s.", error, pause_s)
        if looked_at >= end:
            break
        time.sleep(max(0.0, min(pause_s, end - time.monotonic())))
    if failure and settled_at == math.inf:
        raise failure
    logger.info("Watched %s for %.0f s: %d new checkpoints", watch.prefix, time.monotonic() - begun, announced)
    return announced


def _look(store: Store, watch: CheckpointWatch, logger: Logger) -> Announced:
    result = announce(store, watch.poll(), logger)
    for each in result.done:
        watch.note_announced(each)
    watch.save()
    return result


def _skip(store: Store, watch: CheckpointWatch, *, is_last: bool, logger: Logger) -> bool:
    """Notes what lies there as known, without an event, if the prefix was never watched; returns whether to go on."""
    key, note = digest(watch.prefix), {"prefix": watch.prefix}
    if store.claim(_WATCHED, key, note, unconfirmed_s=0) == "done":
        return False
    for each in watch.poll():
        if claim(store, each) != "done":
            confirm(store, each, left_out="it was there before")
            logger.info("Left out, for it was there before: %s", each.uri)
        watch.note_announced(each)
    watch.save()
    if is_last:
        store.confirm(_WATCHED, key, note)
    return not is_last


class Inbox:
    """The objects that a bucket told of, and the work of announcing them, which a thread does.

    What waits is kept in memory. A receiver that starts again looks at the prefix first, and so finds what it was told
    of before, and what it was not told of.

    Args:
        prefix: the watched prefix, s3://bucket/prefix.
        store_uri: remembers what was announced; the same as the watcher's.

    Raises:
        UsageError: the prefix is not in S3, or there is no Prefect server.
    """

    def __init__(self, prefix: str, store_uri: str, *, settle_s: float = 5.0) -> None:
        if not is_remote(prefix):
            raise UsageError(f"--prefix is {prefix!r}; expected s3://bucket/prefix, whose bucket sends notifications.")
        with api():
            self._store = open_store(store_uri)
        self._watch = CheckpointWatch(prefix, self._store, settle_s=settle_s, stalled_after_s=600)
        self._settle_s = settle_s
        self._logger = get_logger("ptq.receiver")
        # What is to be looked at, and when (seconds of the monotonic clock).
        self._waiting: dict[str, float] = {}
        self._changed = threading.Condition()
        self._is_stopping = False
        self._looks = [0.0, 0.0]

    @property
    def waiting(self) -> int:
        """How many objects wait."""
        return len(self._waiting)

    @property
    def prefix(self) -> str:
        """The watched prefix."""
        return self._watch.prefix

    def put(self, body: bytes) -> tuple[int, int]:
        """Takes a notification; returns how many of its objects are checkpoints under the prefix, and how many not.

        Raises:
            UsageError: it is no notification.
            BufferError: too many wait already.
        """
        uris = created_objects(body)
        wanted = [uri for uri in uris if model_of(uri, self.prefix)]
        with self._changed:
            if len(self._waiting) + len(wanted) > _MOST_WAITING:
                raise BufferError(f"{len(self._waiting)} objects wait")
            for uri in wanted:
                self._waiting[uri] = 0.0
            self._changed.notify()
        return len(wanted), len(uris) - len(wanted)

    @property
    def has_caught_up(self) -> bool:
        """Whether the prefix was looked at, since the start."""
        return not self._looks

    def work(self) -> None:
        """Announces what comes in, until `stop`."""
        while not self._is_stopping:
            self.step()

    def step(self) -> None:
        """Announces what waits; lasts a second where nothing does."""
        if self._looks and time.monotonic() >= self._looks[0]:
            self._catch_up()
        uris = self._due()
        if uris:
            self._announce(uris)

    def stop(self) -> None:
        """Ends `work` after what it is at."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def _due(self) -> list[str]:
        """What is to be looked at now; waits up to a second where there is nothing."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(timeout=1.0)
            moment = time.monotonic()
            due = list(islice((uri for uri, at in self._waiting.items() if at <= moment), _READ_AT_ONCE))
            for uri in due:
                del self._waiting[uri]
            if not due and self._waiting:
                self._changed.wait(timeout=1.0)
        return due

    def _catch_up(self) -> None:
        """One look at the whole prefix; two that succeed are enough."""
        try:
            _look(self._store, self._watch, self._logger)
            self._looks = [time.monotonic() + self._settle_s + _MARGIN_S] if len(self._looks) > 1 else []
        except _AWAY as error:
            self._logger.warning("%s Looked at again in %.0f s.", error, _AGAIN_S)
            self._looks[0] = time.monotonic() + _AGAIN_S

    def _announce(self, uris: list[str]) -> None:
        found = [each for uri in uris if (each := self._read(uri)) is not None]
        try:
            done = announce(self._store, found, self._logger).done
        except _AWAY as error:
            self._logger.warning("%s Tried again in %.0f s.", error, _AGAIN_S)
            done = []
        for each in found:
            if each not in done:
                self._later(each.uri)

    def _read(self, uri: str) -> Checkpoint | None:
        try:
            return self._watch.read(uri)
        except ArtifactError as error:
            self._logger.warning("%s Tried again in %.0f s.", error, _AGAIN_S)
            self._later(uri)
        except PtqError as error:
            self._logger.warning("%s It is left out.", error)
        return None

    def _later(self, uri: str) -> None:
        with self._changed:
            self._waiting.setdefault(uri, time.monotonic() + _AGAIN_S)
