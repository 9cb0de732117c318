"""Which files are checkpoints, which of them are whole, and are they handed out when they should be?"""

import os
import tracemalloc
import uuid

import pytest
import safetensors.torch
import torch
from s3_servers import BUCKET

from ptq.errors import ArtifactError, UsageError
from ptq.files import file_sha256
from ptq.service import checkpoint_locations as checkpoint_places
from ptq.service.checkpoint_locations import is_whole
from ptq.service.checkpoint_watch import CheckpointWatch, model_of, watched_prefix
from ptq.storage.s3_reader import RemoteObjects
from ptq.storage.store import open_store

WEIGHTS = {"weight": torch.arange(1000.0), "bias": torch.ones(3)}


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def incoming(tmp_path):
    """The watched folder."""
    (tmp_path / "incoming").mkdir()
    return tmp_path / "incoming"


@pytest.fixture
def watch(incoming, clock, tmp_path):
    return watch_of(incoming, clock, tmp_path)


def watch_of(prefix, clock, tmp_path):
    """A watch of a new process: nothing in memory, the same store."""
    store = open_store(str(tmp_path / "store"))
    return CheckpointWatch(str(prefix), store, settle_s=5, stalled_after_s=600, now=clock)


def polled(watch, clock, *, after=5.0):
    """What a look hands out, so many seconds after the one before."""
    clock.seconds += after
    return list(watch.poll())


def saved(path, weights=WEIGHTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


def cut(path, size):
    """The file without its end."""
    path.write_bytes(path.read_bytes()[:size])
    return path


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("digits/a.pth", "digits"), ("digits/2026/11/a.pt", "digits"), ("digits/A.SAFETENSORS", "digits"),
        ("digits/epoch.7.onnx", "digits"), ("digits.pth", "digits"), ("a b/ä.pth", "a b"),
        ("digits/a.txt", ""), ("digits/pth", ""), ("digits/.a.pth", ""), ("digits/.git/a.pth", ""), (".x/a.pth", ""),
        ("digits/a.pth.part", ""), ("digits/a.part.pth", ""), ("digits/a.tmp.pth", ""), ("digits/~a.pth", ""),
        ("../a.pth", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_model_is_the_first_folder_and_what_is_hidden_unfinished_or_something_else_has_none(name, model):
    assert model_of(f"/in/{name}", "/in") == model


def test_what_only_begins_as_the_prefix_does_is_not_under_it():
    assert model_of("s3://b/in2/digits/a.pth", "s3://b/in") == ""


@pytest.mark.parametrize("prefix", ["http://x/y", "", "gs://b/c"])
def test_a_prefix_of_another_kind_is_refused(prefix):
    with pytest.raises(UsageError, match="expected a folder or s3://bucket/prefix"):
        watched_prefix(prefix)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("digits/model-00001-of-00002.safetensors", ""),
        ("digits/training_args.bin", ""),
        ("digits/pytorch_model.bin", "digits"),
        ("digits/best.pth.tar", "digits"),
        ("best.pth.tar", "best"),
        ("epoch=3-val_loss=0.10.ckpt", "epoch=3-val_loss=0.10"),
        ("data.tar", ""),
    ],
)
def test_which_files_of_trainers_are_checkpoints(name, model):
    assert model_of(f"/in/{name}", "/in") == model


@pytest.mark.parametrize("ending", [".pth", ".ckpt", ".safetensors"])
def test_a_checkpoint_that_lost_its_end_is_not_whole_wherever_it_was_cut(tmp_path, ending):
    path = saved(tmp_path / f"a{ending}")
    assert is_whole(path, ending=ending)
    content = path.read_bytes()
    whole = set()
    for size in (*range(1, 64), *range(64, len(content), 97), *range(len(content) - 64, len(content))):
        path.write_bytes(content[:size])
        whole |= {size} if is_whole(path, ending=ending) else set()
    assert whole == set()


def test_a_safetensors_file_with_bytes_after_its_end_is_not_whole(tmp_path):
    path = saved(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes() + b"\0")
    assert not is_whole(path, ending=".safetensors")


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{}x", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b'{"a": {"data_offsets": [0, "x"]}}', b"\xff"],
)
def test_a_safetensors_header_that_is_none_is_not_whole(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert not is_whole(tmp_path / "a.safetensors", ending=".safetensors")


@pytest.mark.parametrize("name", ["a.pth", "a.onnx"])
def test_a_format_that_does_not_tell_its_end_is_whole(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    assert is_whole(tmp_path / name, ending=(tmp_path / name).suffix)


def test_a_file_is_handed_out_once_it_was_seen_twice_and_no_sooner(watch, clock, incoming):
    path = saved(incoming / "digits" / "a.pth")
    assert polled(watch, clock) == []
    assert polled(watch, clock, after=4.9) == []
    (found,) = polled(watch, clock, after=0.1)
    assert (found.uri, found.model, found.size_bytes) == (str(path), "digits", path.stat().st_size)
    assert found.sha256 == file_sha256(path)
    assert polled(watch, clock) == [found]
    watch.note_announced(found)
    assert polled(watch, clock) == []


def test_a_file_that_is_being_written_waits_until_it_is_left_alone(watch, clock, incoming):
    path = saved(incoming / "digits" / "a.onnx")
    for _ in range(5):
        assert polled(watch, clock) == []
        path.write_bytes(path.read_bytes() + b"more")
    assert polled(watch, clock) == []
    assert [each.size_bytes for each in polled(watch, clock)] == [path.stat().st_size]


def test_a_half_written_file_waits_until_it_is_whole(watch, clock, incoming):
    path = saved(incoming / "digits" / "a.pth")
    content = path.read_bytes()
    cut(path, len(content) // 2)
    for _ in range(100):
        assert polled(watch, clock) == []
    path.write_bytes(content)
    assert polled(watch, clock) == []
    assert [each.size_bytes for each in polled(watch, clock)] == [len(content)]


def test_a_file_that_stays_half_written_is_handed_out_in_the_end_over_a_restart_too(incoming, clock, tmp_path, caplog):
    saved(incoming / "digits" / "a.pth")
    cut(incoming / "digits" / "a.pth", 500)
    watch = watch_of(incoming, clock, tmp_path)
    assert polled(watch, clock) == []
    assert polled(watch, clock) == []
    assert "a.pth (500 bytes) is not whole: its end is missing" in caplog.text
    watch.save()
    watch = watch_of(incoming, clock, tmp_path)
    assert polled(watch, clock, after=590) == []
    assert [each.size_bytes for each in polled(watch, clock)] == [500]


def test_an_empty_file_is_never_handed_out(watch, clock, incoming):
    (incoming / "digits.pth").touch()
    assert [polled(watch, clock, after=1000) for _ in range(3)] == [[], [], []]


def test_the_same_bytes_again_are_the_same_version_and_others_are_another(watch, clock, incoming):
    path = saved(incoming / "digits" / "a.pth")
    content = path.read_bytes()
    polled(watch, clock)
    (first,) = polled(watch, clock)
    path.unlink()
    path.write_bytes(content)
    assert polled(watch, clock) == []
    (again,) = polled(watch, clock)
    assert again == first
    assert again.id == first.id
    path.write_bytes(content + b"\0")
    assert polled(watch, clock) == []
    (other,) = polled(watch, clock, after=600)
    assert other.id != first.id


def test_a_file_that_is_replaced_with_its_size_and_time_kept_is_noticed(watch, clock, incoming):
    path = saved(incoming / "digits" / "a.onnx", WEIGHTS)
    status = path.stat()
    polled(watch, clock)
    (first,) = polled(watch, clock)
    watch.note_announced(first)
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    polled(watch, clock)
    assert [each.sha256 == first.sha256 for each in polled(watch, clock)] == [False]


def test_a_file_that_changes_while_it_is_read_waits(watch, clock, incoming, monkeypatch):
    path = saved(incoming / "digits" / "a.onnx")

    def digest_of_growing(file):
        found = file_sha256(file)
        file.write_bytes(file.read_bytes() + b"more")
        return found

    polled(watch, clock)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_places, "file_sha256", digest_of_growing)
        assert polled(watch, clock) == []
    assert polled(watch, clock) == []
    assert [each.sha256 for each in polled(watch, clock)] == [file_sha256(path)]


def test_a_file_that_nobody_touched_is_read_once_over_restarts(incoming, clock, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(checkpoint_places, "file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    saved(incoming / "digits" / "a.pth")
    saved(incoming / "digits" / "b.pth")
    watch = watch_of(incoming, clock, tmp_path)
    polled(watch, clock)
    first, second = polled(watch, clock)
    watch.note_announced(first)
    watch.save()
    watch = watch_of(incoming, clock, tmp_path)
    assert polled(watch, clock) == [second]
    saved(incoming / "digits" / "b.pth", {"other": torch.ones(4)})
    polled(watch, clock)
    polled(watch, clock)
    assert read == ["a.pth", "b.pth", "b.pth"]


def test_what_two_watches_found_out_at_once_is_kept_of_both(incoming, clock, tmp_path, monkeypatch):
    one, other = watch_of(incoming, clock, tmp_path), watch_of(incoming, clock, tmp_path)
    saved(incoming / "digits" / "a.pth")
    for watch in (one, other):
        polled(watch, clock)
    for found in polled(one, clock):
        one.note_announced(found)
    one.save()
    saved(incoming / "digits" / "b.pth")
    polled(other, clock)
    polled(other, clock)
    other.save()
    monkeypatch.setattr(checkpoint_places, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    (left,) = polled(watch_of(incoming, clock, tmp_path), clock)
    assert left.uri.endswith("b.pth")


def test_a_memory_that_was_damaged_is_no_memory(incoming, clock, tmp_path):
    saved(incoming / "digits" / "a.pth")
    watch = watch_of(incoming, clock, tmp_path)
    polled(watch, clock)
    polled(watch, clock)
    watch.save()
    for path in (tmp_path / "store" / "remembered" / "watched").iterdir():
        path.write_text("{")
    watch = watch_of(incoming, clock, tmp_path)
    assert polled(watch, clock) == []
    assert len(polled(watch, clock)) == 1


def test_a_file_that_cannot_be_read_is_tried_again_later_and_keeps_no_other_back(
    watch, clock, incoming, monkeypatch, caplog
):
    saved(incoming / "digits" / "a.pth")
    saved(incoming / "digits" / "b.pth")

    def digest_or_refusal(path):
        if path.name == "a.pth":
            raise PermissionError(13, "Permission denied")
        return file_sha256(path)

    polled(watch, clock)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_places, "file_sha256", digest_or_refusal)
        assert [each.uri[-5:] for each in polled(watch, clock)] == ["b.pth"]
        assert [each.uri[-5:] for each in polled(watch, clock)] == ["b.pth"]
    assert caplog.text.count("a.pth cannot be read: Permission denied") == 1
    assert [each.uri[-5:] for each in polled(watch, clock, after=70)] == ["a.pth", "b.pth"]


def test_a_folder_that_is_away_is_an_error_and_its_files_are_nothing_new_when_it_is_back(watch, clock, incoming):
    saved(incoming / "digits" / "a.pth")
    polled(watch, clock)
    (found,) = polled(watch, clock)
    watch.note_announced(found)
    incoming.rename(incoming.with_name("elsewhere"))
    with pytest.raises(ArtifactError, match=r"folder .*incoming does not exist\. Expected .* Create or mount it"):
        polled(watch, clock)
    incoming.with_name("elsewhere").rename(incoming)
    assert polled(watch, clock) == []


def test_a_model_s_folder_may_be_a_link_and_links_that_lead_back_end(watch, clock, incoming, tmp_path):
    saved(tmp_path / "shared disk" / "march" / "a.pth")
    (incoming / "digits").symlink_to(tmp_path / "shared disk")
    (tmp_path / "shared disk" / "back").symlink_to(incoming)
    (incoming / "gone.pth").symlink_to(tmp_path / "nowhere")
    polled(watch, clock)
    assert [(each.model, each.uri) for each in polled(watch, clock)] == [
        ("digits", str(incoming / "digits" / "march" / "a.pth"))
    ]


def test_pipes_folders_and_names_that_no_event_can_carry_are_left_alone(watch, clock, incoming):
    (incoming / "folder.pth").mkdir()
    os.mkfifo(incoming / "pipe.pth")
    with open(os.fsencode(incoming) + b"/\xff.pth", "wb") as stream:
        stream.write(b"weights")
    polled(watch, clock)
    assert polled(watch, clock) == []


@pytest.mark.slow
def test_a_large_file_and_thousands_of_small_ones_take_little_memory(watch, clock, incoming):
    with (incoming / "large.onnx").open("wb") as stream:
        stream.truncate(300 * 2**20)
    for index in range(3000):
        (incoming / f"{index}.onnx").write_bytes(b"x")
    tracemalloc.start()
    polled(watch, clock)
    found = sum(1 for _ in watch.poll()) + sum(1 for _ in polled(watch, clock))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 3001
    # Threads of other tests are counted too; a fifth of the large file is far from all of it.
    assert peak < 60 * 2**20


def test_checkpoints_in_a_bucket_are_found_by_content_and_read_once(s3_server, clock, tmp_path, monkeypatch):
    asked = []
    open_object = RemoteObjects._open
    monkeypatch.setattr(
        RemoteObjects, "_open", lambda self, **which: asked.append(which["Key"]) or open_object(self, **which)
    )
    folder, client = uuid.uuid4().hex, s3_server.client()
    whole = saved(tmp_path / "a.pth").read_bytes()
    half = saved(tmp_path / "b.safetensors").read_bytes()[:-1]
    for key, body in (
        ("in/digits/a b.pth", whole), ("in/digits/half.safetensors", half), ("in/digits/note.txt", b"x"),
        ("in2/digits/c.pth", whole), ("in/digits/empty.pth", b""),
    ):  # fmt: skip
        client.put_object(Bucket=BUCKET, Key=f"{folder}/{key}", Body=body)
    watch = watch_of(f"s3://{BUCKET}/{folder}/in/", clock, tmp_path)
    assert polled(watch, clock) == []
    (found,) = polled(watch, clock)
    assert (found.uri, found.model) == (f"s3://{BUCKET}/{folder}/in/digits/a b.pth", "digits")
    assert (found.sha256, found.size_bytes) == (file_sha256(tmp_path / "a.pth"), len(whole))
    watch.note_announced(found)
    assert polled(watch, clock) == []
    watch.save()
    watch = watch_of(f"s3://{BUCKET}/{folder}/in", clock, tmp_path)
    assert [each.uri[-16:] for each in polled(watch, clock, after=600)] == ["half.safetensors"]
    assert asked == [f"{folder}/in/digits/a b.pth", f"{folder}/in/digits/half.safetensors"]
    client.put_object(Bucket=BUCKET, Key=f"{folder}/in/digits/a b.pth", Body=whole + b"\0")
    assert watch.read(found.uri).size_bytes == len(whole) + 1
    assert watch.read(f"s3://{BUCKET}/{folder}/in/digits/gone.pth") is None
    client.close()


def test_a_bucket_that_does_not_exist_is_named(s3_server, clock, tmp_path):
    with pytest.raises(ArtifactError, match="there is no bucket nowhere"):
        polled(watch_of("s3://nowhere/in", clock, tmp_path), clock)
