"""Which clipping threshold (amax) does each method choose for activations and for weights?

For activations every function takes a stack of histograms of |x| (tensors, bins) and returns one amax per tensor;
for weights, the weights themselves and one amax per output channel. Nothing reads a file or keeps state, so each
can be checked by hand. Given the reference library's own histogram, `mse` and `entropy` choose the same bin as
pytorch-quantization 2.1.3 does.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numba
import numpy as np
from jaxtyping import Float, Int

from ptq.config import LabelledMethod, Method, WeightMethod
from ptq.errors import CalibrationError
from ptq.numerics.histogram import Histograms

# The reference's `start_bin`: thresholds below it would leave fewer bins than there are integers.
START_BIN = 128
# Candidates of a weight's amax, in units of max |w| / WEIGHT_STEPS. Among them is 127 / 128, which maps -max |w| to
# -128; those above max |w| clip nothing and serve short channels (see `amax_from_weight`).
WEIGHT_STEPS = 1024
WEIGHT_CANDIDATES = (256, 1088)
# The smallest scale that is a normal float32.
LEAST_SCALE = float(np.finfo(np.float32).tiny)
# Errors that differ by less than this share of the channel's sum of squares are equal: it is the rounding of a float32
# scale, not the weights, that tells them apart.
EQUAL_ERRORS = 1e-12


# Where each method cuts a histogram, in bins from zero, by its counts and the integers that amax maps to. `max` and
# `percentile`, which need neither, are no functions of their own. In the order of their cost, the cheapest first.
CUTS: dict[Method, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mse": lambda counts, bounds: mse_bin(counts, bounds=bounds) + 0.5,
    "entropy": lambda counts, bounds: entropy_bin(counts, bounds=bounds),
}


def amax_from_histograms(
    histograms: Histograms,
    *,
    methods: Sequence[LabelledMethod],
    bounds: Int[np.ndarray, " tensors"],
    names: Sequence[str],
) -> dict[str, Float[np.ndarray, " tensors"]]:
    """Returns the amax of every tensor by each method, by the method's label.

    Args:
        histograms: what the calibration images left, one histogram per tensor.
        methods: with distinct labels; all percentiles come from one cumulative sum.
        bounds: the integer amax maps to, 127 for int8 and 255 for uint8, (tensors,).
        names: names of the tensors, for messages.

    Returns:
        float64 (tensors,) by label, positive; never above the exact maximum.

    Raises:
        CalibrationError: a tensor has seen no value, or only zeros.
        ValueError: a percentile is outside (0, 100].
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
    percentiles = [item.percentile for item in methods if item.percentile is not None]
    by_percentile = dict(zip(percentiles, percentile_bins(histograms.counts, percentiles=percentiles).T, strict=True))
    found = {}
    for item in methods:
        if item.method == "max":
            found[item.label] = maxima
            continue
        if item.percentile is not None:
            edges = by_percentile[item.percentile]
        else:
            edges = CUTS[item.method](histograms.counts, bounds)
        found[item.label] = np.minimum(edges * histograms.bin_widths, maxima)
    return found


def percentile_bins(
    counts: Int[np.ndarray, "tensors bins"], *, percentiles: Sequence[float]
) -> Int[np.ndarray, "tensors percentiles"]:
    """Returns, per tensor and percentile, the upper edge (in bins) of the bin that holds the asked share of the values.

    Counts are integers, so the rounding of a floating cumulative sum cannot move the answer. The upper edge is
    returned, so percentile 100 never clips an observed value; pytorch-quantization returns the lower edge. One
    cumulative sum serves all percentiles.

    Raises:
        ValueError: a percentile is outside (0, 100].

    >>> percentile_bins(np.array([[6, 3, 1]]), percentiles=[60.0, 90.0]).tolist()
    [[1, 2]]
    """
    for percentile in percentiles:
        if not 0.0 < percentile <= 100.0:
            raise ValueError(f"percentile must be in (0, 100], got {percentile}.")
    cumulative = np.cumsum(counts, axis=1)
    # Fractions: in floats 10,000 * 99.9 / 100 is a little more than 9,990, and its ceiling one too many.
    shares = [Fraction(str(percentile)) / 100 for percentile in percentiles]
    found = np.empty((len(counts), len(shares)), dtype=np.int64)
    for row, sums in enumerate(cumulative):
        needed = [math.ceil(int(sums[-1]) * share) for share in shares]
        found[row] = np.searchsorted(sums, np.array(needed, dtype=np.int64)) + 1
    return found


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


def amax_from_weight(
    weight: Float[np.ndarray, "channels values"], *, method: WeightMethod
) -> Float[np.ndarray, " channels"]:
    """Returns the amax of every output channel of a weight.

    Args:
        weight: finite, float32 or float64, one row per output channel.
        method: `max` is max |w|. `mse` is the candidate a with the least sum over the channel of
            (w - clip(round(w / s), -128, 127) * s)^2, s = a / 127 in float32; candidates are k / 1024 * max |w|, k from
            256 to 1088, and of equal errors the larger a wins. Being a candidate, `max` is never better.

    Returns:
        float32 (channels,), positive: a channel of zeros gets the smallest amax whose scale is a normal float32.

    Source of `mse`: the search over fractions of max |w| that BRECQ initialises its weight quantizers with (Li et
    al., 2021, `init_quantization_scale` of its code: 80 fractions, 1 % apart, power 2.4); here with power 2, with
    ONNX's QuantizeLinear instead of an asymmetric quantizer, and on a finer grid that goes beyond max |w|. Long
    channels gain from clipping. Short ones gain from a scale on whose multiples their few weights happen to lie: the
    median error of MobileNetV2's depthwise channels falls to 0.6 of that of `max`, without candidates above max |w|
    it does not fall at all.

    >>> amax_from_weight(np.array([[-1.0, 0.5]], np.float32), method="max").tolist()
    [1.0]
    >>> amax_from_weight(np.array([[-1.0, 0.5]], np.float32), method="mse").tolist()
    [0.9921875]
    """
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    if method == "mse":
        steps = _weight_steps(
            np.ascontiguousarray(weight, dtype=np.float64),
            largest,
            *WEIGHT_CANDIDATES,
            WEIGHT_STEPS,
        )
        largest = largest * (steps / WEIGHT_STEPS).astype(np.float32)
    return np.maximum(largest, np.float32(LEAST_SCALE * 127))


# Reassociation lets the sum use vector registers: 0.1 ns a weight and candidate on two cores, 3 s for ResNet-50.
@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract"})
def _weight_steps(weight, largest, first, last, steps):  # type: ignore[no-untyped-def]
    channels, values = weight.shape
    best = np.full(channels, steps, dtype=np.int64)
    for channel in numba.prange(channels):
        squares = 0.0
        for index in range(values):
            squares += weight[channel, index] * weight[channel, index]
        least = np.inf
        for candidate in range(last, first - 1, -1):
            amax = np.float32(largest[channel] * np.float32(candidate / steps))
            scale = float(np.float32(amax / np.float32(127)))
            if scale < LEAST_SCALE:
                break
            inverse_scale = 1.0 / scale
            error = 0.0
            for index in range(values):
                value = weight[channel, index]
                rounded = min(max(np.rint(value * inverse_scale), -128.0), 127.0)
                difference = value - rounded * scale
                error += difference * difference
            if error < least - EQUAL_ERRORS * squares:
                least = error
                best[channel] = candidate
    return best


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
