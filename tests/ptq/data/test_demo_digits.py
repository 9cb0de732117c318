"""Does the demo write the real digits, whole and always the same?"""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ptq.data import demo_digits as demo_data
from ptq.data.demo_digits import write_digits_folder
from ptq.data.index import index_images
from ptq.errors import ManifestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("demo") / "data" / "digits"
    write_digits_folder(target, image_size=8, seed=0)
    return target


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_folder_is_a_data_set_of_1797_digits_in_three_splits(folder):
    index = index_images(str(folder), calibration_split="train", selection_split="val", test_split="test")
    assert {split.split: split.images for split in index.splits} == {"train": 1000, "val": 300, "test": 497}
    assert index.class_names == tuple("0123456789")
    assert index.duplicates_across_splits == 0
    assert index.warnings == ()


def test_every_split_holds_each_digit_in_proportion(folder):
    sizes = np.bincount(load_digits().target)
    for split, share in (("train", 1000 / 1797), ("val", 300 / 1797), ("test", 497 / 1797)):
        counts = np.array([len(list((folder / split / str(digit)).iterdir())) for digit in range(10)])
        # Each of the two draws rounds a class by less than one image.
        assert np.abs(counts - sizes * share).max() < 2


def test_at_size_8_the_pixels_are_the_digits_own(folder):
    digits = load_digits()
    (path,) = folder.rglob("digit_0123.png")
    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    np.testing.assert_array_equal(pixels, np.rint(digits.images[123] * 255 / 16))
    assert path.parent.name == str(digits.target[123])


def test_images_have_the_size_asked_for(tmp_path):
    write_digits_folder(tmp_path / "digits", image_size=20, seed=0)
    (path,) = (tmp_path / "digits").rglob("digit_0000.png")
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((20, 20), "L")


def test_the_same_arguments_give_the_same_bytes(folder, tmp_path):
    write_digits_folder(tmp_path / "digits", image_size=8, seed=0)
    assert digests(tmp_path / "digits") == digests(folder)


@pytest.mark.slow
def test_another_seed_splits_otherwise(folder, tmp_path):
    write_digits_folder(tmp_path / "digits", image_size=8, seed=1)
    assert set(digests(tmp_path / "digits")) != set(digests(folder))


def test_a_complete_folder_is_left_alone(folder):
    before = modification_times(folder)
    write_digits_folder(folder, image_size=8, seed=0)
    assert modification_times(folder) == before


@pytest.mark.slow
def test_an_incomplete_folder_is_replaced_by_a_complete_one(folder, tmp_path):
    target = tmp_path / "digits"
    write_digits_folder(target, image_size=8, seed=0)
    next(target.rglob("digit_0005.png")).unlink()
    write_digits_folder(target, image_size=8, seed=0)
    assert digests(target) == digests(folder)
    assert list(tmp_path.iterdir()) == [target]


def test_somebody_elses_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"sea")
    with pytest.raises(ManifestError, match="does not hold the demo's digits. Expected nothing there"):
        write_digits_folder(tmp_path, image_size=8, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    written = []

    def disk_full(pixels):
        written.append(pixels)
        if len(written) == 100:
            raise OSError("No space left on device")
        return b"png"

    monkeypatch.setattr(demo_data, "png_from_pixels", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_digits_folder(tmp_path / "digits", image_size=8, seed=0)
    assert list(tmp_path.iterdir()) == []
