"""Does a new checkpoint become one event on a Prefect server, whatever is ended or away on the way?"""

import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.events import Event, Resource
from prefect.events.filters import (
    EventFilter,
    EventIDFilter,
    EventNameFilter,
    EventOccurredFilter,
    EventResourceFilter,
)
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.types._datetime import now

from ptq.errors import ArtifactError, UsageError
from ptq.service.checkpoint_watch import Checkpoint
from ptq.storage.store import open_store
from tasks.service import announcements
from tasks.service.announcements import announce

pytestmark = pytest.mark.usefixtures("prefect_backend")

ROOT = Path(__file__).resolve().parents[3]
slow = partial(pytest.param, marks=pytest.mark.slow)
logger = logging.getLogger(__name__)


@pytest.fixture
def model():
    """The name of a model that no other test announces checkpoints of."""
    return f"model-{uuid.uuid4().hex}"


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def impatient(monkeypatch):
    """A claim that was not confirmed is taken over at once."""
    monkeypatch.setattr(announcements, "_UNCONFIRMED_S", 0.0)


def versions(model, count=1):
    return [Checkpoint(f"/in/{model}/{number}.pth", model, f"{number:064x}", 1000 + number) for number in range(count)]


def payloads(model):
    """The payloads of a model's events, after everything that the server has was written into its database."""
    with get_client(sync_client=True) as client:
        # As many as the server writes at once, behind all that came before.
        last = [Event(event="test.last", resource=Resource({"prefect.resource.id": "test"})) for _ in range(20)]
        client.request("POST", "/events", json=[event.model_dump(mode="json") for event in last])
        end = time.monotonic() + 30
        while not shown(client, EventFilter(id=EventIDFilter(id=[last[-1].id]))) and time.monotonic() < end:
            time.sleep(0.2)
        resource = EventResourceFilter(id=[f"ptq.checkpoint.{model}"])
        return shown(client, EventFilter(event=EventNameFilter(name=["checkpoint.created"]), resource=resource))


def shown(client, wanted):
    wanted.occurred = EventOccurredFilter(until=now("UTC") + timedelta(minutes=5))
    page = client.read_events(filter=wanted, limit=50)
    found = [event.payload for event in page.events]
    while page.next_page is not None:
        page = page.get_next_page_sync(client)
        found += [event.payload for event in page.events]
    return found


def test_a_checkpoint_becomes_one_event_with_what_a_run_needs(store, model):
    (version,) = versions(model)
    result = announce(store, [version, version], logger)
    assert (result.sent, result.done) == ([version], [version])
    again = announce(store, [version, version], logger)
    assert (again.sent, again.done) == ([], [version])
    assert payloads(model) == [
        {"uri": version.uri, "model": model, "sha256": version.sha256, "size_bytes": version.size_bytes}
    ]


@pytest.mark.slow
def test_two_hundred_checkpoints_become_two_hundred_events(store, model, monkeypatch):
    monkeypatch.setattr(announcements, "_SHOWN_WITHIN_S", 120.0)
    result = announce(store, iter(versions(model, 200)), logger)
    assert (len(result.sent), len(result.done)) == (200, 200)
    found = payloads(model)
    assert sorted(payload["uri"] for payload in found) == sorted(version.uri for version in versions(model, 200))


def test_watchers_that_overlap_announce_each_checkpoint_once(tmp_path, model):
    results, barrier = [], threading.Barrier(4)

    def watch():
        store = open_store(str(tmp_path / "store"))
        barrier.wait()
        results.append(announce(store, versions(model, 30), logger))

    threads = [threading.Thread(target=watch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert sum(len(result.sent) for result in results) == 30
    assert len(payloads(model)) == 30


def test_a_watcher_that_fails_before_the_event_is_followed_by_one_that_sends_it(store, model, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(announcements, "_emit", failing(ConnectionError("reset by peer")))
        with pytest.raises(ConnectionError, match="reset by peer"):
            announce(store, versions(model), logger)
    held = announce(store, versions(model), logger)
    assert (held.sent, held.done) == ([], [])
    monkeypatch.setattr(announcements, "_UNCONFIRMED_S", 0.0)
    assert announce(store, versions(model), logger).sent == versions(model)
    assert len(payloads(model)) == 1


@pytest.mark.usefixtures("impatient")
def test_a_watcher_that_fails_after_the_event_is_followed_by_one_that_sends_no_other(store, model, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(store, "confirm", failing(ArtifactError("the store is away")))
        with pytest.raises(ArtifactError, match="the store is away"):
            announce(store, versions(model), logger)
    after = announce(store, versions(model), logger)
    assert (after.sent, after.done) == ([], versions(model))
    assert len(payloads(model)) == 1


@pytest.mark.usefixtures("impatient")
def test_an_event_that_the_server_took_and_lost_is_sent_again(store, model, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        patched.setattr(announcements, "_emit", lambda client, checkpoints: None)
        patched.setattr(announcements, "_SHOWN_WITHIN_S", 0.5)
        assert announce(store, versions(model), logger).done == []
    assert "took 1 events that it does not show" in caplog.text
    assert announce(store, versions(model), logger).done == versions(model)
    assert len(payloads(model)) == 1


@pytest.mark.slow
def test_nothing_is_claimed_while_the_server_is_away(store, model):
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(ConnectionError, match=r"Prefect server at http://127\.0\.0\.1:9/api/ takes no events"),
    ):
        announce(store, versions(model), logger)
    assert announce(store, versions(model), logger).sent == versions(model)


def test_a_server_that_refuses_an_event_is_an_error(store, model, monkeypatch):
    monkeypatch.setattr(announcements, "Event", Refused)
    with pytest.raises(ConnectionError, match="takes no events: .*422"):
        announce(store, versions(model), logger)


def test_without_a_server_that_stays_nothing_is_announced(store, model):
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(UsageError, match="PREFECT_API_URL is"):
        announce(store, versions(model), logger)


# Announces one checkpoint in a process of its own, which stops at the point that is named and waits to be killed.
SCRIPT = """
import logging, sys, time
from ptq.service.checkpoint_watch import Checkpoint
from ptq.storage.store import open_store
from tasks.service import announcements

def stop(*arguments, **options):
    print("here", flush=True)
    time.sleep(600)

point, store, uri, model, sha256 = sys.argv[1:]
setattr(announcements, point, stop)
announcements.announce(open_store(store), [Checkpoint(uri, model, sha256, 1000)], logging.getLogger())
"""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("point", "left_to_send"), [slow("_emit", 1), ("_confirm_when_shown", 0), slow("confirm", 0)])
def test_a_process_that_is_killed_at_any_point_leaves_one_event_in_the_end(store, model, tmp_path, point, left_to_send):
    (version,) = versions(model)
    arguments = [point, str(tmp_path / "store"), version.uri, model, version.sha256]
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        reached = process.stdout.readline()
        process.kill()
    assert reached == "here\n"
    assert len(payloads(model)) == 1 - left_to_send
    assert len(announce(store, [version], logger).sent) == left_to_send
    assert announce(store, [version], logger).sent == []
    assert len(payloads(model)) == 1


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail


class Refused:
    """An event that no server takes."""

    def __init__(self, **fields):
        pass

    def model_dump(self, mode):
        return {"event": None}
