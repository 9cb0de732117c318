import os
import time
from datetime import UTC, datetime

import pytest

from ptq.backends import LocalFolder
from ptq.errors import ArtifactError, UsageError
from ptq.records import to_jsonable
from ptq.retention import DAY_S, collect_garbage, read_history, restore_version
from ptq.store import StageEntry, Store

NOW = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture
def store(tmp_path):
    return Store(LocalFolder(tmp_path / "store"))


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
    moment = time.time() - days * DAY_S
    for path in store.backend.root.rglob("*"):
        if path.is_file():
            os.utime(path, (moment, moment))


def collect(store, *, keep_days=30.0, delete=True):
    found = collect_garbage(store, keep_days=keep_days, now=time.time(), delete=delete)
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
    store.get_path(graph).unlink()
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


def test_half_written_and_damaged_files_go_when_they_are_old(store):
    for folder in ("tmp", "damaged"):
        (store.backend.root / folder / "1.2.3").write_bytes(b"half")
    age(store, 2)
    assert collect(store, keep_days=30) == {"half-written files": 1}
    age(store, 31)
    assert collect(store, keep_days=30) == {"damaged": 1}


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
