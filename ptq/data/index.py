"""Which images are there, which are drawn for calibration, and what are their pixels?

Indexes an image folder or a manifest, draws stratified trials, and decodes files through `images`. Every file
is identified by the SHA-256 of its bytes; where it lies, here or in S3, is for `image_trees`. Nothing here
normalises pixels or runs a network.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ptq.data.image_folders import tree_at
from ptq.data.listing import Listing, Splits, is_manifest, list_local, list_remote, quoted, read_manifest
from ptq.data.remote_inputs import Inputs
from ptq.errors import ManifestError
from ptq.records.base import Progress
from ptq.records.data import SplitCount
from ptq.uris import is_remote
from ptq.wording import first_names


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One indexed image: its path under the root, class index, and the SHA-256 of the file."""

    path: str
    label: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """The images of up to three splits.

    `table` has the columns path (under `root`, with /), label (int64), split, sha256 and size_bytes, sorted by
    split and path. `duplicates_across_splits` counts contents that occur in more than one split.
    """

    table: pl.DataFrame
    root: Path | str
    class_names: tuple[str, ...]
    has_named_classes: bool
    splits: tuple[SplitCount, ...]
    duplicates_across_splits: int
    warnings: tuple[str, ...]


def index_images(
    path: str,
    *,
    calibration_split: str,
    selection_split: str,
    test_split: str,
    progress: Progress | None = None,
    inputs: Inputs | None = None,
) -> ImageIndex:
    """Index the named splits of an image folder or a manifest, reading each file once for its digest.

    Class names are in sorted order, as in torchvision's ImageFolder; integer labels of a manifest are class
    indices, and the names are then the indices as text. Other splits are not read.

    Args:
        path: a folder with one folder per split and in it one per class, or a .csv or .parquet file with the
            columns path (relative to the file), label and split; or the s3:// URI of either.
        calibration_split: must exist.
        selection_split: may be absent; the index then has no rows of it.
        test_split: must exist.
        progress: called with the number of files read and the number of all files.
        inputs: reads what is in S3, each object once while it is not touched; None for the user's cache alone.

    Raises:
        ManifestError: there is nothing at `path`, or what is there cannot be used as given.
    """
    splits = Splits(calibration_split, selection_split, test_split)
    listing = list_remote(path, splits, inputs or Inputs()) if is_remote(path) else list_local(Path(path), splits)
    table = listing.table.sort("split", "path")
    digests, sizes = listing.tree.digests(table["path"].to_list(), progress=progress)
    table = table.with_columns(
        pl.Series("sha256", digests, dtype=pl.String), pl.Series("size_bytes", sizes, dtype=pl.Int64)
    )
    leaks = table.filter(pl.col("split").n_unique().over("sha256") > 1)
    return ImageIndex(
        table=table,
        root=listing.tree.root,
        class_names=listing.class_names,
        has_named_classes=listing.has_named_classes,
        splits=tuple(_count_split(table, name, classes=len(listing.class_names)) for name in _present(table, splits)),
        duplicates_across_splits=leaks["sha256"].n_unique(),
        warnings=listing.warnings + _content_warnings(table, leaks) + _absent_class_warnings(listing, splits),
    )


def listing_fingerprint(path: str) -> str:
    """Return a SHA-256 over name, size and modification time of every local file at `path`, reading no image.

    The same fingerprint means that the data was not touched, so an index of it still holds. The bytes of a
    manifest count as well.

    Raises:
        ManifestError: there is nothing at `path`, or the manifest cannot be read.
    """
    source = Path(path)
    state = hashlib.sha256()
    if is_manifest(source):
        state.update(source.read_bytes())
        root = source.parent
        names: list[str] = sorted(read_manifest(source, str(source))["path"].drop_nulls().unique().to_list())
    else:
        root = source
        names = sorted(tree_at(source).files(""))
    for name in names:
        try:
            status = (root / name).stat()
        except OSError:
            state.update(json.dumps([name, None]).encode())
        else:
            state.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return state.hexdigest()


def index_fingerprint(index: ImageIndex) -> str:
    """Return a SHA-256 over path, label, split and digest of every image of an index."""
    return hashlib.sha256(json.dumps([index.class_names, *index.table.rows()]).encode()).hexdigest()


def parquet_from_index(index: ImageIndex) -> bytes:
    """Return the table of an index as a Parquet file."""
    buffer = io.BytesIO()
    index.table.write_parquet(buffer)
    return buffer.getvalue()


def rows_of_split(table: Path, split: str) -> list[ImageRow]:
    """Return the images of a split from a file that `parquet_from_index` wrote, sorted by path."""
    return rows_of_split_table(pl.read_parquet(table), split)


def rows_of_split_table(table: pl.DataFrame, split: str) -> list[ImageRow]:
    """Return the images of a split of an index's table, sorted by path.

    Raises:
        ManifestError: there is no such split.
    """
    found = table.filter(pl.col("split") == split)
    if found.is_empty():
        raise ManifestError(
            f'The index has no split "{split}"; it has {quoted(table["split"].unique().sort().to_list())}. '
            "Set the split to one of these."
        )
    return [ImageRow(*row) for row in found.select("path", "label", "sha256").iter_rows()]


def _count_split(table: pl.DataFrame, split: str, *, classes: int) -> SplitCount:
    labels = table.filter(pl.col("split") == split)["label"].to_numpy()
    return SplitCount(split, len(labels), tuple(np.bincount(labels, minlength=classes).tolist()))


def _present(table: pl.DataFrame, splits: Splits) -> list[str]:
    there = set(table["split"].unique())
    return [name for name in splits.names if name in there]


def _content_warnings(table: pl.DataFrame, leaks: pl.DataFrame) -> tuple[str, ...]:
    warnings = []
    for rows, what in (
        (leaks, "in more than one split"),
        (table.filter(pl.col("label").n_unique().over("sha256") > 1), "under more than one label"),
    ):
        if not rows.is_empty():
            groups = rows.group_by("sha256").agg(pl.col("path").unique().sort()).sort("path")
            examples = [" = ".join(paths[:2]) for paths in groups["path"].to_list()]
            warnings.append(f"{len(examples)} images are {what}: {first_names(examples)}.")
    return tuple(warnings)


def _absent_class_warnings(listing: Listing, splits: Splits) -> tuple[str, ...]:
    if not listing.has_named_classes:
        return ()
    warnings = []
    for split in _present(listing.table, splits):
        there = set(listing.table.filter(pl.col("split") == split)["label"])
        absent = [name for label, name in enumerate(listing.class_names) if label not in there]
        if absent:
            warnings.append(f'Split "{split}" has no image of {len(absent)} classes: {first_names(absent)}.')
    return tuple(warnings)
