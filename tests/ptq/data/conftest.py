"""What the tests of several modules about images start from."""

import pytest
from image_data import write_images


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
