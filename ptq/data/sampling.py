"""Which images are drawn for calibration?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ptq.data.index import ImageRow, rows_of_split_table
from ptq.errors import CalibrationError
from ptq.wording import first_names

# Keeps the order of a draw independent of the draw itself, which has the same seed.
_ORDER_STREAM = 1


@dataclass(frozen=True, slots=True)
class DrawnTrials:
    """Every image some trial drew, once, and per trial the positions of its images among them."""

    rows: tuple[ImageRow, ...]
    indices: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...]


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
            f"drawn: {first_names([class_names[label] for label in never])}. Raise calibration.images to at least "
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
            f"which the model is evaluated: {first_names(sorted(pairs))}. Expected none; remove them from one of the "
            "splits, or set data.calibration_split to another split."
        )


def evenly_spaced(images: Sequence[int], *, count: int) -> list[int]:
    """Returns `count` of the images, evenly spaced, for they are in the order of the data; all where there are fewer.

    >>> evenly_spaced([0, 1, 2, 3, 4, 5], count=3)
    [0, 2, 4]
    """
    count = min(count, len(images))
    return [images[index * len(images) // count] for index in range(count)]
