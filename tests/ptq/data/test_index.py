"""Does an index hold what the files hold, and does it come back as it was?"""

import hashlib
import os

import pytest
from image_data import index, picture, write_images, write_manifest

from ptq.data.index import listing_fingerprint, parquet_from_index, rows_of_split, rows_of_split_table
from ptq.errors import ManifestError


def test_an_index_holds_digest_and_size_of_every_file(folder):
    row = index(folder).table.row(3, named=True)
    assert row["sha256"] == hashlib.sha256(picture(1)).hexdigest()
    assert row["size_bytes"] == len(picture(1))


def test_progress_counts_every_file_once(folder):
    seen = []
    index(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 9) for done in range(1, 10)]


def test_images_in_two_splits_are_counted_and_named(folder):
    write_images(folder, {"test/cat/copy.png": 1, "val/cat/copy.png": 1, "train/cat/twin.png": 2})
    found = index(folder)
    assert found.duplicates_across_splits == 1
    assert found.warnings == ("1 images are in more than one split: test/cat/copy.png = train/cat/a.png.",)


def test_an_image_under_two_labels_is_named(folder):
    write_images(folder, {"train/dog/copy.png": 1})
    assert index(folder).warnings == ("1 images are under more than one label: train/cat/a.png = train/dog/copy.png.",)


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
