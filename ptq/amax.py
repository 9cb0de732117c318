"""Which clipping threshold (amax) does each method choose from a histogram of absolute activations?

Every function takes a stack of histograms (tensors, bins) and returns one amax per tensor, in activation
units. Nothing reads a file or keeps state, so each can be checked by hand. Given the reference library's own
histogram, `mse` and `entropy` choose the same bin as pytorch-quantization 2.1.3 does.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numba
import numpy as np
from jaxtyping import Float, Int

from ptq.config import Method
from ptq.errors import CalibrationError
from ptq.histogram import Histograms

# The reference's `start_bin`: thresholds below it would leave fewer bins than there are integers.
START_BIN = 128


def amax_from_histograms(
    histograms: Histograms,
    *,
    method: Method,
    percentile: float,
    bounds: Int[np.ndarray, " tensors"],
    names: Sequence[str],
) -> Float[np.ndarray, " tensors"]:
    """Returns the amax of every tensor by one method.

    Args:
        histograms: what the calibration images left, one histogram per tensor.
        method: `max`, `percentile`, `mse` or `entropy`.
        percentile: share of the values kept by `percentile`, in (0, 100].
        bounds: the integer amax maps to, 127 for int8 and 255 for uint8, (tensors,).
        names: names of the tensors, for messages.

    Returns:
        float64 (tensors,), positive; never above the exact maximum.

    Raises:
        CalibrationError: a tensor has seen no value, or only zeros.
    """
    for index, total in enumerate(histograms.totals):
        if total == 0:
            raise CalibrationError(
                f"Quantizer {names[index]} has seen no value, so no amax can be chosen. Expected at least one image to "
                "reach it; its layer is probably not on the path from the input to the logits."
            )
        if histograms.maxima[index] == 0:
            raise CalibrationError(
                f"Quantizer {names[index]} has seen {total:,} values, all of them 0, so no amax can be chosen. The "
                "layer before it is dead for these images; check the preprocessing, or leave the layers that read it "
                "in float with quantization.skip_layers."
            )
    maxima = histograms.maxima.astype(np.float64)
    if method == "max":
        return maxima
    if method == "percentile":
        edges = percentile_bin(histograms.counts, percentile=percentile)
    elif method == "mse":
        edges = mse_bin(histograms.counts, bounds=bounds) + 0.5
    else:
        edges = entropy_bin(histograms.counts, bounds=bounds)
    return np.minimum(edges * histograms.bin_widths, maxima)


def percentile_bin(counts: Int[np.ndarray, "tensors bins"], *, percentile: float) -> Int[np.ndarray, " tensors"]:
    """Returns, per tensor, the upper edge (in bins) of the bin that holds the asked share of the values.

    Counts are integers, so the rounding of a floating cumulative sum cannot move the answer. The upper edge is
    returned, so percentile 100 never clips an observed value; pytorch-quantization returns the lower edge.

    Raises:
        ValueError: `percentile` is outside (0, 100].

    >>> percentile_bin(np.array([[6, 3, 1]]), percentile=90.0).tolist()
    [2]
    """
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}.")
    cumulative = np.cumsum(counts, axis=1)
    # Fractions: in floats 10,000 * 99.9 / 100 is a little more than 9,990, and its ceiling one too many.
    share = Fraction(str(percentile)) / 100
    needed = np.array([math.ceil(int(total) * share) for total in cumulative[:, -1]])
    return (cumulative < needed[:, None]).sum(axis=1) + 1


def mse_bin(
    counts: Int[np.ndarray, "tensors bins"], *, bounds: Int[np.ndarray, " tensors"]
) -> Int[np.ndarray, " tensors"]:
    """Returns, per tensor, the bin whose centre, taken as amax, gives the least squared quantization error.

    The error of amax a with bound m is the sum over bins of count * (x - q(x))^2, x the centre of the bin and q
    rounding to a multiple of a / m, clipped at a. Within one integer the error is a quadratic in x, so sums of
    count, count * x and count * x^2 over its bins give it without a loop over the bins. Source:
    `_compute_amax_mse` of pytorch-quantization 2.1.3, which evaluates the same sum bin by bin in float32.
    """
    return _mse_bins(np.ascontiguousarray(counts, dtype=np.int64), np.asarray(bounds, dtype=np.int64), START_BIN)


def entropy_bin(
    counts: Int[np.ndarray, "tensors bins"], *, bounds: Int[np.ndarray, " tensors"]
) -> Int[np.ndarray, " tensors"]:
    """Returns, per tensor, the edge (in bins) that loses the least information, as Kullback-Leibler divergence.

    For a threshold at edge i, P is the first i bins with everything beyond added to the last, and Q is P's
    in-range part averaged over the non-empty bins of each of m + 1 equal groups (128 for int8, 256 for uint8).
    The divergence is the sum over bins of P log(P / Q). All bins of a group share one Q, so sums of count,
    count * log(count) and non-empty bins per group give it in closed form. Bin 0 takes the count of bin 1, so
    that the zeros of a ReLU do not decide; of equal divergences the largest threshold wins. Source:
    `_compute_amax_entropy` of pytorch-quantization 2.1.3, after Migacz, 8-bit inference with TensorRT (2017).
    """
    return _entropy_bins(np.ascontiguousarray(counts, dtype=np.int64), np.asarray(bounds, dtype=np.int64), START_BIN)


@numba.njit(parallel=True, cache=True)
def _mse_bins(counts, bounds, start):  # type: ignore[no-untyped-def]
    tensors, bins = counts.shape
    best = np.zeros(tensors, dtype=np.int64)
    for tensor in numba.prange(tensors):
        count, first, second = np.zeros(bins + 1), np.zeros(bins + 1), np.zeros(bins + 1)
        for index in range(bins):
            centre = index + 0.5
            weight = float(counts[tensor, index])
            count[index + 1] = count[index] + weight
            first[index + 1] = first[index] + weight * centre
            second[index + 1] = second[index] + weight * centre * centre
        bound = bounds[tensor]
        least = np.inf
        for index in range(min(start, bins - 1), bins):
            step = (index + 0.5) / bound
            error = 0.0
            low = 0
            for level in range(bound + 1):
                # First bin whose centre rounds to the next integer; the last integer takes everything beyond.
                high = bins if level == bound else min(bins, int(np.ceil((level + 0.5) * step - 0.5)))
                if high > low:
                    value = level * step
                    error += (
                        (second[high] - second[low])
                        - 2.0 * value * (first[high] - first[low])
                        + value * value * (count[high] - count[low])
                    )
                    low = high
            if error < least:
                least = error
                best[tensor] = index
    return best


@numba.njit(parallel=True, cache=True)
def _entropy_bins(counts, bounds, start):  # type: ignore[no-untyped-def]
    tensors, bins = counts.shape
    best = np.full(tensors, bins, dtype=np.int64)
    for tensor in numba.prange(tensors):
        row = counts[tensor].astype(np.float64)
        row[0] = row[1]
        count, information, filled = np.zeros(bins + 1), np.zeros(bins + 1), np.zeros(bins + 1)
        for index in range(bins):
            weight = row[index]
            count[index + 1] = count[index] + weight
            information[index + 1] = information[index] + (weight * np.log(weight) if weight > 0 else 0.0)
            filled[index + 1] = filled[index] + (1.0 if weight > 0 else 0.0)
        total = count[bins]
        if total == 0:
            continue
        groups = bounds[tensor] + 1
        least = np.inf
        for edge in range(min(start, bins), bins + 1):
            outliers = total - count[edge]
            inside = count[edge]
            last = row[edge - 1]
            if inside == 0 or (outliers > 0 and last == 0):
                continue  # Q is 0 where P is not: the divergence is infinite
            # Sum of P log P, unnormalised; the last bin carries the outliers.
            own = information[edge]
            if last > 0:
                own += (last + outliers) * np.log(last + outliers) - last * np.log(last)
            cross = 0.0
            low = 0
            for group in range(groups):
                high = edge if group == groups - 1 else min(edge, int(np.ceil((group + 1) * edge / groups)))
                if high > low:
                    mass = count[high] - count[low]
                    if mass > 0:
                        carried = mass + (outliers if high == edge else 0.0)
                        cross += carried * np.log(mass / (filled[high] - filled[low]))
                    low = high
            divergence = (own - cross) / total + np.log(inside) - np.log(total)
            if divergence <= least:
                least = divergence
                best[tensor] = edge
    return best
