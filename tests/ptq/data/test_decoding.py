"""Are the indexed files decoded in their order, and is a changed one refused?"""

import pytest
from image_data import GREY, index, picture

from ptq.data.decoding import decode_rows
from ptq.data.index import rows_of_split_table
from ptq.errors import ManifestError


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
