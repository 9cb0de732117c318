"""Which predictions were made of which image, and what do they say of each class?"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ptq.numerics.metrics import check_logits, cross_entropy_per_image, is_top5_correct, top1_predictions

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
    check_logits(logits, labels, source=f"the model under test on split {split!r}")
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
            "top5_correct": is_top5_correct(logits, labels),
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


def _share_per_class(confusion: np.ndarray, totals: np.ndarray) -> tuple[float | None, ...]:
    pairs = zip(np.diagonal(confusion).tolist(), totals.tolist(), strict=True)
    return tuple(100 * right / total if total else None for right, total in pairs)
