"""Is every image found under the class that a person meant, and is everything else refused?"""

import os
import shutil

import pytest
from image_data import index, write_images, write_manifest

from ptq.data.index import rows_of_split_table
from ptq.errors import ManifestError


def test_a_folder_is_indexed_by_split_and_class(folder):
    found = index(folder)
    assert found.table.select("path", "label", "split").rows() == [
        ("test/cat/g.png", 0, "test"),
        ("test/dog/h.png", 1, "test"),
        ("test/dog/i.png", 1, "test"),
        ("train/cat/a.png", 0, "train"),
        ("train/cat/b.PNG", 0, "train"),
        ("train/dog/c.png", 1, "train"),
        ("train/dog/deep/er/d.jpeg", 1, "train"),
        ("val/cat/e.png", 0, "val"),
        ("val/dog/f.png", 1, "val"),
    ]
    assert (found.root, found.class_names, found.has_named_classes) == (folder, ("cat", "dog"), True)
    assert [(s.split, s.images, s.images_per_class) for s in found.splits] == [
        ("train", 4, (2, 2)),
        ("val", 2, (1, 1)),
        ("test", 3, (1, 2)),
    ]
    assert found.warnings == ()


@pytest.mark.parametrize(
    "ending", ["jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp", "ppm", "pgm", "JPG", "JPEG", "Png", "TIFF"]
)
def test_every_usual_ending_is_an_image(folder, ending):
    write_images(folder, {f"train/cat/new.{ending}": 50})
    assert f"train/cat/new.{ending}" in index(folder).table["path"]


def test_hidden_files_and_folders_are_ignored_in_silence(folder):
    write_images(folder, {"train/.cache/x.png": 50, "train/cat/._a.png": 51, "train/cat/.thumbs/a.png": 52})
    found = index(folder)
    assert (found.table.height, found.class_names, found.warnings) == (9, ("cat", "dog"), ())


def test_other_files_are_left_out_with_a_warning(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("fed twice")
    (warning,) = index(folder).warnings
    assert warning == "1 files that do not end like images were left out: train/cat/notes.txt."


def test_splits_that_are_not_named_are_not_read(folder):
    write_images(folder, {"extra/bird/x.png": 60})
    (folder / "extra" / "nothing").mkdir()
    assert set(index(folder).table["split"]) == {"train", "val", "test"}


def test_a_missing_selection_split_is_left_to_the_caller(folder):
    shutil.rmtree(folder / "val")
    assert [split.split for split in index(folder).splits] == ["train", "test"]


def test_one_split_alone_keeps_the_class_order_of_train(folder):
    write_images(folder, {"train/ant/x.png": 70})
    found = index(folder, calibration_split="test", selection_split="test", test_split="test")
    assert found.class_names == ("ant", "cat", "dog")
    assert rows_of_split_table(found.table, "test")[0].label == 1
    assert found.warnings == ('Split "test" has no image of 1 classes: ant.',)


def test_classes_are_those_of_the_calibration_split_where_there_is_no_train(folder):
    (folder / "train").rename(folder / "calibration")
    found = index(folder, calibration_split="calibration")
    assert found.class_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["images.csv", "images.parquet", "IMAGES.CSV"])
def test_a_manifest_with_class_names_equals_the_folder(folder, name):
    expected = index(folder)
    names = {0: "cat", 1: "dog"}
    rows = [
        (path, names[label], split) for path, label, split in expected.table.select("path", "label", "split").rows()
    ]
    found = index(write_manifest(folder, rows[::-1], name))
    assert found.table.equals(expected.table)
    assert (found.class_names, found.has_named_classes, found.root) == (("cat", "dog"), True, folder)


@pytest.mark.parametrize("name", ["images.csv", "images.parquet"])
def test_integer_labels_of_a_manifest_are_class_indices(folder, name):
    rows = [("train/cat/a.png", 0, "train"), ("test/dog/h.png", 3, "test")]
    found = index(write_manifest(folder, rows, name))
    assert (found.class_names, found.has_named_classes) == (("0", "1", "2", "3"), False)
    assert found.table["label"].to_list() == [3, 0]
    assert found.splits[1].images_per_class == (0, 0, 0, 1)


def test_a_label_that_is_partly_a_number_is_a_name(folder):
    rows = [("train/cat/a.png", "7", "train"), ("train/dog/c.png", "7up", "train"), ("test/dog/h.png", "7", "test")]
    found = index(write_manifest(folder, rows))
    assert (found.class_names, found.has_named_classes) == (("7", "7up"), True)


def test_a_manifest_row_of_another_split_needs_no_label_and_no_file(folder):
    rows = [("train/cat/a.png", "cat", "train"), ("test/cat/g.png", "cat", "test"), ("gone.png", None, "unlabelled")]
    assert index(write_manifest(folder, rows)).table.height == 2


def test_a_repeated_row_is_taken_once_and_said(folder):
    rows = [
        ("train/cat/a.png", "cat", "train"),
        ("./train/cat/a.png", "cat", "train"),
        ("test/cat/g.png", "cat", "test"),
    ]
    found = index(write_manifest(folder, rows))
    assert found.table.height == 2
    assert "1 rows of" in found.warnings[0]
    assert "repeat another row" in found.warnings[0]


def test_nothing_at_the_path_is_said(tmp_path):
    with pytest.raises(ManifestError, match=r"data\.path is .*gone; there is nothing there. Expected an image folder"):
        index(tmp_path / "gone")


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(ManifestError, match=r'a file that ends in "\.zip". Expected a folder, or a manifest'):
        index(tmp_path / "images.zip")


@pytest.mark.parametrize("option", ["calibration_split", "test_split"])
def test_an_absent_split_lists_those_there_are(folder, option):
    with pytest.raises(
        ManifestError, match=rf'data\.{option} is "xyz"; .* has the splits "test", "train", "val"\. Set'
    ):
        index(folder, **{option: "xyz"})


def test_an_empty_folder_has_no_splits(tmp_path):
    with pytest.raises(ManifestError, match='data.calibration_split is "train"; .* has no splits'):
        index(tmp_path)


def test_an_empty_class_folder_is_named(folder):
    (folder / "val" / "cat" / "e.png").unlink()
    (folder / "val" / "cat" / "e.txt").write_text("")
    with pytest.raises(ManifestError, match="Class folder .*val/cat holds no image, only 1 other files"):
        index(folder)


def test_a_split_without_class_folders_is_refused(folder):
    shutil.rmtree(folder / "test")
    write_images(folder, {"test/loose.png": 1})
    with pytest.raises(ManifestError, match=r"Split folder .*test holds no class folders.* such as test/cat/1\.jpg"):
        index(folder)


def test_a_class_that_train_lacks_is_named(folder):
    write_images(folder, {"test/bird/x.png": 60})
    with pytest.raises(ManifestError, match='Class "bird" of split "test" is not in split "train", which has cat, dog'):
        index(folder)


def test_a_class_that_train_lacks_is_named_in_a_manifest_too(folder):
    rows = [("train/cat/a.png", "cat", "train"), ("test/dog/h.png", "dog", "test")]
    with pytest.raises(ManifestError, match='Class "dog" of split "test" is not in split "train", which has cat'):
        index(write_manifest(folder, rows))


def test_a_manifest_without_a_column_shows_its_columns(folder):
    (folder / "m.csv").write_text("file,label,split\na.png,cat,train\n")
    with pytest.raises(ManifestError, match='no column "path"; its columns are "file", "label", "split"'):
        index(folder / "m.csv")


@pytest.mark.parametrize("content", ["", "path,label,split\n"])
def test_an_empty_manifest_is_refused(folder, content):
    (folder / "m.csv").write_text(content)
    with pytest.raises(ManifestError, match="m.csv has no rows. Expected one row per image"):
        index(folder / "m.csv")


def test_a_manifest_that_is_no_table_is_refused(folder):
    (folder / "m.parquet").write_bytes(b"not a table at all")
    with pytest.raises(
        ManifestError, match=r"m\.parquet cannot be read: .*Expected a table in UTF-8 CSV or in Parquet"
    ):
        index(folder / "m.parquet")


def test_files_of_a_manifest_that_are_absent_are_counted_and_named(folder):
    rows = [("train/cat/a.png", "cat", "train"), ("test/cat/nope.png", "cat", "test")]
    with pytest.raises(ManifestError, match=r"names 1 files that are not there, of 2: test/cat/nope\.png"):
        index(write_manifest(folder, rows))


@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "train/../../a.png", "C:\\images\\a.png"])
def test_a_path_that_leads_out_of_the_root_is_refused(folder, path):
    rows = [("train/cat/a.png", "cat", "train"), (path, "cat", "test")]
    with pytest.raises(ManifestError, match="which leads out of .* Expected paths relative to the manifest"):
        index(write_manifest(folder, rows))


def test_a_missing_label_names_its_row(folder):
    rows = [("train/cat/a.png", "cat", "train"), ("test/cat/g.png", None, "test")]
    with pytest.raises(ManifestError, match=r'1 rows without a label, the first is row 2 \(split "test"\)'):
        index(write_manifest(folder, rows))


@pytest.mark.parametrize("label", [-1, 10**12])
def test_a_class_index_out_of_bounds_is_refused(folder, label):
    rows = [("train/cat/a.png", 0, "train"), ("test/cat/g.png", label, "test")]
    with pytest.raises(ManifestError, match=f"has the class index {label}. Expected indices from 0 to 99999"):
        index(write_manifest(folder, rows))


def test_a_fractional_label_is_refused(folder):
    rows = [("train/cat/a.png", 0.0, "train"), ("test/cat/g.png", 1.0, "test")]
    with pytest.raises(ManifestError, match="has the label 0.0. Expected a class name or a class index"):
        index(write_manifest(folder, rows))


def test_one_file_with_two_labels_in_a_manifest_is_refused(folder):
    rows = [
        ("train/cat/a.png", "cat", "train"),
        ("train/cat/a.png", "dog", "test"),
        ("train/dog/c.png", "dog", "train"),
    ]
    with pytest.raises(ManifestError, match=r"gives 1 files more than one label: train/cat/a\.png"):
        index(write_manifest(folder, rows))


def test_links_that_lead_back_up_are_followed_once(folder):
    for name in ("cat", "dog"):
        (folder / "train" / name / "up").symlink_to("..")
    found = index(folder)
    assert max(path.count("up/") for path in found.table["path"]) == 1
    assert any("under more than one label" in warning for warning in found.warnings)


def test_a_link_to_itself_is_no_folder(folder):
    (folder / "train" / "cat" / "loop").symlink_to("loop")
    assert index(folder).table.height == 9


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ManifestError, match=r"Folder .*train/dog/deep cannot be read: Permission denied"):
        index(folder)


@pytest.mark.parametrize("where", ["train/cat/caf\udce9.png", "train/caf\udce9/a.png"])
def test_names_in_another_encoding_are_shown_and_refused(folder, where):
    write_images(folder, {where: 70})
    with pytest.raises(ManifestError, match=r"not in UTF-8, such as train/.*caf\\udce9.*rename them"):
        index(folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_manifest_in_utf_16_is_read(folder, encoding):
    rows = [("train/cat/a.png", "cat", "train"), ("train/dog/c.png", "dog", "train"), ("test/cat/g.png", "cat", "test")]
    text = "path,label,split\n" + "".join(f"{','.join(row)}\n" for row in rows)
    mark = "" if encoding == "utf-16" else "\ufeff"
    (folder / "m.csv").write_bytes((mark + text).encode(encoding))
    assert index(folder / "m.csv").table.height == 3


def test_a_manifest_cut_in_utf_16_is_refused(folder):
    (folder / "m.csv").write_bytes("path,label,split\n".encode("utf-16") + b"a")
    with pytest.raises(ManifestError, match="cannot be read: .*UTF-8 CSV"):
        index(folder / "m.csv")
