"""Is what cannot be reached looked at again, and does what a bucket told of wait until it is announced?"""

import json
import time
import uuid

import pytest
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from s3_servers import BUCKET

from ptq.errors import ArtifactError, UsageError
from ptq.storage.store import open_store
from tasks.service import watching
from tasks.service.announcements import Announced
from tasks.service.watching import Inbox, watch_prefix

OPTIONS = {
    "watch_for_s": 0.3, "interval_s": 0.05, "settle_s": 0.1, "stalled_after_s": 600, "skip_existing": False,
}  # fmt: skip


@pytest.fixture
def incoming(tmp_path):
    (tmp_path / "incoming" / "digits").mkdir(parents=True)
    (tmp_path / "incoming" / "digits" / "a.onnx").write_bytes(b"weights")
    return tmp_path / "incoming"


@pytest.fixture
def announced(monkeypatch):
    """What is announced, of which nobody is told; an error in `failures` is raised in its place."""
    calls, failures = [], []

    def announce(store, checkpoints, logger):
        found = list(checkpoints)
        if failures:
            raise failures.pop()
        calls.extend(each.uri for each in found)
        return Announced(found, found)

    monkeypatch.setattr(watching, "announce", announce)
    return calls, failures


def watched(prefix, store, **options):
    with disable_run_logger():
        return watch_prefix.fn(str(prefix), str(store), **{**OPTIONS, **options})


def test_one_look_includes_the_wait_until_a_file_has_settled(incoming, announced, tmp_path):
    assert watched(incoming, tmp_path / "store", watch_for_s=0, interval_s=600) == 1
    assert announced[0] == [str(incoming / "digits" / "a.onnx")]


@pytest.mark.parametrize("error", [ConnectionError("the server is away"), ArtifactError("the store is away")])
def test_a_look_that_fails_is_followed_by_others(incoming, announced, tmp_path, error):
    announced[1].extend([error, error])
    assert watched(incoming, tmp_path / "store") == 1


def test_a_watch_whose_every_look_failed_fails_with_the_last_error(announced, tmp_path):
    with pytest.raises(ArtifactError, match="watched folder .*nowhere does not exist"):
        watched(tmp_path / "nowhere", tmp_path / "store")


def test_an_error_of_another_kind_ends_the_watch(incoming, announced, tmp_path):
    announced[1].append(UsageError("PREFECT_API_URL is not set"))
    with pytest.raises(UsageError, match="PREFECT_API_URL"):
        watched(incoming, tmp_path / "store")


def test_what_lay_there_before_is_left_out_once_and_what_comes_later_is_not(incoming, announced, tmp_path):
    store = tmp_path / "store"
    assert watched(incoming, store, skip_existing=True) == 0
    (incoming / "digits" / "b.onnx").write_bytes(b"other weights")
    assert watched(incoming, store, skip_existing=True) == 1
    assert announced[0] == [str(incoming / "digits" / "b.onnx")]


def test_what_was_left_out_is_done_for_every_other_watch(incoming, announced, tmp_path):
    watched(incoming, tmp_path / "store", skip_existing=True)
    claims = list((tmp_path / "store" / "claims" / "checkpoint.created").glob("*.json"))
    assert [json.loads(path.read_text())["left_out"] for path in claims] == ["it was there before"]
    assert open_store(str(tmp_path / "store")).claim(
        "checkpoint.created", claims[0].stem, {}, unconfirmed_s=0
    ) == "done"  # fmt: skip


def test_a_watched_prefix_that_was_left_out_only_in_part_is_left_out_whole(incoming, announced, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(watching, "confirm", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            watched(incoming, tmp_path / "store", skip_existing=True)
    (incoming / "digits" / "b.onnx").write_bytes(b"other weights")
    assert watched(incoming, tmp_path / "store", skip_existing=True) == 0
    claims = (tmp_path / "store" / "claims" / "checkpoint.created").glob("*.json")
    assert [json.loads(path.read_text())["state"] for path in claims] == ["confirmed", "confirmed"]


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.fixture
def inbox(s3_server, announced, tmp_path, monkeypatch):
    """An inbox whose prefix is empty, and which tries again at once."""
    monkeypatch.setattr(watching, "_AGAIN_S", 0.0)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        return Inbox(f"s3://{BUCKET}/{uuid.uuid4().hex}", str(tmp_path / "store"), settle_s=0.1)


def notification(*uris):
    records = [
        {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": bucket}, "object": {"key": key}}}
        for bucket, _, key in (uri.removeprefix("s3://").partition("/") for uri in uris)
    ]
    return json.dumps({"Records": records}).encode()


def put(server, uri, body=b"weights"):
    client = server.client()
    client.put_object(Bucket=BUCKET, Key=uri.removeprefix(f"s3://{BUCKET}/"), Body=body)
    client.close()


def worked(inbox, *, until):
    """Lets the inbox work until a condition holds."""
    end = time.monotonic() + 30

    def is_over():
        return until() or time.monotonic() > end

    while not is_over():
        inbox.step()


def test_what_the_bucket_tells_of_is_announced_and_what_is_no_checkpoint_under_the_prefix_is_counted(
    inbox, announced, s3_server
):
    uri = f"{inbox.prefix}/digits/a.onnx"
    put(s3_server, uri)
    others = [f"{inbox.prefix}/digits/a.txt", f"{inbox.prefix}x/digits/a.onnx", f"{inbox.prefix}/digits/.a.onnx"]
    assert inbox.put(notification(uri, *others)) == (1, 3)
    assert inbox.put(notification(uri)) == (1, 0)
    assert inbox.waiting == 1
    worked(inbox, until=lambda: inbox.waiting == 0)
    assert announced[0] == [uri]


@pytest.mark.slow
def test_what_cannot_be_announced_waits_and_is_tried_again(inbox, announced, s3_server):
    uri = f"{inbox.prefix}/digits/a.onnx"
    worked(inbox, until=lambda: inbox.has_caught_up)
    put(s3_server, uri)
    inbox.put(notification(uri))
    announced[1].extend([ConnectionError("away"), ArtifactError("away")])
    worked(inbox, until=lambda: inbox.waiting == 0 and not announced[1])
    assert announced[0] == [uri]


def test_an_object_that_is_gone_or_empty_is_left_out(inbox, announced, s3_server):
    worked(inbox, until=lambda: inbox.has_caught_up)
    put(s3_server, f"{inbox.prefix}/digits/empty.onnx", b"")
    inbox.put(notification(f"{inbox.prefix}/digits/gone.onnx", f"{inbox.prefix}/digits/empty.onnx"))
    worked(inbox, until=lambda: inbox.waiting == 0)
    assert announced[0] == []


def test_what_came_while_nobody_listened_is_found_by_a_look_at_the_prefix(inbox, announced, s3_server):
    put(s3_server, f"{inbox.prefix}/digits/a.onnx")
    announced[1].append(ArtifactError("away"))
    worked(inbox, until=lambda: inbox.has_caught_up)
    assert announced[0] == [f"{inbox.prefix}/digits/a.onnx"]


def test_more_than_can_wait_is_refused(inbox, monkeypatch):
    monkeypatch.setattr(watching, "_MOST_WAITING", 1)
    inbox.put(notification(f"{inbox.prefix}/digits/a.onnx"))
    with pytest.raises(BufferError, match="1 objects wait"):
        inbox.put(notification(f"{inbox.prefix}/digits/b.onnx"))


def test_a_folder_sends_no_notifications(tmp_path):
    with pytest.raises(UsageError, match="--prefix is .*expected s3://bucket/prefix, whose bucket sends notifications"):
        Inbox(str(tmp_path), str(tmp_path / "store"))
