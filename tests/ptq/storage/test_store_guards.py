"""Nothing from outside leaves the store, and nothing in it is ever unpickled."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from ptq.errors import ArtifactError
from ptq.storage.store import StageEntry

HOSTILE_NAMES = ["../evil", "objects/../../evil", "/etc/passwd", "a//b", "a/./b", "a\n", "a b", "\\\\host", "a/\0", ""]


@pytest.mark.parametrize("sha256", ["../../../etc/passwd", "A" * 64, "0" * 64 + "\n", "", 7, None])
def test_a_record_that_names_a_path_in_place_of_an_object_is_refused(store, sha256):
    ref = {"name": "passwd", "sha256": sha256, "size_bytes": 3}
    store.write_stage(StageEntry("collect_statistics", "k" * 64, {"histograms": ref}, 1.5, 0.0))
    with pytest.raises(ArtifactError, match="expected 64 hexadecimal digits"):
        store.read_stage("collect_statistics", "k" * 64)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_name_is_refused_by_every_method(store, name, tmp_path):
    backend = store.backend
    (tmp_path / "file").write_bytes(b"x")
    backend.write("objects/a", b"a")
    for call in (
        lambda: backend.local_path(name), lambda: backend.read(name), lambda: backend.entry(name),
        lambda: backend.write(name, b"x"), lambda: backend.write_file(name, tmp_path / "file"),
        lambda: backend.create(name, b"x"), lambda: backend.delete(name), lambda: backend.move("objects/a", name),
        lambda: backend.fetch(name, tmp_path / "target"), lambda: backend.replace(name, b"x", tag="x"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match="cannot be kept in a store"):
            call()
    assert backend.read("objects/a")[0] == b"a"


def test_a_link_that_leads_out_of_the_folder_is_refused(folder, tmp_path):
    ref = folder.put_bytes(b"abc", "a.txt")
    path = folder.get_path(ref)
    (tmp_path / "secret").write_bytes(b"abc")
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=r"leads out of the store to .*secret.*Remove the\s+symbolic link"):
        folder.get_bytes(ref)


def test_a_folder_that_is_a_link_out_of_the_store_takes_nothing(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    path = folder.get_path(folder.put_bytes(b"abc", "a.txt"))
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads out of the store"):
        folder.put_bytes(b"abc", "a.txt")
    assert list(outside.iterdir()) == []


def test_a_pickle_planted_as_an_artifact_is_handed_out_as_bytes_and_not_run(store, tmp_path):
    array = np.array([Planted(tmp_path / "planted")], dtype=object)
    np.save(tmp_path / "planted.npy", array, allow_pickle=True)
    ref = store.put_file(tmp_path / "planted.npy")
    assert store.get_bytes(ref) == (tmp_path / "planted.npy").read_bytes()
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        np.load(store.get_path(ref), allow_pickle=False)
    assert not (tmp_path / "planted").exists()
    pickle.loads(pickle.dumps(Planted(tmp_path / "planted")))
    assert (tmp_path / "planted").exists()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
