import os
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import s3_servers
from botocore.exceptions import ClientError

from ptq.errors import ArtifactError, UsageError
from ptq.records.base import to_jsonable
from ptq.storage.garbage import DAY_S, collect_garbage
from ptq.storage.registry import existing_store, read_history, restore_version
from ptq.storage.store import StageEntry, Store, open_store

NOW = datetime(2026, 11, 24, tzinfo=UTC)


class AgingBackend:
    """A backend whose entries can be made older: no server lets a client choose when an object was written."""

    def __init__(self, backend):
        self.plain = backend
        self.days = {}

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def _aged(self, entry):
        return entry and replace(entry, modified_at=entry.modified_at - self.days.get(entry.name, 0) * DAY_S)

    def entry(self, name):
        return self._aged(self.plain.entry(name))

    def entries(self, prefix):
        return map(self._aged, self.plain.entries(prefix))

    def write(self, name, data, **more):
        self.days.pop(name, None)
        self.plain.write(name, data, **more)


@pytest.fixture
def store(store):
    """A store of each kind, whose content can be made older."""
    return Store(AgingBackend(store.backend))


def ref_of(store, text):
    return store.put_bytes(text.encode(), f"{text}.bin")


def publish(store, model, version, **more):
    ref = ref_of(store, f"graph {version}")
    entry = {
        "onnx_sha256": ref.sha256, "onnx_size_bytes": ref.size_bytes, "checkpoint_sha256": "c" * 64,
        "objects": {name: to_jsonable(each) for name, each in more.items()},
    }  # fmt: skip
    store.publish(model, version, entry)
    return ref


def finish(store, run, stage, key, *refs):
    entry = StageEntry(stage, key * 64, {"made": to_jsonable(refs)}, 1.0, 0.0)
    store.write_stage(entry)
    store.note_stage(run, entry, cached=False)
    return entry


def age(store, days):
    """Makes everything in the store so many days old."""
    store.backend.days = {entry.name: days for entry in store.backend.plain.entries("")}


def lose(store, ref):
    store.backend.delete(f"objects/{ref.sha256[:2]}/{ref.sha256}")


def collect(store, *, keep_days=30.0, delete=True, now=0.0):
    found = collect_garbage(store, keep_days=keep_days, now=now or time.time(), delete=delete)
    return {amount.kind: amount.count for amount in found.removed if amount.count}


def test_the_history_of_an_unknown_model_lists_the_known_ones(store):
    publish(store, "small", "v1")
    with pytest.raises(UsageError, match=r"No version of 'large'.*The models there are: small\."):
        read_history(store, "large")


def test_a_version_comes_back_as_a_new_entry_and_history_stays(store):
    publish(store, "small", "aa11")
    publish(store, "small", "bb22")
    restored = restore_version(store, "small", "aa", now=NOW)
    assert (restored.version, restored.replaced) == ("aa11", "bb22")
    history = read_history(store, "small")
    assert [entry["version"] for entry in history] == ["aa11", "bb22", "aa11"]
    assert store.latest("small") == history[-1]
    assert history[-1]["restored_from"] == 0
    assert history[-1]["published_at"] == "2026-11-24T00:00:00+00:00"
    assert history[-1]["onnx_sha256"] == history[0]["onnx_sha256"]


def test_the_latest_version_is_not_published_twice(store):
    publish(store, "small", "aa11")
    assert restore_version(store, "small", "aa11", now=NOW).replaced == "aa11"
    assert len(read_history(store, "small")) == 1


@pytest.mark.parametrize(
    ("version", "message"),
    [("cc", r"has no version 'cc'\. .*aa11, aa22"), ("aa", r"has 2 versions that begin with 'aa'"), ("", "has 2 vers")],
)
def test_a_version_that_is_not_told_apart_lists_those_there_are(store, version, message):
    publish(store, "small", "aa11")
    publish(store, "small", "aa22")
    with pytest.raises(UsageError, match=message):
        restore_version(store, "small", version, now=NOW)


def test_a_version_whose_objects_are_gone_lists_them_and_stays_what_it_was(store):
    graph = publish(store, "small", "aa11")
    publish(store, "small", "bb22")
    store.get_path(graph)
    lose(store, graph)
    with pytest.raises(ArtifactError, match=rf"lost 1 of its objects: model_int8\.onnx \({graph.sha256[:12]}\)"):
        restore_version(store, "small", "aa11", now=NOW)
    assert store.latest("small")["version"] == "bb22"


def test_a_dry_run_names_what_would_go_and_removes_nothing(store):
    ref_of(store, "lost")
    age(store, 2)
    assert collect(store, delete=False) == {"objects": 1}
    assert collect(store, delete=False) == {"objects": 1}
    assert collect(store) == {"objects": 1}
    assert collect(store) == {}


def test_every_version_of_every_model_stays_whole(store):
    kept = [publish(store, model, f"{model}{i}", more=ref_of(store, f"{model}{i}")) for model in "ab" for i in (1, 2)]
    age(store, 400)
    assert collect(store) == {}
    assert all(store.has(ref) for ref in kept)
    for version in ("a1", "a2"):
        restore_version(store, "a", version, now=NOW)


def test_what_a_recent_run_used_stays_and_what_an_old_one_used_goes(store):
    old = finish(store, "run-1", "evaluate", "a", ref_of(store, "old"), ref_of(store, "shared"))
    age(store, 40)
    new = finish(store, "run-2", "evaluate", "b", ref_of(store, "new"), ref_of(store, "shared"))
    assert collect(store, keep_days=30) == {"objects": 1, "stage records": 1}
    assert store.read_stage(old.stage, old.key) is None
    assert store.read_stage(new.stage, new.key) == new


def test_an_old_stage_that_a_recent_run_found_stays(store):
    entry = finish(store, "run-1", "evaluate", "a", ref_of(store, "old"))
    age(store, 400)
    store.note_stage("run-2", entry, cached=True)
    assert collect(store) == {}
    assert store.read_stage(entry.stage, entry.key) == entry


def test_a_record_whose_objects_all_stay_stays_too(store):
    graph = publish(store, "small", "aa11")
    entry = finish(store, "run-1", "write_graph", "a", graph)
    age(store, 400)
    assert collect(store) == {}
    assert store.read_stage(entry.stage, entry.key) == entry


def test_what_is_younger_than_a_day_stays_even_if_nothing_names_it(store):
    ref_of(store, "being made")
    assert collect(store, keep_days=0) == {}


def test_an_old_object_that_is_made_again_counts_as_young(store):
    ref = ref_of(store, "made again")
    age(store, 400)
    ref_of(store, "made again")
    assert collect(store, keep_days=0) == {}
    assert store.get_bytes(ref) == b"made again"


def test_a_stage_that_is_found_while_garbage_is_collected_stays(store, monkeypatch):
    entry = finish(store, "run-1", "evaluate", "a", ref_of(store, "old"))
    age(store, 400)
    entries = store.backend.entries

    def while_listed(prefix):
        yield from entries(prefix)
        if prefix == "objects/":
            store.note_stage("run-2", entry, cached=True)

    monkeypatch.setattr(store.backend, "entries", while_listed)
    assert collect(store) == {}


def test_damaged_objects_go_when_they_are_old(store):
    store.backend.write("damaged/1.2.3", b"half")
    age(store, 2)
    assert collect(store, keep_days=30) == {}
    age(store, 31)
    assert collect(store, keep_days=30) == {"damaged": 1}


def test_half_written_files_go_when_they_are_old(folder):
    path = folder.backend.root / "tmp" / "1.2.3"
    path.write_bytes(b"half")
    assert collect(folder) == {}
    os.utime(path, (time.time() - 2 * DAY_S,) * 2)
    assert collect(folder, delete=False) == {"half-written": 1}
    assert collect(folder) == {"half-written": 1}
    assert collect(folder) == {}


def test_uploads_that_never_ended_are_aborted_when_they_are_old(s3_server, s3_uri, monkeypatch):
    store, client = open_store(s3_uri), s3_server.client()
    listed, now = store.backend._client.list_multipart_uploads, datetime.now(UTC)

    def begun_now(**where):
        # moto tells one moment, years ago, for every upload.
        page = listed(**where)
        return page | {"Uploads": [each | {"Initiated": now} for each in page.get("Uploads", [])]}

    monkeypatch.setattr(store.backend._client, "list_multipart_uploads", begun_now)
    prefix = s3_uri.rpartition("/")[2]
    started = [
        {"Bucket": s3_servers.BUCKET, "Key": key}
        for key in (f"{prefix}/objects/aa/{'a' * 64}", f"{prefix}/objects/ab/{'b' * 64}", f"another-{prefix}/objects/x")
    ]
    for where in started:
        where["UploadId"] = client.create_multipart_upload(**where)["UploadId"]
    assert collect(store) == {}
    later = time.time() + 2 * DAY_S
    assert collect(store, now=later, delete=False) == {"half-written": 2}
    assert collect(store, now=later) == {"half-written": 2}
    assert collect(store, now=later) == {}
    assert "UploadId" in client.list_parts(**started[2])
    client.abort_multipart_upload(**started[2])


def test_a_server_that_cannot_list_uploads_is_left_alone(s3_server, s3_uri, monkeypatch):
    store = open_store(s3_uri)

    def refuse(**where):
        raise ClientError({"Error": {"Code": "NotImplemented"}}, "ListMultipartUploads")

    monkeypatch.setattr(store.backend._client, "list_multipart_uploads", refuse)
    assert collect(store, now=time.time() + 2 * DAY_S) == {}


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_that_is_no_store_is_named_and_stays_as_it_is(tmp_path, made):
    if made:
        (tmp_path / "stroe").mkdir()
    expected = r"stroe (does not exist|is no store).*Expected the store of an earlier run\. Give .* --store\."
    with pytest.raises(UsageError, match=expected):
        existing_store(f"file://{tmp_path}/stroe")
    assert list(tmp_path.rglob("*")) == ([tmp_path / "stroe"] if made else [])


def test_history_latest_and_notes_are_never_removed(store):
    publish(store, "small", "aa11")
    finish(store, "run-1", "evaluate", "a", ref_of(store, "old"))
    age(store, 400)
    collect(store, keep_days=0)
    assert store.latest("small")["version"] == "aa11"
    assert len(read_history(store, "small")) == 1
    assert len(store.run_stages("run-1")) == 1


def test_a_negative_number_of_days_is_refused(store):
    with pytest.raises(UsageError, match=r"--keep-days is -1; expected 0"):
        collect(store, keep_days=-1)
