import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from ptq.errors import ArtifactError, UsageError
from ptq.files import write_file
from ptq.records.base import ArtifactRef, to_jsonable
from ptq.storage import backend
from ptq.storage.documents import artifact_refs
from ptq.storage.store import StageEntry, open_store, stage_key


def object_name(ref):
    return f"objects/{ref.sha256[:2]}/{ref.sha256}"


def names(store, prefix):
    return [entry.name for entry in store.backend.entries(prefix)]


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
    store.backend.write(object_name(ref), b"abd")
    with pytest.raises(ArtifactError, match=r"a\.txt in the store .* is damaged.*set aside"):
        store.get_bytes(ref)
    assert not store.has(ref)
    (aside,) = names(store, "damaged/")
    assert store.backend.read(aside)[0] == b"abd"
    assert store.get_bytes(store.put_bytes(b"abc", "a.txt")) == b"abc"


def test_an_absent_object_says_so(store):
    with pytest.raises(ArtifactError, match="is not in the store"):
        store.get_bytes(ArtifactRef("a.txt", "0" * 64, 3))


def test_a_reference_cannot_leave_the_store(store):
    with pytest.raises(ArtifactError, match="expected 64 hexadecimal digits"):
        store.get_bytes(ArtifactRef("a.txt", "../../etc/passwd", 3))


def test_a_finished_stage_is_found_again(store):
    written, _ = entry(store)
    assert store.read_stage(written.stage, written.key) == written


@pytest.mark.parametrize("damage", [b"", b"histo", None])
def test_a_stage_whose_object_is_gone_or_cut_off_is_not_used(store, damage):
    written, ref = entry(store)
    store.backend.delete(object_name(ref))
    if damage is not None:
        store.backend.write(object_name(ref), damage)
    assert store.read_stage(written.stage, written.key) is None
    entry(store)
    assert store.read_stage(written.stage, written.key) == written


def test_a_stage_with_several_objects_needs_all_of_them(store):
    refs = [store.put_bytes(str(i).encode(), f"{i}.txt") for i in range(20)]
    written = StageEntry("collect_statistics", "k" * 64, {"parts": to_jsonable(refs)}, 1.5, 0.0)
    store.write_stage(written)
    assert store.read_stage(written.stage, written.key) == written
    store.backend.delete(object_name(refs[13]))
    assert store.read_stage(written.stage, written.key) is None


def test_a_stage_whose_object_changed_on_this_machine_is_not_used(folder):
    written, ref = entry(folder)
    folder.get_path(ref).write_bytes(b"histogramz")
    assert folder.read_stage(written.stage, written.key) is None
    assert folder.read_stage(written.stage, written.key) is None
    entry(folder)
    assert folder.read_stage(written.stage, written.key) == written


@pytest.mark.parametrize("damage", ["", "{", '{"stage": "x"}', "[]"])
def test_a_stage_record_that_is_damaged_is_set_aside(store, damage):
    written, _ = entry(store)
    name = f"stages/{written.stage}/{written.key}.json"
    store.backend.write(name, damage.encode())
    assert store.read_stage(written.stage, written.key) is None
    assert store.backend.entry(name) is None
    assert len(names(store, "damaged/")) == 1


def test_a_stage_record_that_was_tampered_with_is_not_used(store):
    written, _ = entry(store)
    name = f"stages/{written.stage}/{written.key}.json"
    content = json.loads(store.backend.read(name)[0])
    content["record"]["histograms"]["name"] = "other.npz"
    store.backend.write(name, json.dumps(content).encode())
    assert store.read_stage(written.stage, written.key) is None


@pytest.mark.parametrize(("stage", "key"), [("collect_statistics", "l" * 64), ("export_qdq", "k" * 64)])
def test_the_record_of_another_stage_or_key_is_not_used(store, stage, key):
    written, _ = entry(store)
    record, _ = store.backend.read(f"stages/{written.stage}/{written.key}.json")
    store.backend.write(f"stages/{stage}/{key}.json", record)
    assert store.read_stage(stage, key) is None


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
    if store.backend.has_conditions:
        assert [entry["replaced"] for entry in store.history("m")] == ["", *versions[:-1]]
    assert store.latest("m") == store.history("m")[-1]


def publish_named(uri, name, barrier):
    store = open_store(uri)
    barrier.wait()
    store.publish("m", name, {})


def test_processes_that_publish_together_leave_both_versions_and_one_whole_pointer(store):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=publish_named, args=(store.uri, name, barrier)) for name in ("v1", "v2")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(entry["version"] for entry in store.history("m")) == ["v1", "v2"]
    pointer = json.loads(store.backend.read("models/m/latest.json")[0])
    assert pointer.pop("digest")
    assert pointer == store.latest("m") == store.history("m")[-1]


def test_a_damaged_entry_of_the_history_keeps_its_number_and_its_bytes(store):
    store.publish("m", "v1", {})
    store.publish("m", "v2", {})
    name = names(store, "models/m/history/")[-1]
    store.backend.write(name, b"{}")
    assert store.publish("m", "v3", {}) == "v1"
    assert [entry["version"] for entry in store.history("m")] == ["v1", "v3"]
    assert store.latest("m")["version"] == "v3"
    assert store.backend.read(name)[0] == b"{}"


def test_a_damaged_pointer_is_not_used_and_the_next_version_replaces_it(store):
    store.publish("m", "v1", {})
    store.backend.write("models/m/latest.json", b'{"version": "evil"}')
    assert store.latest("m")["version"] == "v1"
    store.publish("m", "v2", {})
    assert json.loads(store.backend.read("models/m/latest.json")[0])["version"] == "v2"


def test_a_pointer_never_moves_back(store):
    store.publish("m", "v1", {})
    first = store.history("m")[0]
    store.publish("m", "v2", {})
    store._point_to("m", first)
    assert json.loads(store.backend.read("models/m/latest.json")[0])["version"] == "v2"


def test_what_a_condition_refuses_stays(store):
    if not store.backend.has_conditions:
        pytest.skip("this server ignores conditions, which the store has noticed")
    assert store.backend.create("inputs/a", b"first")
    assert not store.backend.create("inputs/a", b"second")
    _, tag = store.backend.read("inputs/a")
    assert store.backend.replace("inputs/a", b"third", tag=tag)
    assert not store.backend.replace("inputs/a", b"fourth", tag=tag)
    assert store.backend.read("inputs/a")[0] == b"third"


def test_names_are_listed_in_order_with_their_sizes(store):
    for name in ("inputs/b/2", "inputs/a", "inputs/b/10", "inputs/bc"):
        store.backend.write(name, name.encode())
    found = [(entry.name, entry.size_bytes) for entry in store.backend.entries("inputs/b/")]
    assert found == [("inputs/b/10", 11), ("inputs/b/2", 10)]
    assert names(store, "inputs/b") == ["inputs/b/10", "inputs/b/2", "inputs/bc"]


@pytest.mark.slow
def test_a_large_file_comes_back_as_it_was(store, tmp_path):
    data = np.random.default_rng(0).bytes(135 * 10**6)
    (tmp_path / "large.bin").write_bytes(data)
    ref = store.put_file(tmp_path / "large.bin")
    assert store.backend.entry(object_name(ref)).size_bytes == len(data)
    with store.get_path(ref).open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "a\n"])
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
    with pytest.raises(ArtifactError, match="cannot be used: File exists"):
        write_file(tmp_path / "folder" / "a.pth", b"weights")


def test_what_was_remembered_last_is_recalled(tmp_path):
    store = open_store(str(tmp_path))
    store.remember("timing_cache", "a1", b"first")
    store.remember("timing_cache", "a1", b"second")
    store.remember("timing_cache", "b2", b"other")
    assert open_store(str(tmp_path)).recall("timing_cache", "a1") == b"second"


def test_nothing_is_recalled_where_nothing_was_remembered_or_the_object_is_gone(tmp_path):
    store = open_store(str(tmp_path))
    assert store.recall("timing_cache", "a1") == b""
    store.remember("timing_cache", "a1", b"bytes")
    shutil.rmtree(tmp_path / "objects")
    assert open_store(str(tmp_path)).recall("timing_cache", "a1") == b""


KEY = "0123456789abcdef"


def test_what_was_claimed_is_held_until_it_is_confirmed_and_then_done_for_good(store):
    assert store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=60) == "first"
    assert store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=60) == "held"
    assert store.claim("event", "f" * 16, {"uri": "b"}, unconfirmed_s=60) == "first"
    store.confirm("event", KEY, {"uri": "a"})
    assert store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=0) == "done"


def test_a_claim_that_nobody_confirmed_in_time_is_taken_over_by_one(store):
    store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=60)
    assert store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=0) == "again"
    assert store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=60) == "held"


def test_a_damaged_claim_is_taken_over(store):
    store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=60)
    store.confirm("event", KEY, {"uri": "a"})
    (name,) = names(store, "claims/")
    store.backend.write(name, b"{")
    assert store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=60) == "again"
    assert store.claim("event", KEY, {"uri": "a"}, unconfirmed_s=60) == "held"


@pytest.mark.parametrize(("left_behind", "told"), [(False, "first"), (True, "again")])
def test_of_many_that_claim_at_once_one_is_told_to_do_it(store, monkeypatch, left_behind, told):
    if not store.backend.has_conditions:
        pytest.skip("the server ignores conditions, so that two may be told")
    if left_behind:
        with monkeypatch.context() as patched:
            patched.setattr("ptq.storage.store.time.time", lambda: 0.0)
            store.claim("event", KEY, {}, unconfirmed_s=60)
    barrier, states = threading.Barrier(8), []

    def claim():
        barrier.wait()
        states.append(store.claim("event", KEY, {}, unconfirmed_s=60))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(states) == sorted([told, *["held"] * 7])


@pytest.mark.parametrize(
    "call", ["put_bytes(data, 'a')", "put_file(source)", "write_stage(large)", "publish('m', 'v', big)"]
)
def test_a_full_disk_is_an_error_and_leaves_what_was_there(folder, tmp_path, call):
    kept, _ = entry(folder)
    (tmp_path / "source").write_bytes(bytes(300_000))
    before = {path: path.read_bytes() for path in folder.backend.root.rglob("*") if path.is_file()}
    # A limit on the size of files stops a write where a full disk does, in its middle.
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from ptq.errors import ArtifactError\nfrom ptq.storage.store import StageEntry, open_store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "store, source, data, big = open_store(sys.argv[1]), Path(sys.argv[2]), bytes(300_000), {'a': 'a' * 300_000}\n"
        "large = StageEntry('export_qdq', 'b' * 64, big, 1.0, 2.0)\n"
        f"try:\n    store.{call}\nexcept ArtifactError as error:\n    print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, folder.uri, tmp_path / "source"], capture_output=True, text=True, check=True,
        cwd=backend.__file__.rpartition("/ptq/")[0],
    )  # fmt: skip
    assert "cannot be used: File too large. Expected free space, and permission to read and write." in said.stdout
    assert {path: path.read_bytes() for path in folder.backend.root.rglob("*") if path.is_file()} == before
    assert folder.read_stage(kept.stage, kept.key) == kept
