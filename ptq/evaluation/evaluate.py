"""How good is one graph on the engine that will run it?

Builds the graph, runs it over every split and turns the logits into metrics and per-image predictions, so that
everything else can be computed later without inference.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

from ptq.config import Precision
from ptq.data.images import network_input
from ptq.engines.base import Engine
from ptq.evaluation.predictions import parquet_from_tables, predictions_table
from ptq.files import npz_from_arrays
from ptq.numerics.metrics import split_metrics
from ptq.records.evaluation import SplitMetrics


@dataclass(frozen=True, slots=True)
class SplitImages:
    """The images of one split: `pixels` uint8 (n, h, w, c), `labels` int64 (n,), and a (path, SHA-256) each."""

    split: str
    pixels: np.ndarray
    labels: np.ndarray
    files: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics by split, the number of the model's outputs, predictions as Parquet, and logits as npz."""

    splits: tuple[SplitMetrics, ...]
    num_classes: int
    predictions: bytes
    logits: bytes


def split_images_from_files(split: str, *, pixels: Path, labels: Path, files: Path) -> SplitImages:
    """Returns a prepared split; its pixels are mapped, not read."""
    return SplitImages(
        split=split,
        pixels=np.load(pixels, mmap_mode="r", allow_pickle=False),
        labels=np.load(labels, allow_pickle=False),
        files=[(path, sha256) for path, sha256 in json.loads(files.read_text())],
    )


def evaluate_graph(
    graph: Path,
    *,
    engine: Engine,
    precision: Precision,
    batch_size: int,
    float_remainder: Literal["fp32", "bf16"],
    splits: Sequence[SplitImages],
    mean: Sequence[float],
    std: Sequence[float],
    reference_logits: Mapping[str, np.ndarray] | None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Returns the metrics, predictions and logits of a graph on every split.

    Args:
        graph: ONNX file.
        engine: what runs it.
        precision: the precision it is built in.
        batch_size: images per inference.
        float_remainder: precision of what stays in float in an INT8 graph.
        splits: the images.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        reference_logits: FP32's logits by split; None for FP32 itself.
        progress: called with (images done, images in all).

    Raises:
        EngineBuildError: the engine refuses the graph, or a logit is not finite.
    """
    run = partial(engine.logits, graph, precision=precision, batch_size=batch_size, float_remainder=float_remainder)
    found = logits_of(
        run, [images.pixels for images in splits], batch_size=batch_size, mean=mean, std=std, progress=progress
    )
    metrics, tables, logits = [], [], {}
    for images, values in zip(splits, found, strict=True):
        reference = reference_logits[images.split] if reference_logits is not None else None
        metrics.append(split_metrics(values, images.labels, split=images.split, reference_logits=reference))
        paths, digests = [path for path, _ in images.files], [sha256 for _, sha256 in images.files]
        tables.append(predictions_table(values, images.labels, split=images.split, paths=paths, sha256=digests))
        logits[images.split] = values
    return Evaluation(
        splits=tuple(metrics),
        num_classes=values.shape[1],
        predictions=parquet_from_tables(tables),
        logits=npz_from_arrays(logits),
    )


Run = Callable[[Iterable[Float[np.ndarray, "n c h w"]]], Iterator[Float[np.ndarray, "n k"]]]


def logits_of(
    run: Run,
    pixels: Sequence[UInt8[np.ndarray, "n h w c"]],
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    progress: Callable[[int, int], None] | None = None,
) -> list[Float[np.ndarray, "n k"]]:
    """Returns the logits of every image of every array, float32, in order.

    Args:
        run: from normalized batches to their logits, as `Engine.logits` gives them.
        pixels: arrays of uint8 images, of one shape.
        batch_size: images per batch; a batch never spans two arrays.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        progress: called with (images done, images in all) after every batch.
    """
    places = [(part, start) for part, images in enumerate(pixels) for start in range(0, len(images), batch_size)]
    total, done = sum(map(len, pixels)), 0
    found: list[list[np.ndarray]] = [[] for _ in pixels]
    batches = (network_input(pixels[part][start : start + batch_size], mean=mean, std=std) for part, start in places)
    for (part, _), logits in zip(places, run(batches), strict=True):
        found[part].append(logits)
        done += len(logits)
        if progress:
            progress(done, total)
    return [np.concatenate(parts) for parts in found]
