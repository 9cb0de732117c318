"""Are images indexed, drawn and decoded as a person means it, and is everything else refused?"""

import hashlib
import os
import shutil

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.config import PreprocessingConfig
from ptq.data.decoding import decode_rows
from ptq.data.images import png_from_pixels
from ptq.data.index import (
    ImageRow,
    index_images,
    listing_fingerprint,
    parquet_from_index,
    rows_of_split,
    rows_of_split_table,
)
from ptq.data.sampling import (
    calibration_overlap,
    classes_never_drawn,
    draw_calibration_indices,
    draw_stratified,
    draw_trials,
    refuse_overlap,
    stratified_order,
)
from ptq.errors import CalibrationError, ManifestError

GREY = PreprocessingConfig(channels=1, resize=4, crop=4, mean=(0.5,), std=(0.5,))


def picture(level):
    """A grey PNG of one level; different levels have different digests."""
    return png_from_pixels(np.full((4, 4), level, dtype=np.uint8))


def write_images(root, levels):
    for path, level in levels.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture(level))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    write_images(
        root,
        {
            "train/cat/a.png": 1, "train/cat/b.PNG": 2, "train/dog/c.png": 3, "train/dog/deep/er/d.jpeg": 4,
            "val/cat/e.png": 5, "val/dog/f.png": 6, "test/cat/g.png": 7, "test/dog/h.png": 8, "test/dog/i.png": 9,
        },
    )  # fmt: skip
    return root


def index(path, **splits):
    names = {"calibration_split": "train", "selection_split": "val", "test_split": "test"} | splits
    return index_images(str(path), **names)


def write_manifest(root, rows, name="images.csv"):
    table = pl.DataFrame(rows, schema=["path", "label", "split"], orient="row")
    path = root / name
    table.write_parquet(path) if path.suffix == ".parquet" else table.write_csv(path)
    return path


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


def test_an_index_holds_digest_and_size_of_every_file(folder):
    row = index(folder).table.row(3, named=True)
    assert row["sha256"] == hashlib.sha256(picture(1)).hexdigest()
    assert row["size_bytes"] == len(picture(1))


def test_progress_counts_every_file_once(folder):
    seen = []
    index(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 9) for done in range(1, 10)]


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


def test_images_in_two_splits_are_counted_and_named(folder):
    write_images(folder, {"test/cat/copy.png": 1, "val/cat/copy.png": 1, "train/cat/twin.png": 2})
    found = index(folder)
    assert found.duplicates_across_splits == 1
    assert found.warnings == ("1 images are in more than one split: test/cat/copy.png = train/cat/a.png.",)


def test_an_image_under_two_labels_is_named(folder):
    write_images(folder, {"train/dog/copy.png": 1})
    assert index(folder).warnings == ("1 images are under more than one label: train/cat/a.png = train/dog/copy.png.",)


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


def test_rows_come_back_from_parquet_in_order_of_path(folder, tmp_path):
    found = index(folder)
    (tmp_path / "index.parquet").write_bytes(parquet_from_index(found))
    rows = rows_of_split(tmp_path / "index.parquet", "test")
    assert rows == rows_of_split_table(found.table, "test")
    assert [(row.path, row.label) for row in rows] == [
        ("test/cat/g.png", 0),
        ("test/dog/h.png", 1),
        ("test/dog/i.png", 1),
    ]
    assert rows[0].sha256 == hashlib.sha256(picture(7)).hexdigest()


def test_rows_of_an_unknown_split_list_those_there_are(folder):
    with pytest.raises(ManifestError, match='The index has no split "dev"; it has "test", "train", "val"'):
        rows_of_split_table(index(folder).table, "dev")


def test_the_fingerprint_of_untouched_data_stays_and_reads_no_image(folder):
    before = listing_fingerprint(str(folder))
    for path in folder.rglob("*.png"):
        status = path.stat()
        path.write_bytes(b"\x00" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert listing_fingerprint(str(folder)) == before


def test_the_fingerprint_changes_with_content_name_and_number_of_files(folder):
    seen = [listing_fingerprint(str(folder))]
    os.utime(folder / "train" / "cat" / "a.png", ns=(1, 1))
    seen.append(listing_fingerprint(str(folder)))
    (folder / "train" / "cat" / "a.png").rename(folder / "train" / "cat" / "aa.png")
    seen.append(listing_fingerprint(str(folder)))
    (folder / "train" / "cat" / "aa.png").unlink()
    seen.append(listing_fingerprint(str(folder)))
    assert len(set(seen)) == 4


def test_the_fingerprint_of_a_manifest_covers_its_bytes_and_its_files(folder):
    path = write_manifest(folder, [("train/cat/a.png", "cat", "train"), ("test/cat/g.png", "cat", "test")])
    seen = [listing_fingerprint(str(path))]
    os.utime(folder / "train" / "cat" / "a.png", ns=(1, 1))
    seen.append(listing_fingerprint(str(path)))
    (folder / "test" / "cat" / "g.png").unlink()
    seen.append(listing_fingerprint(str(path)))
    path.write_text(path.read_text() + "\n")
    seen.append(listing_fingerprint(str(path)))
    os.utime(folder / "train" / "dog" / "c.png", ns=(1, 1))
    assert len(set(seen)) == 4
    assert listing_fingerprint(str(path)) == seen[-1]


def test_the_fingerprint_of_nothing_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="there is nothing there"):
        listing_fingerprint(str(tmp_path / "gone"))


def test_images_are_decoded_in_the_order_of_the_rows(folder):
    rows = rows_of_split_table(index(folder).table, "train")[::-1]
    seen = []
    pixels = decode_rows(
        rows, root=str(folder), preprocessing=GREY, workers=2, progress=lambda done, total: seen.append((done, total))
    )
    assert pixels.shape == (4, 4, 4, 1)
    assert pixels[:, 0, 0, 0].tolist() == [4, 3, 2, 1]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_file_that_changed_since_it_was_indexed_is_refused(folder):
    rows = rows_of_split_table(index(folder).table, "test")
    (folder / "test" / "dog" / "h.png").write_bytes(picture(99))
    with pytest.raises(ManifestError, match=r"Image test/dog/h\.png has changed since it was indexed"):
        decode_rows(rows, root=str(folder), preprocessing=GREY)


def test_a_file_that_went_away_since_it_was_indexed_is_refused(folder):
    rows = rows_of_split_table(index(folder).table, "test")
    (folder / "test" / "dog" / "h.png").unlink()
    with pytest.raises(ManifestError, match=r"Image test/dog/h\.png under .* cannot be read: No such file"):
        decode_rows(rows, root=str(folder), preprocessing=GREY)


def test_a_damaged_file_is_named_when_it_is_decoded(folder):
    (folder / "test" / "dog" / "h.png").write_bytes(picture(8)[:-30])
    rows = rows_of_split_table(index(folder).table, "test")
    with pytest.raises(ManifestError, match=r"Image test/dog/h\.png .* cannot be decoded"):
        decode_rows(rows, root=str(folder), preprocessing=GREY)


def test_a_draw_is_proportional_to_the_classes():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    drawn = draw_stratified(labels, images=20, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [12, 6, 2]


def test_the_largest_remainder_gets_the_image_left_over():
    labels = np.repeat([0, 1, 2], [46, 33, 21])
    drawn = draw_stratified(labels, images=10, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [5, 3, 2]


def test_a_rare_class_gets_one_image_where_there_are_enough():
    labels = np.repeat([0, 1, 2], [998, 1, 1])
    drawn = draw_stratified(labels, images=3, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [1, 1, 1]


def test_a_draw_smaller_than_the_classes_does_not_always_take_the_first_ones():
    labels = np.repeat(np.arange(100), 2)
    drawn = {label for seed in range(20) for label in labels[draw_stratified(labels, images=10, seed=seed)].tolist()}
    assert len(drawn) > 50


def test_the_same_seed_draws_the_same_images_and_another_seed_others():
    labels = np.repeat([0, 1], 200)
    first = draw_stratified(labels, images=50, seed=3)
    np.testing.assert_array_equal(draw_stratified(labels, images=50, seed=3), first)
    assert not np.array_equal(draw_stratified(labels, images=50, seed=4), first)


def test_a_draw_stays_what_it_was():
    drawn = draw_stratified(np.repeat([0, 1], [12, 6]), images=6, seed=7)
    # Recorded once: a draw is part of a run's identity, so it may not change with a library.
    assert drawn.tolist() == [0, 6, 7, 8, 14, 15]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 2**31 - 1))
def test_a_draw_is_exact_sorted_without_replacement_and_fair(labels, images, seed):
    labels = np.array(labels, dtype=np.int64)
    images = min(images, len(labels))
    drawn = draw_stratified(labels, images=images, seed=seed)
    assert len(drawn) == images
    assert np.all(np.diff(drawn) > 0)
    classes = np.unique(labels)
    counts = np.array([np.sum(labels[drawn] == label) for label in classes])
    assert images < len(classes) or counts.min() >= 1


def test_too_few_images_are_refused_with_the_numbers():
    with pytest.raises(
        CalibrationError, match=r'calibration\.images asks for 512; split "train" has 300 images\. Lower'
    ):
        draw_calibration_indices(np.zeros(300, dtype=np.int64), images=512, seed=0)


def test_asking_for_a_negative_number_of_images_is_a_wrong_argument():
    with pytest.raises(ValueError, match=r"images must be in \[0, 3\], got -1"):
        draw_stratified(np.zeros(3, dtype=np.int64), images=-1, seed=0)


def test_classes_that_no_trial_drew_are_found():
    labels = np.array([5, 5, 2, 9, 2])
    assert classes_never_drawn(labels, [np.array([0]), np.array([1])]) == (2, 9)
    assert classes_never_drawn(labels, []) == (2, 5, 9)


def test_an_overlap_is_the_digests_in_both():
    assert calibration_overlap(["b", "a", "a", "c"], ["c", "a", "d"]) == ["a", "c"]


def test_an_overlap_is_refused_naming_three_pairs_of_files():
    drawn = [ImageRow(f"train/{number}.png", 0, f"digest{number}") for number in range(5)]
    evaluated = [ImageRow(f"test/{number}.png", 0, f"digest{number}") for number in range(1, 6)]
    expected = (
        '4 calibration images drawn from split "train" are also in split "test", on which the model is evaluated: '
        r"train/1\.png = test/1\.png, train/2\.png = test/2\.png, train/3\.png = test/3\.png and 1 more\. Expected none"
    )
    with pytest.raises(CalibrationError, match=expected):
        refuse_overlap(drawn, evaluated, split="train", evaluated_split="test")


def test_disjoint_images_are_accepted():
    rows = [ImageRow("a.png", 0, "one")], [ImageRow("a.png", 0, "two")]
    assert refuse_overlap(*rows, split="train", evaluated_split="test") is None


@pytest.fixture
def table(folder, tmp_path):
    path = tmp_path / "index.parquet"
    path.write_bytes(parquet_from_index(index(folder)))
    return path


def drawn_trials(table, **options):
    settings = {"split": "train", "evaluated_splits": ("val", "test"), "images": 2, "trials": 5, "seed": 0}
    return draw_trials(table, class_names=("cat", "dog"), **(settings | options))


def test_trials_are_draws_with_successive_seeds_over_the_images_drawn(table):
    found = drawn_trials(table)
    rows = rows_of_split(table, "train")
    labels = np.array([row.label for row in rows])
    for trial, positions in enumerate(found.indices):
        expected = [rows[position] for position in draw_stratified(labels, images=2, seed=trial)]
        assert [found.rows[position] for position in positions] == expected
    assert {position for trial in found.indices for position in trial} == set(range(len(found.rows)))
    assert found.warnings == ()


def test_trials_warn_of_classes_never_drawn(table):
    found = drawn_trials(table, images=1, trials=1)
    assert len(found.warnings) == 1
    assert 'No calibration image of 1 of the 2 classes in split "train" was drawn' in found.warnings[0]


def test_trials_refuse_to_calibrate_on_the_split_that_is_evaluated(table):
    with pytest.raises(CalibrationError, match=r'drawn from split "test" are also in split "test".*test/cat/g\.png'):
        drawn_trials(table, split="test")


def test_trials_skip_an_evaluated_split_that_is_absent(table):
    assert drawn_trials(table, evaluated_splits=("dev", "test")).indices == drawn_trials(table).indices


def test_trials_refuse_a_copy_of_an_evaluated_image_under_another_name(folder, tmp_path):
    write_images(folder, {"test/cat/copy.png": 1})
    (tmp_path / "index.parquet").write_bytes(parquet_from_index(index(folder)))
    with pytest.raises(CalibrationError, match=r"train/cat/a\.png = test/cat/copy\.png"):
        drawn_trials(tmp_path / "index.parquet", images=4)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**31 - 1))
def test_every_prefix_of_an_order_holds_each_class_nearly_in_proportion(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = stratified_order(labels, seed=seed)
    assert sorted(order) == list(range(len(labels)))
    counts = np.cumsum(labels[order][:, None] == np.arange(len(sizes)), axis=0)
    lengths = np.arange(1, len(labels) + 1)
    # At any place of the order each class is within one image of its share, so a prefix is within one per class of its
    # own length, and a class is off by one and by its share of that.
    shares = np.array(sizes) / len(labels)
    assert np.all(np.abs(counts - lengths[:, None] * shares) <= 1 + len(sizes) * shares)


def test_an_order_has_no_period_that_groups_of_every_eighth_image_could_meet():
    labels = np.repeat(np.arange(8), 64)
    groups = labels[stratified_order(labels, seed=0)].reshape(-1, 8)
    assert all(len(np.unique(group)) == 8 for group in groups.T)


def test_an_order_depends_on_the_seed_alone():
    labels = np.repeat([0, 1], 20)
    assert stratified_order(labels, seed=3).tolist() == stratified_order(labels, seed=3).tolist()
    assert stratified_order(labels, seed=3).tolist() != stratified_order(labels, seed=4).tolist()


def test_ordered_trials_hold_the_same_images_as_ascending_ones(table):
    plain, ordered = (drawn_trials(table, images=3, is_ordered=flag) for flag in (False, True))
    assert plain.rows == ordered.rows
    assert plain.indices == tuple(tuple(sorted(draw)) for draw in ordered.indices)
    assert plain.indices != ordered.indices
