"""How does a new checkpoint become one event, whoever finds it, and whatever is ended on the way?"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import Event, Resource
from prefect.events.filters import EventFilter, EventIDFilter, EventOccurredFilter
from prefect.types._datetime import now

from ptq.errors import UsageError
from ptq.service.checkpoint_watch import Checkpoint
from ptq.storage.store import ClaimState, Store
from tasks.runtime.progress import has_lasting_server

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]

EVENT = "checkpoint.created"
# Longer than a claim and its event take: whoever claimed and did not confirm by then is gone.
_UNCONFIRMED_S = 60.0
# Prefect writes events into its database every 5 s, or as soon as there are 20.
_SHOWN_WITHIN_S = 20.0
_EVENTS_AT_ONCE = 20
# The clocks of this machine and of the server may differ by so much.
_CLOCKS = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Announced:
    """What a call of `announce` has done: the versions whose event it sent, and those that are done for good."""

    sent: list[Checkpoint] = field(default_factory=list)
    done: list[Checkpoint] = field(default_factory=list)


def announce(store: Store, checkpoints: Iterable[Checkpoint], logger: Logger) -> Announced:
    """Emits `checkpoint.created` for each version that nobody has announced, exactly once.

    A version is claimed in the store, its event sent, and the claim confirmed once the server shows the event, whose id
    follows from the version. A claim that somebody left behind is taken over after a minute: its event is sent unless
    the server has it. What is not done afterwards, somebody is at work on, or the server does not show it yet: call
    again later.

    Raises:
        ArtifactError: the store is away.
        ConnectionError: the Prefect server is away, or refuses events.
    """
    result = Announced()
    remaining = iter(checkpoints)
    with api() as client:
        while batch := list(dict.fromkeys(islice(remaining, _EVENTS_AT_ONCE))):
            # Asked before anything is claimed: a claim whose event cannot be sent keeps others waiting for a minute.
            client.request("GET", "/health")
            states = {each: claim(store, each) for each in batch}
            result.done.extend(each for each in batch if states[each] == "done")
            left_behind = [each for each in batch if states[each] == "again"]
            shown = _shown(client, left_behind)
            _confirm(store, shown, result)
            sent = [each for each in batch if states[each] == "first" or (each in left_behind and each not in shown)]
            _emit(client, sent)
            for each in sent:
                logger.info(
                    "New checkpoint of %s: %s (%d bytes, SHA-256 %s)",
                    each.model,
                    each.uri,
                    each.size_bytes,
                    each.sha256[:12],
                )
            result.sent.extend(sent)
        _confirm_when_shown(client, store, result, logger)
    return result


def check_server() -> None:
    """Asks the Prefect server whether it is there.

    Raises:
        UsageError: no server that stays is named.
        ConnectionError: it does not answer.
    """
    with api() as client:
        client.request("GET", "/health")


def claim(store: Store, checkpoint: Checkpoint) -> ClaimState:
    """Claims a version for being announced; see `Store.claim`."""
    return store.claim(EVENT, checkpoint.id.hex, _note(checkpoint), unconfirmed_s=_UNCONFIRMED_S)


def confirm(store: Store, checkpoint: Checkpoint, **more: str) -> None:
    """Notes that a version needs no event any more, and what else there is to say of it."""
    store.confirm(EVENT, checkpoint.id.hex, {**_note(checkpoint), **more})


@contextlib.contextmanager
def api() -> Iterator[SyncPrefectClient]:
    """A client of a Prefect server that stays; what it fails with becomes a ConnectionError.

    Raises:
        UsageError: no such server is named.
    """
    if not has_lasting_server():
        raise UsageError(
            "PREFECT_API_URL is not set, so an event would reach nobody. Expected the address of a Prefect server that "
            "stays, such as http://127.0.0.1:4200/api; `make serve` starts one."
        )
    with get_client(sync_client=True) as client:
        try:
            yield client
        except httpx.HTTPError as error:
            raise ConnectionError(
                f"The Prefect server at {client.api_url} takes no events: {error}. Expected one that answers. Check "
                "that it runs, and PREFECT_API_URL."
            ) from error


def _note(checkpoint: Checkpoint) -> dict[str, str]:
    return {"uri": checkpoint.uri, "sha256": checkpoint.sha256, "model": checkpoint.model, "event": str(checkpoint.id)}


def _emit(client: SyncPrefectClient, checkpoints: Sequence[Checkpoint]) -> None:
    """Sends the events and returns once the server has taken them; `emit_event` sends later, and says nothing."""
    events = [
        Event(
            id=each.id,
            event=EVENT,
            resource=Resource.model_validate({"prefect.resource.id": f"ptq.checkpoint.{each.model}"}),
            payload={"uri": each.uri, "model": each.model, "sha256": each.sha256, "size_bytes": each.size_bytes},
        ).model_dump(mode="json")
        for each in checkpoints
    ]
    if events:
        client.request("POST", "/events", json=events)


def _shown(client: SyncPrefectClient, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those whose event is in the server's database."""
    found = set()
    occurred = EventOccurredFilter(until=now("UTC") + _CLOCKS)
    for start in range(0, len(checkpoints), _EVENTS_AT_ONCE):
        ids = EventIDFilter(id=[each.id for each in checkpoints[start : start + _EVENTS_AT_ONCE]])
        events = client.read_events(filter=EventFilter(id=ids, occurred=occurred), limit=_EVENTS_AT_ONCE).events
        found |= {event.id for event in events}
    return [each for each in checkpoints if each.id in found]


def _confirm(store: Store, checkpoints: Iterable[Checkpoint], result: Announced) -> None:
    for each in checkpoints:
        confirm(store, each)
        result.done.append(each)


def _confirm_when_shown(client: SyncPrefectClient, store: Store, result: Announced, logger: Logger) -> None:
    """Confirms what was sent once the server shows it: until then, a server that is ended forgets it."""
    waiting, end = list(result.sent), time.monotonic() + _SHOWN_WITHIN_S
    while waiting and time.monotonic() < end:
        shown = _shown(client, waiting)
        _confirm(store, shown, result)
        waiting = [each for each in waiting if each not in shown]
        if waiting:
            time.sleep(0.5)
    if waiting:
        logger.warning(
            "The Prefect server took %d events that it does not show after %.0f s; what it does not show in a minute "
            "is sent again.",
            len(waiting),
            _SHOWN_WITHIN_S,
        )
