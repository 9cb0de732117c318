import json
import threading

import pytest

from ptq.errors import ArtifactError, UsageError
from ptq.records import ArtifactRef, to_jsonable
from ptq.store import StageEntry, artifact_refs, open_store, stage_key, write_file


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path / 'store'}")


def entry(store, data=b"histograms", key="k" * 64):
    ref = store.put_bytes(data, "histograms.npz")
    found = StageEntry("collect_statistics", key, {"histograms": to_jsonable(ref)}, 1.5, 0.0)
    store.write_stage(found)
    return found, ref


def test_an_object_is_named_by_its_content(store):
    ref = store.put_bytes(b"abc", "a.txt")
    assert ref.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert store.get_bytes(ref) == b"abc"
    assert store.put_bytes(b"abc", "b.txt").sha256 == ref.sha256


def test_a_file_and_its_bytes_are_the_same_object(store, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    assert store.put_file(tmp_path / "a.bin") == store.put_bytes(b"abc", "a.bin")


def test_a_damaged_object_is_set_aside_and_never_returned(store):
    ref = store.put_bytes(b"abc", "a.txt")
    path = store.get_path(ref)
    path.write_bytes(b"abd")
    with pytest.raises(ArtifactError, match=r"a\.txt in the store .* is damaged.*set aside"):
        store.get_bytes(ref)
    assert not path.exists()
    assert len(list((store.backend.root / "damaged").iterdir())) == 1


def test_an_absent_object_says_so(store):
    with pytest.raises(ArtifactError, match="is not in the store"):
        store.get_bytes(ArtifactRef("a.txt", "0" * 64, 3))


def test_a_reference_cannot_leave_the_store(store):
    with pytest.raises(ArtifactError, match="expected 64 hexadecimal digits"):
        store.get_bytes(ArtifactRef("a.txt", "../../etc/passwd", 3))


def test_a_finished_stage_is_found_again(store):
    written, _ = entry(store)
    assert store.read_stage(written.stage, written.key) == written


def test_a_stage_whose_object_is_gone_or_damaged_is_not_used(store):
    written, ref = entry(store)
    store.get_path(ref).write_bytes(b"histogramz")
    assert store.read_stage(written.stage, written.key) is None
    assert store.read_stage(written.stage, written.key) is None
    entry(store)
    assert store.read_stage(written.stage, written.key) == written


@pytest.mark.parametrize("damage", ["", "{", '{"stage": "x"}', "[]"])
def test_a_stage_record_that_is_damaged_is_set_aside(store, damage):
    written, _ = entry(store)
    path = store.backend.root / "stages" / written.stage / f"{written.key}.json"
    path.write_text(damage)
    assert store.read_stage(written.stage, written.key) is None
    assert not path.exists()


def test_a_stage_record_that_was_tampered_with_is_not_used(store):
    written, _ = entry(store)
    path = store.backend.root / "stages" / written.stage / f"{written.key}.json"
    content = json.loads(path.read_text())
    content["record"]["histograms"]["name"] = "other.npz"
    path.write_text(json.dumps(content))
    assert store.read_stage(written.stage, written.key) is None


def test_a_key_depends_on_stage_inputs_and_nothing_else():
    key = stage_key("evaluate", {"a": 1, "b": 2})
    assert key == stage_key("evaluate", {"b": 2, "a": 1})
    assert key != stage_key("evaluate", {"a": 1, "b": 3})
    assert key != stage_key("export", {"a": 1, "b": 2})


def test_every_reference_in_a_record_is_found():
    ref = ArtifactRef("a", "0" * 64, 1)
    assert list(artifact_refs(to_jsonable({"one": ref, "many": [{"two": ref}], "none": 3}))) == [ref, ref]


def test_publishing_moves_latest_and_keeps_history(store):
    assert store.latest("resnet50") is None
    assert store.publish("resnet50", "v1", {"drop_pp": 0.1}) == ""
    assert store.publish("resnet50", "v2", {"drop_pp": 0.2}) == "v1"
    newest = {"model": "resnet50", "version": "v2", "replaced": "v1", "sequence": 1, "drop_pp": 0.2}
    assert store.latest("resnet50") == newest
    assert [entry["version"] for entry in store.history("resnet50")] == ["v1", "v2"]


def test_a_version_that_comes_back_leaves_the_history_of_its_first_time(store):
    for version in ("v1", "v2", "v1"):
        store.publish("resnet50", version, {})
    assert [entry["version"] for entry in store.history("resnet50")] == ["v1", "v2", "v1"]


def test_publishing_the_latest_version_again_changes_nothing(store):
    store.publish("resnet50", "v1", {})
    store.publish("resnet50", "v2", {})
    assert store.publish("resnet50", "v2", {"other": 1}) == "v1"
    assert "other" not in store.latest("resnet50")


def test_versions_published_together_leave_one_whole_pointer(store):
    threads = [threading.Thread(target=store.publish, args=("m", f"v{i}", {})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    versions = [entry["version"] for entry in store.history("m")]
    assert sorted(versions) == [f"v{i}" for i in range(8)]
    assert [entry["replaced"] for entry in store.history("m")] == ["", *versions[:-1]]
    assert store.latest("m") == store.history("m")[-1]


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden"])
def test_a_model_name_cannot_leave_the_store(store, name):
    with pytest.raises(UsageError, match="expected letters, digits"):
        store.publish(name, "v1", {})


def test_notes_of_a_run_come_back_in_order(store):
    first, _ = entry(store, key="a" * 64)
    second, _ = entry(store, data=b"other", key="b" * 64)
    store.note_stage("run-1", first, cached=False)
    store.note_stage("run-1", second, cached=True)
    assert [(note["key"], note["cached"]) for note in store.run_stages("run-1")] == [
        ("a" * 64, False), ("b" * 64, True),
    ]  # fmt: skip


def test_a_store_that_is_a_file_says_so(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(ArtifactError, match=r"store cannot be written.*set output\.store"):
        open_store(str(tmp_path / "store"))


def test_an_unknown_scheme_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"output\.store is 'ftp://x/y'; expected file://"):
        open_store("ftp://x/y")


def test_a_file_outside_the_store_is_written_whole(tmp_path):
    write_file(tmp_path / "deep" / "a.pth", b"weights")
    assert (tmp_path / "deep" / "a.pth").read_bytes() == b"weights"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.pth"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_file(tmp_path / "folder" / "a.pth", b"weights")
