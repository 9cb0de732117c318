"""What only a bucket has: credentials, parts, a cache, and a network that breaks."""

import logging
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import s3_servers
from fault_proxy import FaultProxy

from ptq.errors import ArtifactError, UsageError
from ptq.records.base import ArtifactRef
from ptq.storage import s3_bucket, s3_client
from ptq.storage.cache import ObjectCache
from ptq.storage.s3_reader import RemoteObjects
from ptq.storage.store import Store, open_store

DATA = np.random.default_rng(0).bytes(300_000)


def object_name(ref):
    return f"objects/{ref.sha256[:2]}/{ref.sha256}"


@pytest.fixture
def through_proxy(s3_server, s3_uri, monkeypatch):
    """A store behind a proxy that does nothing yet."""
    with FaultProxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield open_store(s3_uri), proxy


def fail_next(proxy, kind, times):
    """Gives the proxy's next connections the fault, and then none."""
    proxy.planned = [kind] * times


def test_wrong_credentials_are_an_error_without_them(rclone_server, monkeypatch, caplog):
    for name, value in rclone_server.environment(secret="wrong-secret").items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO)
    store = open_store(f"s3://{s3_servers.BUCKET}/credentials")
    for call in (lambda: store.put_bytes(b"abc", "a"), lambda: store.publish("m", "v1", {}), lambda: store.latest("m")):
        with pytest.raises(ArtifactError, match="Check AWS_ENDPOINT_URL_S3, the bucket and the permissions") as raised:
            call()
        said = f"{raised.value} {raised.value.__cause__} {caplog.text}"
        assert "wrong-secret" not in said
        assert s3_servers.ACCESS_KEY not in said


def test_no_credentials_say_where_they_are_looked_for(s3_server, s3_uri, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ArtifactError, match=r"There are no credentials for s3://.*AWS_ACCESS_KEY_ID"):
        open_store(s3_uri).put_bytes(b"abc", "a")


@pytest.mark.parametrize("call", ["put", "publish", "history", "stage"])
def test_a_bucket_that_is_not_there_is_named(s3_server, call):
    store = open_store("s3://nobody/store")
    with pytest.raises(ArtifactError, match=r"s3://nobody/store.*NoSuchBucket.*Check AWS_ENDPOINT_URL_S3, the bucket"):
        {
            "put": lambda: store.put_bytes(b"abc", "a"),
            "publish": lambda: store.publish("m", "v1", {}),
            "history": lambda: store.history("m"),
            "stage": lambda: store.read_stage("export", "k" * 64),
        }[call]()


def test_an_endpoint_that_does_not_answer_is_named_without_its_password(s3_server, s3_uri, monkeypatch):
    port = s3_servers.free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:pass-word@127.0.0.1:{port}")
    with pytest.raises(ArtifactError, match=rf"127\.0\.0\.1:{port} within 1 s: .*Check AWS_ENDPOINT_URL_S3") as raised:
        Store(s3_bucket.S3Bucket(s3_uri, patience_s=1.0)).put_bytes(b"abc", "a")
    assert "pass-word" not in str(raised.value)


@pytest.mark.parametrize("uri", ["s3://key:secret@models/ptq", "https://key:secret@models/ptq"])
def test_credentials_in_the_uri_are_refused_without_being_repeated(uri):
    with pytest.raises(UsageError, match=r"expected .*s3://bucket/prefix") as raised:
        open_store(uri)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///a", "s3://b/../c", "s3://b/a?x=1", "s3://b/a#x", "s3://b?addressing=no"]
)
def test_a_uri_that_is_no_bucket_is_refused(uri):
    with pytest.raises((UsageError, ArtifactError), match="expected|Expected"):
        open_store(uri)


def test_a_file_above_the_limit_goes_up_in_parts(s3_server, s3_uri, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_bucket, "MULTIPART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_bucket, "_PART_BYTES", 5 * 2**20)
    data = np.random.default_rng(1).bytes(11 * 2**20 + 1)
    (tmp_path / "large").write_bytes(data)
    store = open_store(s3_uri)
    assert store.get_bytes(store.put_file(tmp_path / "large")) == data
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=s3_servers.BUCKET)


def test_an_object_is_read_from_the_server_once(s3_server, s3_uri):
    store = open_store(s3_uri)
    ref = store.put_bytes(DATA, "a")
    path = store.get_path(ref)
    store.backend.delete(object_name(ref))
    assert store.get_path(ref) == path
    path.write_bytes(b"damaged on this machine")
    with pytest.raises(ArtifactError, match="is not in the store"):
        store.get_path(ref)


def test_a_cache_forgets_what_was_used_longest_ago(tmp_path, monkeypatch):
    monkeypatch.setattr("ptq.storage.cache._KEPT_S", 0.0)
    cache = ObjectCache(tmp_path, limit_bytes=25)
    digests = [f"{i}" * 64 for i in range(3)]
    for digest in digests:
        cache.add(digest, lambda path, digest=digest: (path.write_bytes(b"0123456789"), digest)[1])
    kept = sorted(path.name for path in tmp_path.glob("??/*"))
    assert kept == digests[1:]


def test_processes_with_their_own_caches_share_the_objects_of_a_bucket(s3_server, s3_uri, tmp_path):
    ref = open_store(s3_uri).put_bytes(DATA, "a")
    other = Store(s3_bucket.S3Bucket(s3_uri), cache=ObjectCache(tmp_path / "other", limit_bytes=2**30))
    assert other.get_bytes(ref) == DATA
    assert other.get_path(ref).is_relative_to(tmp_path / "other")


@pytest.mark.parametrize("kind", ["reset", "slow_down", "truncated", "flipped_download", "flipped_upload", "slow"])
def test_a_fault_on_the_way_is_overcome(through_proxy, kind, tmp_path):
    store, proxy = through_proxy
    # The look-up before an upload has no body to flip.
    fail_next(proxy, kind, 1 if kind == "slow_down" else 2)
    (tmp_path / "a").write_bytes(DATA)
    ref = store.put_file(tmp_path / "a")
    assert store.backend.read(object_name(ref))[0] == DATA
    fail_next(proxy, kind, 1)
    assert store.get_bytes(ref) == DATA
    store.publish("m", "v1", {})
    fail_next(proxy, kind, 1)
    assert store.latest("m")["version"] == "v1"
    assert proxy.injected[kind] >= 1


@pytest.mark.parametrize(
    "call",
    [
        lambda store, ref: store.get_bytes(ref),
        lambda store, ref: store.put_bytes(b"other", "b"),
        lambda store, ref: store.has(ref),
        lambda store, ref: store.publish("m", "v1", {}),
        lambda store, ref: store.backend.move(object_name(ref), "damaged/a"),
        lambda store, ref: store.backend.delete(object_name(ref)),
        lambda store, ref: RemoteObjects().read(f"s3://{store.backend.bucket}/{store.uri.split('/')[3]}/inputs/a"),
    ],
    ids=["get", "put", "look up", "publish", "move", "delete", "read an input"],
)
def test_a_server_that_is_away_for_longer_than_botocore_waits_is_waited_for(through_proxy, monkeypatch, call):
    store, proxy = through_proxy
    ref = store.put_bytes(DATA, "a")
    store.backend.write("inputs/a", b"input")
    said = []

    def reopen(*message):
        said.append(message[0] % message[1:])
        proxy.open()

    # Refused until botocore has given up and the store begins to wait, however fast the machine is.
    monkeypatch.setattr(s3_client.logger, "warning", reopen)
    proxy.close()
    call(store, ref)
    (message,) = said
    assert re.fullmatch(r"The S3 server is away \(EndpointConnectionError\); waiting up to [1-9]\d s\.", message)


def test_a_server_that_stays_away_is_an_error_when_patience_ends(through_proxy, s3_uri):
    _, proxy = through_proxy
    store = Store(s3_bucket.S3Bucket(s3_uri, patience_s=1.5))
    proxy.close()
    with pytest.raises(ArtifactError, match=r"within 1\.5 s: Could not connect .* Expected a server that answers"):
        store.latest("m")


def test_a_server_that_answers_nothing_but_503_is_an_error_when_patience_ends(through_proxy, s3_uri):
    _, proxy = through_proxy
    fail_next(proxy, "slow_down", 1000)
    store = Store(s3_bucket.S3Bucket(s3_uri, patience_s=0.5))
    with pytest.raises(ArtifactError, match=r"within 0\.5 s: .*503.* Expected a server that answers"):
        store.has(ArtifactRef("a", "0" * 64, 1))


def test_a_large_file_that_was_changed_on_its_way_is_sent_again(through_proxy, tmp_path):
    store, proxy = through_proxy
    data = np.random.default_rng(2).bytes(3 * 2**20)
    (tmp_path / "large").write_bytes(data)
    fail_next(proxy, "flipped_upload", 2)  # the look-up has no body to flip
    ref = store.put_file(tmp_path / "large")
    assert proxy.injected["flipped_upload"] == 1
    assert store.backend.read(object_name(ref))[0] == data


def test_bytes_that_are_damaged_in_the_bucket_are_told_from_those_changed_on_the_way(through_proxy):
    store, proxy = through_proxy
    ref = store.put_bytes(DATA, "a")
    fail_next(proxy, "flipped_download", 100)
    with pytest.raises(ArtifactError, match="was read 4 times, each time with other bytes.*Check network and proxies"):
        store.get_bytes(ref)
    fail_next(proxy, "", 0)
    assert store.get_bytes(ref) == DATA


def test_a_full_disk_is_an_error_and_leaves_nothing(s3_server, s3_uri, tmp_path):
    ref = open_store(s3_uri).put_bytes(DATA, "a")
    script = (
        "import resource, signal, sys\n"
        "from ptq.errors import ArtifactError\nfrom ptq.records.base import ArtifactRef\n"
        "from ptq.storage.store import open_store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    open_store(sys.argv[1]).get_path(ArtifactRef('a', sys.argv[2], 300_000))\n"
        "except ArtifactError as error:\n    print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, s3_uri, ref.sha256], capture_output=True, text=True, check=True,
        cwd=s3_bucket.__file__.rpartition("/ptq/")[0],
    )  # fmt: skip
    assert "cache cannot be used: File too large. Expected free space" in said.stdout
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_many_threads_share_a_bucket(s3_server, s3_uri):
    store = open_store(s3_uri)
    threads = [threading.Thread(target=store.put_bytes, args=(b"%d" % i, "a")) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(store.backend.entries("objects/"))) == 16


def test_a_list_that_fills_several_pages_is_read_to_its_end(s3_server, s3_uri, monkeypatch):
    store = open_store(s3_uri)
    for i in range(7):
        store.backend.write(f"inputs/{i}", b"x")
    client = store.backend._client
    plain = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **where: plain(**where, MaxKeys=3))
    assert [entry.name for entry in store.backend.entries("inputs/")] == [f"inputs/{i}" for i in range(7)]


def test_the_same_bucket_is_opened_once_and_again_with_other_settings(s3_server, s3_uri, monkeypatch):
    first = open_store(s3_uri).backend
    assert open_store(s3_uri).backend is first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert open_store(s3_uri).backend is not first
