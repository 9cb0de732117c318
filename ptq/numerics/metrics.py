"""How right is a model on a split, and how far is it from FP32 on the same images?

Takes logits and labels, and returns numbers, and per-image predictions as tables. It runs no model and chooses
nothing. Ties have one rule everywhere: of equal logits, the lowest class index ranks first.
"""

import math

import numpy as np

from ptq.errors import EngineBuildError
from ptq.records.evaluation import SplitMetrics

# Identical logits have infinite SQNR, which JSON cannot hold; float32 noise stays below about 150 dB.
SQNR_LIMIT_DB = 200.0


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
    check_logits(logits, labels, source=f"the model under test on split {split!r}")
    if reference_logits is not None:
        if reference_logits.shape != logits.shape:
            raise ValueError(f"Reference logits have shape {reference_logits.shape}, expected {logits.shape}.")
        check_logits(reference_logits, labels, source=f"FP32 on split {split!r}")
    predictions = top1_predictions(logits)
    return SplitMetrics(
        split=split,
        images=len(labels),
        top1_percent=_percent(predictions == labels),
        top5_percent=_percent(is_top5_correct(logits, labels)),
        loss=float(cross_entropy_per_image(logits, labels).mean()),
        sqnr_db=None if reference_logits is None else sqnr_db(reference_logits, logits),
        agreement_percent=None
        if reference_logits is None
        else _percent(predictions == top1_predictions(reference_logits)),
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


def check_logits(logits: np.ndarray, labels: np.ndarray, *, source: str) -> None:
    """Raises where logits are not one row of finite numbers per label."""
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


def is_top5_correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns for each image whether its class is among the five largest logits; of equal ones the first counts."""
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
