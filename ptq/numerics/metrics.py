"""How right is a model on a split, and how far is it from FP32 on the same images?

Takes logits and labels, and returns numbers, and per-image predictions as tables. It runs no model and chooses
nothing. Ties have one rule everywhere: of equal logits, the lowest class index ranks first.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ptq.errors import EngineBuildError
from ptq.records.evaluation import SplitMetrics

# Identical logits have infinite SQNR, which JSON cannot hold; float32 noise stays below about 150 dB.
SQNR_LIMIT_DB = 200.0

# One table of `predictions_table` for each split, by name.
PredictionTables = Mapping[str, pl.DataFrame]


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """How the predictions on one split fall on the classes. `confusion[i][j]` counts images of class i predicted as j.

    Recall and precision are in percent, one entry a class: None for the recall of a class without images and the
    precision of a class never predicted. A thousand classes have a million counts, so this is no part of a record:
    `class_metrics` computes it from the stored predictions of the models that are shown.
    """

    confusion: tuple[tuple[int, ...], ...]
    recall_percent: tuple[float | None, ...]
    precision_percent: tuple[float | None, ...]


def split_metrics(
    logits: np.ndarray, labels: np.ndarray, *, split: str, reference_logits: np.ndarray | None
) -> SplitMetrics:
    """Returns the metrics of one model on one split.

    Args:
        logits: float32 (n, k), one row an image.
        labels: int64 (n,), class indices in [0, k).
        split: name of the split, kept in the record.
        reference_logits: FP32's logits on the same images, (n, k); None for FP32 itself.

    Returns:
        Shares in percent and the mean cross-entropy in nats. With fewer than 5 classes every image counts for top-5.

    Raises:
        ValueError: the shapes do not fit, there is no image, or a label is outside [0, k).
        EngineBuildError: a logit is not finite.

    >>> logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]], dtype=np.float32)
    >>> metrics = split_metrics(logits, np.array([0, 0, 0]), split="test", reference_logits=None)
    >>> round(metrics.top1_percent, 2), metrics.top5_percent
    (66.67, 100.0)
    """
    _check_logits(logits, labels, source=f"the model under test on split {split!r}")
    if reference_logits is not None:
        if reference_logits.shape != logits.shape:
            raise ValueError(f"Reference logits have shape {reference_logits.shape}, expected {logits.shape}.")
        _check_logits(reference_logits, labels, source=f"FP32 on split {split!r}")
    predictions = top1_predictions(logits)
    return SplitMetrics(
        split=split,
        images=len(labels),
        top1_percent=_percent(predictions == labels),
        top5_percent=_percent(_is_top5_correct(logits, labels)),
        loss=float(cross_entropy_per_image(logits, labels).mean()),
        sqnr_db=None if reference_logits is None else sqnr_db(reference_logits, logits),
        agreement_percent=None
        if reference_logits is None
        else _percent(predictions == top1_predictions(reference_logits)),
    )


def class_metrics(predictions: pl.DataFrame, *, num_classes: int) -> ClassMetrics:
    """Returns the confusion matrix of one model on one split, and recall and precision of each class.

    Args:
        predictions: a table of `predictions_table`, of one split.
        num_classes: outputs of the model, k; the matrix is k x k (row: label, column: prediction).

    Raises:
        ValueError: a label or a prediction is outside [0, k).

    >>> table = pl.DataFrame({"label": [0, 0, 0], "prediction": [0, 1, 0]})
    >>> found = class_metrics(table, num_classes=2)
    >>> found.confusion, found.recall_percent[1], found.precision_percent
    (((2, 1), (0, 0)), None, (100.0, 0.0))
    """
    for column in ("label", "prediction"):
        outside = predictions.filter(~pl.col(column).is_between(0, num_classes - 1))[column]
        if len(outside):
            raise ValueError(
                f"The predictions have the {column} {outside[0]}; expected class indices from 0 to {num_classes - 1}."
            )
    cells = predictions["label"].to_numpy() * num_classes + predictions["prediction"].to_numpy()
    confusion = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    return ClassMetrics(
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        recall_percent=_share_per_class(confusion, confusion.sum(axis=1)),
        precision_percent=_share_per_class(confusion, confusion.sum(axis=0)),
    )


def top1_predictions(logits: np.ndarray) -> np.ndarray:
    """Returns the class index of the largest logit of each image, int64 (n,); of equal ones the lowest index.

    >>> top1_predictions(np.array([[0.5, 2.0, 2.0], [1.0, 1.0, 0.0]])).tolist()
    [1, 0]
    """
    return np.argmax(logits, axis=1).astype(np.int64)


def cross_entropy_per_image(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns -log softmax(logits)[label] of each image in nats, float64 (n,).

    The largest logit is subtracted first, so that the exponential never overflows.

    >>> cross_entropy_per_image(np.array([[1000.0, 1000.0]]), np.array([1])).round(6).tolist()
    [0.693147]
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """Returns the signal-to-quantization-noise ratio 10 log10(sum reference^2 / sum (reference - value)^2), in dB.

    Args:
        reference: the signal, any shape.
        value: its quantized counterpart, same shape.

    Returns:
        dB over all elements, computed in float64 and limited to [-200, 200], so that it stays finite: 200
        where both are equal, -200 where the reference is all zeros and the value is not.

    Raises:
        ValueError: the shapes differ.

    >>> sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 3.5]))
    20.0
    >>> sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.0]))
    200.0
    """
    if reference.shape != value.shape:
        raise ValueError(f"SQNR compares arrays of one shape, got {reference.shape} and {value.shape}.")
    exact = reference.astype(np.float64)
    noise = float(np.square(exact - value).sum())
    signal = float(np.square(exact).sum())
    if noise == 0.0:
        return SQNR_LIMIT_DB
    if signal == 0.0:
        return -SQNR_LIMIT_DB
    return min(max(10.0 * (math.log10(signal) - math.log10(noise)), -SQNR_LIMIT_DB), SQNR_LIMIT_DB)


def cosine_per_image(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine between the rows of `a` and `b`, float64 (n,), in [-1, 1].

    Two rows of zeros agree (1.0); a row of zeros against any other does not (0.0).

    Raises:
        ValueError: the shapes differ or are not (n, k).

    >>> cosine_per_image(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[6.0, 8.0], [0.0, 2.0]])).tolist()
    [1.0, 0.0]
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"Cosines are taken between two arrays of one shape (n, k), got {a.shape} and {b.shape}.")
    first, second = _unit_rows(a), _unit_rows(b)
    both_zero = ~first.any(axis=1) & ~second.any(axis=1)
    return np.where(both_zero, 1.0, np.clip((first * second).sum(axis=1), -1.0, 1.0))


def predictions_table(
    logits: np.ndarray, labels: np.ndarray, *, split: str, paths: Sequence[str], sha256: Sequence[str]
) -> pl.DataFrame:
    """Returns one row an image, in the order given: from it every metric but the SQNR can be computed later.

    Args:
        logits: float32 (n, k).
        labels: int64 (n,), class indices in [0, k).
        split: name of the split, repeated in every row.
        paths: file of each image, (n,).
        sha256: digest of each file, (n,).

    Returns:
        Columns split, index (position in the split), path, sha256, label, prediction, correct, loss (nats),
        top5_correct.

    Raises:
        ValueError: the lengths do not fit, there is no image, or a label is outside [0, k).
        EngineBuildError: a logit is not finite.
    """
    _check_logits(logits, labels, source=f"the model under test on split {split!r}")
    if not len(paths) == len(sha256) == len(labels):
        raise ValueError(f"{len(labels)} images have {len(paths)} paths and {len(sha256)} digests; expected one each.")
    predictions = top1_predictions(logits)
    return pl.DataFrame(
        {
            "split": [split] * len(labels),
            "index": np.arange(len(labels), dtype=np.int64),
            "path": list(paths),
            "sha256": list(sha256),
            "label": labels.astype(np.int64),
            "prediction": predictions,
            "correct": predictions == labels,
            "loss": cross_entropy_per_image(logits, labels),
            "top5_correct": _is_top5_correct(logits, labels),
        }
    )


def parquet_from_tables(tables: Sequence[pl.DataFrame]) -> bytes:
    """Returns the rows of several tables of `predictions_table`, at least one, as one Parquet file."""
    buffer = io.BytesIO()
    pl.concat(tables).write_parquet(buffer)
    return buffer.getvalue()


def tables_from_parquet(source: Path | bytes) -> dict[str, pl.DataFrame]:
    """Returns the table of each split in the Parquet of `parquet_from_tables`, a file or bytes, rows in their order."""
    table = pl.read_parquet(source)
    return {
        split: table.filter(pl.col("split") == split) for split in table["split"].unique(maintain_order=True).to_list()
    }


def combined_predictions(files: Mapping[str, Path]) -> bytes:
    """Returns the predictions of several candidates as one Parquet file, with the first column `candidate`.

    Args:
        files: Parquet files of `parquet_from_tables`, by candidate, at least one; their order is kept.
    """
    return parquet_from_tables(
        [
            pl.read_parquet(path).select(pl.lit(candidate).alias("candidate"), pl.all())
            for candidate, path in files.items()
        ]
    )


def _check_logits(logits: np.ndarray, labels: np.ndarray, *, source: str) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"Logits have shape {logits.shape} and labels {labels.shape}; expected (n, k) and (n,).")
    if logits.size == 0:
        raise ValueError(f"Logits have shape {logits.shape}; expected at least 1 image and 1 class.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"Labels run from {labels.min()} to {labels.max()}; expected class indices from 0 to {logits.shape[1] - 1}."
        )
    is_finite = np.isfinite(logits).all(axis=1)
    if not is_finite.all():
        first = int(np.argmin(is_finite))
        raise EngineBuildError(
            f"Logits of {source} are not finite for {int((~is_finite).sum())} of {len(logits)} images, first for "
            f"image {first}. Expected finite numbers. Check the checkpoint in FP32, then the graph's scales with "
            f"`ptq validate`."
        )


def _is_top5_correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    own = logits[np.arange(len(labels)), labels][:, None]
    is_before = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & is_before)).sum(axis=1)
    return rank < 5


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length in float64; rows of zeros stay zero."""
    exact = rows.astype(np.float64)
    # Dividing by the largest element first keeps the squares of very small and very large rows in range.
    largest = np.abs(exact).max(axis=1, keepdims=True, initial=0.0)
    exact = exact / np.where(largest == 0.0, 1.0, largest)
    length = np.sqrt(np.square(exact).sum(axis=1, keepdims=True))
    return exact / np.where(length == 0.0, 1.0, length)


def _percent(flags: np.ndarray) -> float:
    return 100 * int(flags.sum()) / len(flags)


def _share_per_class(confusion: np.ndarray, totals: np.ndarray) -> tuple[float | None, ...]:
    pairs = zip(np.diagonal(confusion).tolist(), totals.tolist(), strict=True)
    return tuple(100 * right / total if total else None for right, total in pairs)
