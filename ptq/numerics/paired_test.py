"""Is one model worse than another on the same images, beyond chance?"""

import math
from statistics import NormalDist

import numpy as np

from ptq.records.evaluation import PairedComparison

# 97.5 % quantile of the standard normal distribution: 1.95996...
_Z_95 = NormalDist().inv_cdf(0.975)


def paired_comparison(
    reference_predictions: np.ndarray, predictions: np.ndarray, labels: np.ndarray
) -> PairedComparison:
    """Compares INT8 with FP32 on the same images.

    Args:
        reference_predictions: FP32's class index of each image, (n,).
        predictions: INT8's, (n,).
        labels: the true ones, (n,).

    Returns:
        The drop in percentage points (FP32 minus INT8), its 95 % interval, the exact two-sided McNemar p, and
        the number of images whose prediction changed at all, right or wrong.

    Raises:
        ValueError: the lengths differ or there is no image.

    >>> comparison = paired_comparison(np.array([0, 1, 1, 0]), np.array([0, 0, 0, 0]), np.array([0, 1, 1, 0]))
    >>> comparison.drop_pp, comparison.fp32_only_correct, comparison.mcnemar_p
    (50.0, 2, 0.5)
    """
    if not len(reference_predictions) == len(predictions) == len(labels):
        raise ValueError(
            f"A paired comparison needs one row an image, got {len(reference_predictions)} FP32 predictions, "
            f"{len(predictions)} INT8 predictions and {len(labels)} labels."
        )
    images = len(labels)
    if images == 0:
        raise ValueError("A paired comparison needs at least 1 image, got 0.")
    is_fp32_correct = reference_predictions == labels
    is_int8_correct = predictions == labels
    lost = int((is_fp32_correct & ~is_int8_correct).sum())
    gained = int((~is_fp32_correct & is_int8_correct).sum())
    return PairedComparison(
        images=images,
        drop_pp=100 * (lost - gained) / images,
        drop_interval_pp=paired_interval_pp(lost, gained, images),
        mcnemar_p=mcnemar_p(lost, gained),
        fp32_only_correct=lost,
        int8_only_correct=gained,
        flipped=int((reference_predictions != predictions).sum()),
    )


def paired_interval_pp(lost: int, gained: int, images: int) -> tuple[float, float]:
    """Returns the 95 % interval of the accuracy drop, in percentage points, cut at -100 and 100.

    Args:
        lost: images that only FP32 gets right.
        gained: images that only INT8 gets right.
        images: all images, n.

    The adjusted Wald interval for paired proportions: with p = (lost + 1) / (n + 2) and
    q = (gained + 1) / (n + 2), it is p - q -+ 1.96 sqrt((p + q - (p - q)^2) / (n + 2)). It keeps a width where
    no image changed, which the plain Wald interval does not. Source: Bonett and Price (2012), Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data, Journal of Educational
    and Behavioral Statistics 37(4), 479-488.

    >>> [round(limit, 2) for limit in paired_interval_pp(26, 4, 40)]
    [31.26, 73.5]
    """
    p, q = (lost + 1) / (images + 2), (gained + 1) / (images + 2)
    half_width = _Z_95 * math.sqrt((p + q - (p - q) ** 2) / (images + 2))
    return max(100 * (p - q - half_width), -100.0), min(100 * (p - q + half_width), 100.0)


def mcnemar_p(lost: int, gained: int) -> float:
    """Returns the exact two-sided McNemar p of `lost` against `gained` discordant images, 1.0 without any.

    Under no difference each discordant image falls on either side with probability one half. The sum of
    binomial coefficients is taken in integers, so that it is exact for any number of images.

    >>> mcnemar_p(1, 5)
    0.21875
    """
    discordant = lost + gained
    term = total = 1
    for successes in range(1, min(lost, gained) + 1):
        term = term * (discordant - successes + 1) // successes
        total += term
    return min(1.0, 2 * total / 2**discordant)


def sampling_std_pp(comparison: PairedComparison) -> float:
    """Returns the standard deviation of the drop, in percentage points, expected from the finite test set alone.

    100 sqrt(b + c - (b - c)^2 / n) / n, with b and c the discordant images of either side: what the drop
    would move by if the n images were drawn anew and the two models stayed the same.

    >>> drawn = paired_comparison(np.array([0, 0, 1, 0]), np.array([0, 1, 0, 0]), np.array([0, 0, 0, 0]))
    >>> round(sampling_std_pp(drawn), 3)
    35.355
    """
    lost, gained, images = comparison.fp32_only_correct, comparison.int8_only_correct, comparison.images
    return 100 * math.sqrt(lost + gained - (lost - gained) ** 2 / images) / images
