"""Which images does a folder or a manifest list, of which class and split?"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import polars as pl

from ptq.data.image_folders import ImageTree, tree_at
from ptq.data.remote_inputs import Inputs
from ptq.errors import ManifestError
from ptq.uris import is_remote
from ptq.wording import first_names

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MANIFEST_ENDINGS = (".csv", ".parquet")
MANIFEST_COLUMNS = ("path", "label", "split")
# Decides the order of the classes wherever it exists: it is the split a checkpoint was trained on.
TRAINING_SPLIT = "train"
# A larger index is a mistake in the label column, such as an image's number.
MAX_CLASSES = 100_000


@dataclass(frozen=True, slots=True)
class Splits:
    """The names a person gave to the three uses of images."""

    calibration: str
    selection: str
    test: str

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the splits, each once."""
        return tuple(dict.fromkeys((self.calibration, self.selection, self.test)))


@dataclass(frozen=True, slots=True)
class Listing:
    """Images and their labels before any file is read; `table` has path, label and split."""

    table: pl.DataFrame
    tree: ImageTree
    class_names: tuple[str, ...]
    has_named_classes: bool
    warnings: tuple[str, ...]


def is_manifest(source: Path) -> bool:
    """Whether the images are listed by a manifest rather than by folders; a path that is neither is refused."""
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


def list_local(source: Path, splits: Splits) -> Listing:
    """Returns what a folder or a manifest on this machine lists."""
    if is_manifest(source):
        return _list_manifest(source, str(source), tree_at(source.parent), splits)
    return _list_folder(tree_at(source), splits)


def list_remote(path: str, splits: Splits, inputs: Inputs) -> Listing:
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


def _check_splits(available: Sequence[str], splits: Splits, *, source: str) -> None:
    for option, name in (("data.calibration_split", splits.calibration), ("data.test_split", splits.test)):
        if name not in available:
            there = f"has the splits {quoted(available)}" if available else "has no splits"
            raise ManifestError(
                f'{option} is "{name}"; {source} {there}. Set {option} to one that exists, or add images for "{name}".'
            )


def _list_folder(tree: ImageTree, splits: Splits) -> Listing:
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
        _check_readable_names(tree, [f"{name}/{each}" for each in classes[name]])
    reference = TRAINING_SPLIT if classes.get(TRAINING_SPLIT) else splits.calibration
    class_names = tuple(classes[reference])
    found: dict[str, list] = {"path": [], "label": [], "split": []}
    ignored: list[str] = []
    for split in names:
        for name in classes[split]:
            _check_class_known(name, class_names, split=split, reference=reference)
            files = sorted(f"{split}/{name}/{file}" for file in tree.files(f"{split}/{name}"))
            _check_readable_names(tree, files)
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
        warnings = (f"{len(ignored)} files that do not end like images were left out: {first_names(ignored)}.",)
    table = pl.DataFrame(found, schema={"path": pl.String, "label": pl.Int64, "split": pl.String})
    return Listing(table, tree, class_names, True, warnings)


def _check_readable_names(tree: ImageTree, paths: Sequence[str]) -> None:
    """Refuses names that are no UTF-8, which tables and reports could not hold."""
    wrong = [path for path in paths if any("\udc80" <= character <= "\udcff" for character in path)]
    if wrong:
        shown = [path.encode("utf-8", "backslashreplace").decode() for path in wrong]
        raise ManifestError(
            f"{len(wrong)} names under {tree} are not in UTF-8, such as {first_names(shown)}. Expected names in UTF-8; "
            "rename them, for example with `convmv -r -f latin1 -t utf8 --notest FOLDER`."
        )


def _list_manifest(file: Path, source: str, tree: ImageTree, splits: Splits) -> Listing:
    """The images in the manifest `file`, which people know as `source`."""
    rows = read_manifest(file, source)
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
            f"{first_names(contradictions['path'].unique().sort().to_list())}. Expected one label per file; "
            "remove the wrong rows."
        )
    warnings: tuple[str, ...] = ()
    if table.height < used.height:
        warnings = (f"{used.height - table.height} rows of {source} repeat another row and were left out.",)
    return Listing(table, tree, class_names, is_named, warnings)


def read_manifest(file: Path, source: str) -> pl.DataFrame:
    """The columns path, label and split as text, and the row counted from 1."""
    try:
        is_csv = source.lower().endswith(".csv")
        rows = pl.read_csv(_utf8(file), infer_schema=False) if is_csv else pl.read_parquet(file)
    except pl.exceptions.NoDataError:
        rows = pl.DataFrame()
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"Manifest {source} cannot be read: {str(error).splitlines()[0]}. Expected a table in UTF-8 CSV or in "
            f"Parquet with the columns {', '.join(MANIFEST_COLUMNS)}."
        ) from error
    missing = [column for column in MANIFEST_COLUMNS if column not in rows.columns]
    if missing and rows.columns:
        raise ManifestError(
            f"Manifest {source} has no column {quoted(missing)}; its columns are {quoted(rows.columns)}. "
            f"Expected {', '.join(MANIFEST_COLUMNS)}; rename or add."
        )
    if rows.is_empty():
        raise ManifestError(
            f"Manifest {source} has no rows. Expected one row per image with the columns {', '.join(MANIFEST_COLUMNS)}."
        )
    return rows.select(pl.col(column).cast(pl.String) for column in MANIFEST_COLUMNS).with_row_index("row", offset=1)


def _utf8(file: Path) -> Path | bytes:
    """A CSV file; what it holds in UTF-8, where its first bytes say UTF-16, as spreadsheets write it."""
    with file.open("rb") as opened:
        begins = opened.read(2)
    return file.read_bytes().decode("utf-16").encode() if begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else file


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
            f"Manifest {source} names {len(absent)} files that are not there, of {len(paths)}: {first_names(absent)}. "
            f"Expected them under {tree}; correct the paths or remove the rows."
        )


def _manifest_classes(source: str, rows: pl.DataFrame, splits: Splits) -> tuple[tuple[str, ...], bool]:
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
            f'Class "{name}" of split "{split}" is not in split "{reference}", which has {first_names(class_names)}. '
            f'Expected every class in "{reference}"; add images of it there or remove it from "{split}".'
        )


def quoted(names: Sequence[str]) -> str:
    """Returns names in quotation marks, separated by commas."""
    return ", ".join(f'"{name}"' for name in names)
