"""Which images are there, which are drawn for calibration, and what are their pixels?

Indexes an image folder or a manifest, draws stratified trials, and decodes files through `images`. Every file
is identified by the SHA-256 of its bytes; where it lies, here or in S3, is for `image_trees`. Nothing here
normalises pixels or runs a network.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import polars as pl

from ptq.config import Decoding, PreprocessingConfig
from ptq.errors import CalibrationError, ManifestError
from ptq.image_trees import ImageTree, tree_at
from ptq.images import decode_image
from ptq.inputs import Inputs, is_remote
from ptq.records.data import SplitCount

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MANIFEST_ENDINGS = (".csv", ".parquet")
MANIFEST_COLUMNS = ("path", "label", "split")
# Decides the order of the classes wherever it exists: it is the split a checkpoint was trained on.
TRAINING_SPLIT = "train"
# A larger index is a mistake in the label column, such as an image's number.
MAX_CLASSES = 100_000

# Keeps the order of a draw independent of the draw itself, which has the same seed.
_ORDER_STREAM = 1

Progress = Callable[[int, int], None]


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


@dataclass(frozen=True, slots=True)
class DrawnTrials:
    """Every image some trial drew, once, and per trial the positions of its images among them."""

    rows: tuple[ImageRow, ...]
    indices: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Splits:
    """The names a person gave to the three uses of images."""

    calibration: str
    selection: str
    test: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.calibration, self.selection, self.test)))


@dataclass(frozen=True, slots=True)
class _Listing:
    """Images and their labels before any file is read; `table` has path, label and split."""

    table: pl.DataFrame
    tree: ImageTree
    class_names: tuple[str, ...]
    has_named_classes: bool
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
    splits = _Splits(calibration_split, selection_split, test_split)
    listing = _list_remote(path, splits, inputs or Inputs()) if is_remote(path) else _list_local(Path(path), splits)
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
    if _is_manifest(source):
        state.update(source.read_bytes())
        root = source.parent
        names: list[str] = sorted(_read_manifest(source, str(source))["path"].drop_nulls().unique().to_list())
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
            f'The index has no split "{split}"; it has {_quoted(table["split"].unique().sort().to_list())}. '
            "Set the split to one of these."
        )
    return [ImageRow(*row) for row in found.select("path", "label", "sha256").iter_rows()]


def decode_rows(
    rows: Sequence[ImageRow],
    *,
    root: str,
    preprocessing: PreprocessingConfig | Decoding,
    progress: Progress | None = None,
    workers: int = 0,
    inputs: Inputs | None = None,
) -> np.ndarray:
    """Read, verify and decode the images of `rows`.

    Args:
        rows: the images, in the order of the result.
        root: the folder, or the s3:// URI, their paths are relative to.
        preprocessing: how each is resized and cropped.
        progress: called with the number of images decoded and the number of all.
        workers: threads; 0 for one per core, and for more where most of the time is waiting for a server.
        inputs: reads what is in S3; None for the user's cache alone.

    Returns:
        Pixels, uint8 (n, h, w, c).

    Raises:
        ManifestError: a file is gone, damaged, or no longer the one that was indexed.
    """
    side = preprocessing.crop
    tree = tree_at(root, inputs)
    pixels = np.empty((len(rows), side, side, preprocessing.channels), dtype=np.uint8)

    def decode(position: int) -> None:
        row = rows[position]
        data = tree.read(row.path, row.sha256)
        found = hashlib.sha256(data).hexdigest()
        if found != row.sha256:
            raise ManifestError(
                f"Image {row.path} has changed since it was indexed: its SHA-256 begins with {found[:12]}, expected "
                f"{row.sha256[:12]}. Run again once nothing writes to {root}."
            )
        pixels[position] = decode_image(data, preprocessing=preprocessing, source=row.path)

    with ThreadPoolExecutor(workers or tree.readers) as pool:
        for done, _ in enumerate(pool.map(decode, range(len(rows))), start=1):
            if progress:
                progress(done, len(rows))
    return pixels


def draw_trials(
    table: Path,
    *,
    split: str,
    evaluated_splits: Sequence[str],
    images: int,
    trials: int,
    seed: int,
    class_names: Sequence[str],
    is_ordered: bool = False,
) -> DrawnTrials:
    """Draw the calibration images of every trial and refuse any that is evaluated on too.

    Args:
        table: a file that `parquet_from_index` wrote.
        split: the split to draw from.
        evaluated_splits: splits whose images may not be drawn; absent ones are skipped.
        images: images in each draw.
        trials: number of draws.
        seed: of the first draw; trial t uses seed + t.
        class_names: for the warning of classes never drawn.
        is_ordered: whether the positions of a trial come in the order of `stratified_order`, for a trial of which
            a prefix may be used, instead of ascending.

    Raises:
        CalibrationError: the split has too few images, or a drawn image is in an evaluated split.
        ManifestError: there is no such split.
    """
    index = pl.read_parquet(table)
    rows = rows_of_split_table(index, split)
    labels = np.array([row.label for row in rows], dtype=np.int64)
    draws = [draw_calibration_indices(labels, images=images, seed=seed + t, split=split) for t in range(trials)]
    used = np.unique(np.concatenate(draws))
    drawn = tuple(rows[position] for position in used)
    for evaluated in dict.fromkeys(evaluated_splits):
        if evaluated in index["split"]:
            refuse_overlap(drawn, rows_of_split_table(index, evaluated), split=split, evaluated_split=evaluated)
    never = classes_never_drawn(labels, draws)
    warnings: tuple[str, ...] = ()
    if never:
        warnings = (
            f'No calibration image of {len(never)} of the {len(np.unique(labels))} classes in split "{split}" was '
            f"drawn: {_some([class_names[label] for label in never])}. Raise calibration.images to at least "
            f"{len(np.unique(labels))} to draw from every class.",
        )
    if is_ordered:
        draws = [draw[stratified_order(labels[draw], seed=seed + t)] for t, draw in enumerate(draws)]
    indices = tuple(tuple(np.searchsorted(used, draw).tolist()) for draw in draws)
    return DrawnTrials(drawn, indices, warnings)


def draw_calibration_indices(labels: np.ndarray, *, images: int, seed: int, split: str = "train") -> np.ndarray:
    """Return the positions of one draw, as `draw_stratified`, with an error that names the settings.

    Raises:
        CalibrationError: the split has fewer than `images` images.
    """
    if images > len(labels):
        raise CalibrationError(
            f'calibration.images asks for {images}; split "{split}" has {len(labels)} images. Lower '
            f"calibration.images to at most {len(labels)}, or set data.calibration_split to a larger split."
        )
    return draw_stratified(labels, images=images, seed=seed)


def draw_stratified(labels: np.ndarray, *, images: int, seed: int) -> np.ndarray:
    """Draw images without replacement, each class in proportion to its size.

    Shares are rounded by largest remainder, ties broken at random. Every class gets at least one image if
    there are enough for all.

    Args:
        labels: class index of each image, int64 (n,).
        images: how many to draw, in [0, n].
        seed: of numpy's PCG64.

    Returns:
        Positions in `labels`, ascending, exactly `images` of them.

    >>> draw_stratified(np.array([0, 0, 0, 0, 1, 1]), images=6, seed=0).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    if not 0 <= images <= len(labels):
        raise ValueError(f"images must be in [0, {len(labels)}], got {images}.")
    generator = np.random.Generator(np.random.PCG64(seed))
    classes, sizes = np.unique(labels, return_counts=True)
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:share]
        for label, share in zip(classes, _shares(sizes, images=images, generator=generator), strict=True)
    ]
    return np.sort(np.concatenate([*chosen, np.empty(0, dtype=np.int64)]))


def stratified_order(labels: np.ndarray, *, seed: int) -> np.ndarray:
    """Return a random order of a draw, of which every prefix holds each class nearly in proportion.

    The images of a class, shuffled, are spread evenly over the order: the k-th of n falls at a random place of the
    k-th n-th of it. So the first m of N images hold a class of n images close to m * n / N times, and the classes do
    not alternate with a period that groups of every eighth image, say, could meet.

    Args:
        labels: class index of each drawn image, int64 (n,).
        seed: of numpy's PCG64, on a stream of its own beside `draw_stratified`'s.

    Returns:
        A permutation of the positions in `labels`, int64 (n,).

    >>> stratified_order(np.array([0, 0, 0, 1]), seed=0).tolist()
    [3, 2, 0, 1]
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, _ORDER_STREAM))))
    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        places[members] = (np.arange(len(members)) + generator.random(len(members))) / len(members)
    return np.argsort(places, kind="stable")


def _shares(sizes: np.ndarray, *, images: int, generator: np.random.Generator) -> np.ndarray:
    """How many images each class gives; integers throughout, so that no rounding depends on the machine."""
    total = max(int(sizes.sum()), 1)
    shares, remainders = images * sizes // total, images * sizes % total
    # A random order under a stable sort: otherwise a draw smaller than the classes always takes the first ones.
    tied = generator.permutation(len(sizes))
    by_remainder = tied[np.argsort(-remainders[tied], kind="stable")]
    shares[by_remainder[: images - int(shares.sum())]] += 1
    if images >= len(sizes):
        for empty in np.flatnonzero(shares == 0):
            shares[np.argmax(shares)] -= 1
            shares[empty] = 1
    return shares


def classes_never_drawn(labels: np.ndarray, draws: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Return the classes of `labels` that no draw contains, ascending.

    >>> classes_never_drawn(np.array([0, 1, 2]), [np.array([0]), np.array([2])])
    (1,)
    """
    drawn = labels[np.concatenate([*draws, np.empty(0, dtype=np.int64)])]
    return tuple(np.setdiff1d(labels, drawn).tolist())


def calibration_overlap(calibration_sha256: Sequence[str], evaluation_sha256: Sequence[str]) -> list[str]:
    """Return the digests that occur in both, sorted, each once."""
    return sorted(set(calibration_sha256) & set(evaluation_sha256))


def refuse_overlap(
    calibration: Sequence[ImageRow], evaluation: Sequence[ImageRow], *, split: str, evaluated_split: str
) -> None:
    """Raise if an image is used both to calibrate and to evaluate, whatever its name.

    Raises:
        CalibrationError: names up to three pairs of files.
    """
    drawn = {row.sha256: row.path for row in calibration}
    evaluated = {row.sha256: row.path for row in evaluation}
    shared = calibration_overlap(list(drawn), list(evaluated))
    if shared:
        pairs = [drawn[key] if drawn[key] == evaluated[key] else f"{drawn[key]} = {evaluated[key]}" for key in shared]
        raise CalibrationError(
            f'{len(shared)} calibration images drawn from split "{split}" are also in split "{evaluated_split}", on '
            f"which the model is evaluated: {_some(sorted(pairs))}. Expected none; remove them from one of the splits, "
            "or set data.calibration_split to another split."
        )


def _is_manifest(source: Path) -> bool:
    if source.is_dir():
        return False
    if not source.exists():
        raise ManifestError(
            f"data.path is {source}; there is nothing there. Expected an image folder with one folder per split, or "
            "a manifest (.csv or .parquet)."
        )
    if source.suffix.lower() not in MANIFEST_ENDINGS:
        raise ManifestError(
            f'data.path is {source}, a file that ends in "{source.suffix}". Expected a folder, or a manifest that '
            "ends in .csv or .parquet."
        )
    return True


def _list_local(source: Path, splits: _Splits) -> _Listing:
    if _is_manifest(source):
        return _list_manifest(source, str(source), tree_at(source.parent), splits)
    return _list_folder(tree_at(source), splits)


def _list_remote(path: str, splits: _Splits, inputs: Inputs) -> _Listing:
    """The images at an s3:// URI: a manifest by its ending, else a prefix."""
    if PurePosixPath(path).suffix.lower() not in MANIFEST_ENDINGS:
        tree = tree_at(path, inputs)
        if not tree.folders():
            raise ManifestError(
                f"data.path is {path}; there are no folders with images under it. Expected a prefix with one folder "
                "per split, or a manifest (.csv or .parquet). Check the URI and AWS_ENDPOINT_URL_S3."
            )
        return _list_folder(tree, splits)
    try:
        manifest = inputs.local_path(path)
    except FileNotFoundError as error:
        raise ManifestError(
            f"data.path is {path}; there is no such object, or no such bucket. Expected a manifest, or a prefix with "
            "one folder per split. Check the URI and AWS_ENDPOINT_URL_S3."
        ) from error
    return _list_manifest(manifest, path, tree_at(path.rpartition("/")[0], inputs), splits)


def _check_splits(available: Sequence[str], splits: _Splits, *, source: str) -> None:
    for option, name in (("data.calibration_split", splits.calibration), ("data.test_split", splits.test)):
        if name not in available:
            there = f"has the splits {_quoted(available)}" if available else "has no splits"
            raise ManifestError(
                f'{option} is "{name}"; {source} {there}. Set {option} to one that exists, or add images for "{name}".'
            )


def _list_folder(tree: ImageTree, splits: _Splits) -> _Listing:
    available = tree.folders()
    _check_splits(available, splits, source=str(tree))
    names = [name for name in splits.names if name in available]
    classes = {name: tree.folders(name) for name in {*names, TRAINING_SPLIT} if name in available}
    for name in names:
        if not classes[name]:
            raise ManifestError(
                f"Split folder {tree}/{name} holds no class folders, so there are no images. Expected one folder per "
                f"class, such as {name}/cat/1.jpg."
            )
    reference = TRAINING_SPLIT if classes.get(TRAINING_SPLIT) else splits.calibration
    class_names = tuple(classes[reference])
    found: dict[str, list] = {"path": [], "label": [], "split": []}
    ignored: list[str] = []
    for split in names:
        for name in classes[split]:
            _check_class_known(name, class_names, split=split, reference=reference)
            files = sorted(f"{split}/{name}/{file}" for file in tree.files(f"{split}/{name}"))
            images = [file for file in files if file.lower().endswith(IMAGE_ENDINGS)]
            others = [file for file in files if not file.lower().endswith(IMAGE_ENDINGS)]
            if not images:
                raise ManifestError(
                    f"Class folder {tree}/{split}/{name} holds no image, only {len(others)} other files. Expected at "
                    f"least one file that ends in {', '.join(IMAGE_ENDINGS)}; add images or remove the folder."
                )
            ignored += others
            found["path"] += images
            found["label"] += [class_names.index(name)] * len(images)
            found["split"] += [split] * len(images)
    warnings: tuple[str, ...] = ()
    if ignored:
        warnings = (f"{len(ignored)} files that do not end like images were left out: {_some(ignored)}.",)
    table = pl.DataFrame(found, schema={"path": pl.String, "label": pl.Int64, "split": pl.String})
    return _Listing(table, tree, class_names, True, warnings)


def _list_manifest(file: Path, source: str, tree: ImageTree, splits: _Splits) -> _Listing:
    """The images in the manifest `file`, which people know as `source`."""
    rows = _read_manifest(file, source)
    available = rows["split"].drop_nulls().unique().sort().to_list()
    _check_splits(available, splits, source=source)
    used = rows.filter(pl.col("split").is_in(splits.names))
    for column in ("path", "label"):
        empty = used.filter(pl.col(column).is_null())
        if not empty.is_empty():
            raise ManifestError(
                f"Manifest {source} has {empty.height} rows without a {column}, the first is row {empty['row'][0]} "
                f'(split "{empty["split"][0]}"). Expected a {column} in every row; fill it in or remove the rows.'
            )
    _check_manifest_paths(source, tree, used["path"])
    class_names, is_named = _manifest_classes(source, rows, splits)
    if is_named:
        reference = TRAINING_SPLIT if TRAINING_SPLIT in available else splits.calibration
        for name, split in used.select("label", "split").unique().sort("split", "label").iter_rows():
            _check_class_known(name, class_names, split=split, reference=reference)
        label = pl.col("label").replace_strict(list(class_names), list(range(len(class_names))), return_dtype=pl.Int64)
    else:
        label = pl.col("label").str.to_integer()
    normalised = [path if is_remote(path) else PurePosixPath(path).as_posix() for path in used["path"]]
    table = used.select(pl.Series("path", normalised, dtype=pl.String), label.cast(pl.Int64), "split").unique()
    contradictions = table.filter(pl.col("label").n_unique().over("path") > 1)
    if not contradictions.is_empty():
        raise ManifestError(
            f"Manifest {source} gives {contradictions['path'].n_unique()} files more than one label: "
            f"{_some(contradictions['path'].unique().sort().to_list())}. Expected one label per file; remove the wrong "
            "rows."
        )
    warnings: tuple[str, ...] = ()
    if table.height < used.height:
        warnings = (f"{used.height - table.height} rows of {source} repeat another row and were left out.",)
    return _Listing(table, tree, class_names, is_named, warnings)


def _read_manifest(file: Path, source: str) -> pl.DataFrame:
    """The columns path, label and split as text, and the row counted from 1."""
    try:
        is_csv = source.lower().endswith(".csv")
        rows = pl.read_csv(file, infer_schema=False) if is_csv else pl.read_parquet(file)
    except pl.exceptions.NoDataError:
        rows = pl.DataFrame()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ManifestError(
            f"Manifest {source} cannot be read: {str(error).splitlines()[0]}. Expected a table in UTF-8 CSV or in "
            f"Parquet with the columns {', '.join(MANIFEST_COLUMNS)}."
        ) from error
    missing = [column for column in MANIFEST_COLUMNS if column not in rows.columns]
    if missing and rows.columns:
        raise ManifestError(
            f"Manifest {source} has no column {_quoted(missing)}; its columns are {_quoted(rows.columns)}. "
            f"Expected {', '.join(MANIFEST_COLUMNS)}; rename or add."
        )
    if rows.is_empty():
        raise ManifestError(
            f"Manifest {source} has no rows. Expected one row per image with the columns {', '.join(MANIFEST_COLUMNS)}."
        )
    return rows.select(pl.col(column).cast(pl.String) for column in MANIFEST_COLUMNS).with_row_index("row", offset=1)


def _check_manifest_paths(source: str, tree: ImageTree, paths: pl.Series) -> None:
    for path in paths:
        if tree.leads_out(path):
            raise ManifestError(
                f'Manifest {source} names "{path}", which leads out of {tree}. Expected paths relative to the '
                "manifest, without ..; move the manifest to a folder above the images."
            )
    absent = tree.absent(paths.to_list())
    if absent:
        raise ManifestError(
            f"Manifest {source} names {len(absent)} files that are not there, of {len(paths)}: {_some(absent)}. "
            f"Expected them under {tree}; correct the paths or remove the rows."
        )


def _manifest_classes(source: str, rows: pl.DataFrame, splits: _Splits) -> tuple[tuple[str, ...], bool]:
    """The class names, and whether the labels are names rather than indices."""
    labels = rows["label"].drop_nulls()
    fractions = labels.filter(labels.str.contains(r"^-?\d+\.\d*$"))
    if not fractions.is_empty():
        raise ManifestError(
            f"Manifest {source} has the label {fractions[0]}. Expected a class name or a class index; write the column "
            "as integers."
        )
    if not labels.str.contains(r"^-?\d+$").all():
        reference = rows.filter(pl.col("split") == TRAINING_SPLIT)["label"].drop_nulls()
        if reference.is_empty():
            reference = rows.filter(pl.col("split") == splits.calibration)["label"].drop_nulls()
        return tuple(reference.unique().sort().to_list()), True
    indices = [int(label) for label in labels.unique()]
    wrong = [index for index in indices if not 0 <= index < MAX_CLASSES]
    if wrong:
        raise ManifestError(
            f"Manifest {source} has the class index {wrong[0]}. Expected indices from 0 to {MAX_CLASSES - 1}, or class "
            "names; correct the label column."
        )
    return tuple(str(index) for index in range(max(indices) + 1)), False


def _check_class_known(name: str, class_names: Sequence[str], *, split: str, reference: str) -> None:
    if name not in class_names:
        raise ManifestError(
            f'Class "{name}" of split "{split}" is not in split "{reference}", which has {_some(class_names)}. '
            f'Expected every class in "{reference}"; add images of it there or remove it from "{split}".'
        )


def _count_split(table: pl.DataFrame, split: str, *, classes: int) -> SplitCount:
    labels = table.filter(pl.col("split") == split)["label"].to_numpy()
    return SplitCount(split, len(labels), tuple(np.bincount(labels, minlength=classes).tolist()))


def _present(table: pl.DataFrame, splits: _Splits) -> list[str]:
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
            warnings.append(f"{len(examples)} images are {what}: {_some(examples)}.")
    return tuple(warnings)


def _absent_class_warnings(listing: _Listing, splits: _Splits) -> tuple[str, ...]:
    if not listing.has_named_classes:
        return ()
    warnings = []
    for split in _present(listing.table, splits):
        there = set(listing.table.filter(pl.col("split") == split)["label"])
        absent = [name for label, name in enumerate(listing.class_names) if label not in there]
        if absent:
            warnings.append(f'Split "{split}" has no image of {len(absent)} classes: {_some(absent)}.')
    return tuple(warnings)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _some(names: Sequence[str]) -> str:
    """Up to three names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
