"""How are the absolute activations of a tensor distributed?

A histogram of |x| whose merge is exact, commutative and associative: bin widths are powers of two, the number
of bins is fixed, counts are int64. A tensor whose maximum exceeds the range gets bins twice as wide, adding
neighbours pairwise, as often as needed. Therefore the result is the same to the last bit for any batch size,
any order of the images and any number of workers whose parts are merged. No amax is chosen here.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from jaxtyping import Float, Int

from ptq.errors import CalibrationError

# Below this width float32 arithmetic on 1 / width would overflow; such a tensor lies in bin 0.
MIN_EXPONENT = -120
INFINITY_BITS = 0x7F800000


@dataclass(frozen=True, slots=True)
class Histograms:
    """Histograms of |x| of several tensors.

    Attributes:
        counts: (tensors, bins); bin i of tensor t counts values in [i, i + 1) * 2**exponents[t].
        exponents: (tensors,), the exponent of two of each bin width.
        maxima: (tensors,), the exact largest |x|, float32.
        zeros: (tensors,), how many values are exactly 0; they are counted in bin 0 as well.
    """

    counts: Int[np.ndarray, "tensors bins"]
    exponents: Int[np.ndarray, " tensors"]
    maxima: Float[np.ndarray, " tensors"]
    zeros: Int[np.ndarray, " tensors"]

    @property
    def totals(self) -> Int[np.ndarray, " tensors"]:
        """Number of values seen in each tensor."""
        return self.counts.sum(axis=1)

    @property
    def bin_widths(self) -> Float[np.ndarray, " tensors"]:
        """Width of the bins of each tensor, in activation units."""
        return np.ldexp(1.0, self.exponents)


def empty_histograms(tensors: int, *, bins: int) -> Histograms:
    """Returns histograms that have seen nothing: the neutral element of `merge`."""
    return Histograms(
        counts=np.zeros((tensors, bins), dtype=np.int64),
        exponents=np.full(tensors, MIN_EXPONENT, dtype=np.int32),
        maxima=np.zeros(tensors, dtype=np.float32),
        zeros=np.zeros(tensors, dtype=np.int64),
    )


def exponent_for(maximum: float, *, bins: int) -> int:
    """Returns the smallest exponent e with maximum < bins * 2**e, at least `MIN_EXPONENT`.

    >>> exponent_for(1.0, bins=4), exponent_for(0.99, bins=4)
    (-1, -2)
    """
    if maximum == 0:
        return MIN_EXPONENT
    _, exponent = np.frexp(maximum)
    return max(int(exponent) - (bins.bit_length() - 1), MIN_EXPONENT)


def histograms_of(
    tensors: Sequence[Float[np.ndarray, "..."]], *, bins: int, names: Sequence[str], image: str
) -> Histograms:
    """Returns the histograms of |x| of one image's tensors, at the finest width that holds each maximum.

    This is the plain definition, which tests hold against `accumulation`: there it takes one pass over memory.

    Args:
        tensors: float32 arrays of any shape, one per name.
        bins: number of bins, a power of two.
        names: names of the tensors, for the message.
        image: name of the image, for the message.

    Raises:
        CalibrationError: a tensor holds NaN or infinity; the message names it and the image.
    """
    result = empty_histograms(len(tensors), bins=bins)
    scratch = np.empty((_TABLES, bins), dtype=np.uint32)
    for index, tensor in enumerate(tensors):
        values = np.ascontiguousarray(tensor, dtype=np.float32).reshape(-1)
        if values.size == 0:
            raise CalibrationError(f"Tensor {names[index]} is empty for image {image}; expected at least one value.")
        if values.size >= 2**31:
            raise CalibrationError(
                f"Tensor {names[index]} has {values.size:,} values; expected fewer than 2^31 per image."
            )
        bits = int(largest_bits(values.view(np.int32)))
        if bits >= INFINITY_BITS:
            raise CalibrationError(
                f"Activation {names[index]} holds NaN or infinity for image {image}. Expected finite values. Check the "
                "checkpoint and the preprocessing (mean and std) with `ptq evaluate` first."
            )
        maximum = np.array(bits, dtype=np.int32).view(np.float32)
        exponent = exponent_for(float(maximum), bins=bins)
        scratch[:] = 0
        result.zeros[index] = _count(values, np.float32(np.ldexp(1.0, -exponent)), scratch)
        result.counts[index] = scratch.sum(axis=0, dtype=np.int64)
        result.exponents[index] = exponent
        result.maxima[index] = maximum
    return result


# Consecutive equal values would wait for each other's increment; several tables taken in turn do not.
_TABLES = 4
_BLOCK = 1024


@numba.njit(nogil=True, cache=True)
def largest_bits(bits):  # type: ignore[no-untyped-def]
    """Largest |x| as its bit pattern: for floats without sign the order of the bits is the order of the values."""
    largest = np.int32(0)
    for index in range(bits.size):
        magnitude = bits[index] & np.int32(0x7FFFFFFF)
        largest = magnitude if magnitude > largest else largest
    return largest


@numba.njit(nogil=True, cache=True)
def _count(values, inverse_width, tables):  # type: ignore[no-untyped-def]
    """Adds the values to the tables and returns how many are zero."""
    indices = np.empty(_BLOCK, dtype=np.int32)
    zeros = 0
    for start in range(0, values.size, _BLOCK):
        length = min(_BLOCK, values.size - start)
        for offset in range(length):
            value = values[start + offset]
            # Exact: multiplying by a power of two only changes the exponent.
            indices[offset] = np.int32(abs(value) * inverse_width)
            zeros += value == 0
        offset = 0
        while offset + 4 <= length:
            tables[0, np.uint64(indices[offset])] += np.uint32(1)
            tables[1, np.uint64(indices[offset + 1])] += np.uint32(1)
            tables[2, np.uint64(indices[offset + 2])] += np.uint32(1)
            tables[3, np.uint64(indices[offset + 3])] += np.uint32(1)
            offset += 4
        while offset < length:
            tables[0, np.uint64(indices[offset])] += np.uint32(1)
            offset += 1
    return zeros


def coarsen(counts: Int[np.ndarray, " bins"], *, doublings: int) -> Int[np.ndarray, " bins"]:
    """Returns `counts` in bins 2**doublings times as wide, as many bins as before.

    >>> coarsen(np.array([1, 2, 3, 4]), doublings=1).tolist()
    [3, 7, 0, 0]
    """
    bins = counts.size
    result = np.zeros_like(counts)
    if 2**doublings >= bins or doublings >= 63:
        result[0] = counts.sum()
        return result
    merged = counts.reshape(bins >> doublings, 1 << doublings).sum(axis=1)
    result[: merged.size] = merged
    return result


def add_(target: Histograms, other: Histograms) -> None:
    """Merges `other` into `target`, in place. See `merge`."""
    if target.counts.shape != other.counts.shape:
        raise ValueError(f"Histograms of shapes {target.counts.shape} and {other.counts.shape} cannot be merged.")
    exponents = np.maximum(target.exponents, other.exponents)
    for index in np.flatnonzero(target.exponents != exponents):
        target.counts[index] = coarsen(target.counts[index], doublings=int(exponents[index] - target.exponents[index]))
    same = other.exponents == exponents
    if same.all():
        np.add(target.counts, other.counts, out=target.counts)
    else:
        target.counts[same] += other.counts[same]
        for index in np.flatnonzero(~same):
            target.counts[index] += coarsen(
                other.counts[index], doublings=int(exponents[index] - other.exponents[index])
            )
    target.exponents[:] = exponents
    np.maximum(target.maxima, other.maxima, out=target.maxima)
    np.add(target.zeros, other.zeros, out=target.zeros)


def merge(left: Histograms, right: Histograms) -> Histograms:
    """Returns the histograms of the values of both: exact, commutative, associative.

    Raises:
        ValueError: they hold different numbers of tensors or bins.
    """
    result = Histograms(left.counts.copy(), left.exponents.copy(), left.maxima.copy(), left.zeros.copy())
    add_(result, right)
    return result


def bytes_from_trials(trials: Sequence[Histograms]) -> bytes:
    """Returns the histograms of every trial as one npz file without pickles, with deterministic bytes."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        counts=np.stack([trial.counts for trial in trials]),
        exponents=np.stack([trial.exponents for trial in trials]),
        maxima=np.stack([trial.maxima for trial in trials]),
        zeros=np.stack([trial.zeros for trial in trials]),
    )
    return buffer.getvalue()


def trials_from_bytes(data: bytes) -> list[Histograms]:
    """Returns what `bytes_from_trials` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        parts = [arrays[name] for name in ("counts", "exponents", "maxima", "zeros")]
    return [Histograms(*(part[trial] for part in parts)) for trial in range(parts[0].shape[0])]
