"""Small folders and manifests of images, and their index."""

import numpy as np
import polars as pl

from ptq.config import PreprocessingConfig
from ptq.data.images import png_from_pixels
from ptq.data.index import index_images

GREY = PreprocessingConfig(channels=1, resize=4, crop=4, mean=(0.5,), std=(0.5,))


def picture(level):
    """A grey PNG of one level; different levels have different digests."""
    return png_from_pixels(np.full((4, 4), level, dtype=np.uint8))


def write_images(root, levels):
    for path, level in levels.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture(level))


def index(path, **splits):
    names = {"calibration_split": "train", "selection_split": "val", "test_split": "test"} | splits
    return index_images(str(path), **names)


def write_manifest(root, rows, name="images.csv"):
    table = pl.DataFrame(rows, schema=["path", "label", "split"], orient="row")
    path = root / name
    table.write_parquet(path) if path.suffix == ".parquet" else table.write_csv(path)
    return path
