"""How do a tensor's values reach the statistics of every trial in one pass over memory?

Counts |x|, finds the maximum, counts zeros and adds up channels block by block, while a block is in the first-level
cache. Bit by bit the counts are those of `histogram.histograms_of` and `add_`, whose definitions they follow; only
the order of work differs. An image's values are counted straight in bins as wide as the trials' bins have become,
which is exact because coarsening commutes with counting, and again from the start only if the image's maximum does
not fit. No network is run here.
"""

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from jaxtyping import Float
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ptq.errors import CalibrationError
from ptq.numerics.bias_correction import RESOLUTION, ChannelSums, empty_channel_sums
from ptq.numerics.histogram import INFINITY_BITS, MIN_EXPONENT, Histograms, empty_histograms, largest_bits

_MAGNITUDE = 0x7FFFFFFF
_LANES = 16
# A block, the next one and the bin numbers take 24 KiB: they stay in the first-level cache.
_BLOCK = 2048
# Consecutive equal values would wait for each other's increment; two tables taken in turn wait less. More would not
# fit into the first-level cache.
_TABLES = 2
# Rows shorter than this are added up several at a time, to fill vector registers.
_SHORT_ROW = 64


class Accumulators:
    """The statistics of every trial that one worker has seen so far."""

    def __init__(self, *, trials: int, names: Sequence[str], channel_axes: Sequence[int | None], bins: int) -> None:
        """Starts with nothing seen.

        Args:
            trials: number of trials.
            names: names of the tensors.
            channel_axes: the channel axis of each tensor; None where its channel means are not needed.
            bins: bins of each histogram, a power of two.
        """
        if len(channel_axes) != len(names):
            raise ValueError(f"{len(names)} tensors have {len(channel_axes)} channel axes; expected one for each.")
        self._names = names
        self._axes = channel_axes
        self._trials = trials
        # One array for all trials, so that the kernel writes to any of them.
        empty = empty_histograms(trials * len(names), bins=bins)
        shape = (trials, len(names))
        self._counts = empty.counts.reshape(*shape, bins)
        self._exponents = empty.exponents.reshape(shape)
        self._maxima = empty.maxima.reshape(shape)
        self._zeros = empty.zeros.reshape(shape)
        self._sums = [np.zeros((trials, 0), dtype=np.int64) for _ in names]
        self._images = np.zeros(trials, dtype=np.int64)
        self._tables = np.zeros((_TABLES, bins), dtype=np.uint32)

    def add_image_(self, trials: Sequence[int], image: str) -> "ImageObserver":
        """Counts an image in `trials` and returns what takes its tensors; `image` names it in messages."""
        chosen = np.array(trials, dtype=np.int64)
        self._images[chosen] += 1
        return ImageObserver(self, chosen, image)

    def add_tensor_(
        self, index: int, tensor: Float[np.ndarray, "..."], *, trials: Sequence[int] | np.ndarray, image: str
    ) -> None:
        """Adds the values of tensor `index` to the statistics of `trials`.

        Args:
            index: position of the tensor among the names.
            tensor: float32, of one image, in any memory layout; channels that vary fastest are read without a copy.
            trials: positions of the trials, at least one, each once.
            image: name of the image, for messages.

        Raises:
            CalibrationError: the tensor is empty, too large, or holds NaN or infinity.
        """
        if not 0 < tensor.size < 2**31:
            raise CalibrationError(
                f"Tensor {self._names[index]} has {tensor.size:,} values for image {image}; expected at least 1 and "
                "fewer than 2^31."
            )
        axis = self._axes[index]
        # A histogram does not depend on the order of the values, a channel sum does.
        ordered = _in_memory_order(tensor) if axis is None else np.moveaxis(tensor, axis, -1)
        values = np.ascontiguousarray(ordered, dtype=np.float32).reshape(-1)
        channels = 0 if axis is None else tensor.shape[axis]
        if self._sums[index].shape[1] != channels:
            self._sums[index] = np.zeros((self._trials, channels), dtype=np.int64)
        bits = _add_tensor(
            values,
            channels,
            index,
            np.asarray(trials, dtype=np.int64),
            self._counts,
            self._exponents,
            self._maxima,
            self._zeros,
            self._sums[index],
            self._tables,
        )
        if bits >= INFINITY_BITS:
            raise CalibrationError(
                f"Activation {self._names[index]} holds NaN or infinity for image {image}. Expected finite values. "
                "Check the checkpoint and the preprocessing (mean and std) with `ptq evaluate` first."
            )

    def statistics(self) -> list[tuple[Histograms, ChannelSums]]:
        """Returns the statistics of every trial; they are views, valid until the next image."""
        found = []
        for trial in range(self._trials):
            histograms = Histograms(
                self._counts[trial], self._exponents[trial], self._maxima[trial], self._zeros[trial]
            )
            images = int(self._images[trial])
            sums = ChannelSums(tuple(part[trial] for part in self._sums), images) if images else empty_channel_sums()
            found.append((histograms, sums))
        return found


class ImageObserver:
    """Takes the tensors of one image, in any order, each once."""

    def __init__(self, accumulators: Accumulators, trials: np.ndarray, image: str) -> None:
        self._accumulators = accumulators
        self._trials = trials
        self._image = image

    def __call__(self, index: int, tensor: Float[np.ndarray, "..."]) -> None:
        """Adds tensor `index`; see `Accumulators.add_tensor_`."""
        self._accumulators.add_tensor_(index, tensor, trials=self._trials, image=self._image)


def _in_memory_order(tensor: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The same values with the axes in the order of their strides, which of a permuted array is contiguous."""
    return tensor.transpose(sorted(range(tensor.ndim), key=lambda axis: -tensor.strides[axis]))


@intrinsic
def _store_nonzero_bins(typing_context, values, start, inverse_width, found, position):  # type: ignore[no-untyped-def]
    """Writes the bin numbers of those of 16 values that are not zero to `found` from `position`; returns how many.

    16 places are written, of which the first are meant. Vector compression has no Python form; where the processor
    lacks it, LLVM writes the values one by one. What lies a block further on is fetched into the cache meanwhile.
    """
    signature = types.int64(values, start, inverse_width, found, position)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, first, factor, target, place = arguments
        floats = ir.VectorType(ir.FloatType(), _LANES)
        integers = ir.VectorType(ir.IntType(32), _LANES)
        flags = ir.VectorType(ir.IntType(1), _LANES)
        data = context.make_array(signature.args[0])(context, builder, source).data
        bins = context.make_array(signature.args[3])(context, builder, target).data
        word = ir.IntType(32)
        ahead = builder.gep(data, [builder.add(first, ir.IntType(64)(_BLOCK))])
        prefetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [ahead.type, word, word, word]), "llvm.prefetch.p0"
        )
        # To be read, kept in all levels of the cache, data. An address behind the array is no fault.
        builder.call(prefetch, [ahead, word(0), word(3), word(1)])
        loaded = builder.load(builder.bitcast(builder.gep(data, [first]), integers.as_pointer()))
        loaded.align = 4
        magnitudes = builder.and_(loaded, ir.Constant(integers, [_MAGNITUDE] * _LANES))
        single = builder.insert_element(ir.Constant(floats, ir.Undefined), factor, ir.IntType(32)(0))
        factors = builder.shuffle_vector(single, ir.Constant(floats, ir.Undefined), ir.Constant(integers, [0] * _LANES))
        # Exact: multiplying by a power of two only changes the exponent.
        numbers = builder.fptosi(builder.fmul(builder.bitcast(magnitudes, floats), factors), integers)
        is_nonzero = builder.icmp_unsigned("!=", magnitudes, ir.Constant(integers, [0] * _LANES))
        compress = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(integers, [integers, flags, integers]),
            f"llvm.experimental.vector.compress.v{_LANES}i32",
        )
        packed = builder.call(compress, [numbers, is_nonzero, ir.Constant(integers, ir.Undefined)])
        stored = builder.store(packed, builder.bitcast(builder.gep(bins, [place]), integers.as_pointer()))
        stored.align = 4
        return builder.zext(builder.ctpop(builder.bitcast(is_nonzero, ir.IntType(_LANES))), ir.IntType(64))

    return signature, generate


@numba.njit(nogil=True, cache=True)
def _add_tensor(  # type: ignore[no-untyped-def]
    values, channels, tensor, trials, counts, exponents, maxima, zeros, sums, tables
):
    """Adds values to the statistics of `trials` and returns the bits of the largest |x|; not finite: adds nothing.

    `tables` are zero before and after. With channels, values are rows of one value per channel.
    """
    bins = tables.shape[1]
    bits = values.view(np.int32)
    # The finest width among the trials is the finest that may be needed; what has wider bins is coarsened at the end.
    exponent = exponents[trials[0], tensor]
    for trial in trials:
        exponent = min(exponent, exponents[trial, tensor])
    columns = _row_length(values.size, channels)
    totals = np.zeros(columns, dtype=np.float64)
    step = max(_BLOCK // columns, 1) * columns
    found = np.empty(step + _LANES, dtype=np.uint32)
    limit = _limit_bits(exponent, bins)
    inverse_width = np.float32(math.ldexp(1.0, -exponent))
    largest = np.int32(0)
    nonzero = 0
    start = 0
    while start < values.size:
        block = values[start : start + step]
        in_block = largest_bits(bits[start : start + step])
        if in_block >= limit:
            largest = largest_bits(bits)
            if largest >= INFINITY_BITS:
                tables[:] = 0
                return largest
            exponent = _exponent_for(largest, bins)
            limit = _limit_bits(exponent, bins)
            inverse_width = np.float32(math.ldexp(1.0, -exponent))
            tables[:] = 0
            totals[:] = 0
            nonzero = 0
            start = 0
            continue
        largest = max(largest, in_block)
        nonzero += _count_block(block, inverse_width, found, tables)
        if channels:
            _add_rows(block.reshape(block.size // columns, columns), totals)
        start += step
    used = _gather_tables(tables, math.ldexp(1.0, -exponent), largest)
    own = _exponent_for(largest, bins)
    tables[0, 0] += np.uint32(values.size - nonzero)
    for trial in trials:
        row = counts[trial, tensor]
        if exponents[trial, tensor] < own:
            _coarsen(row, own - exponents[trial, tensor])
            exponents[trial, tensor] = own
        shift = exponents[trial, tensor] - exponent
        if shift == 0:
            for index in range(used):
                row[index] += np.int64(tables[0, index])
        else:
            for index in range(used):
                row[index >> min(shift, 31)] += np.int64(tables[0, index])
        zeros[trial, tensor] += values.size - nonzero
    maximum = np.empty(1, dtype=np.int32)
    maximum[0] = largest
    for trial in trials:
        maxima[trial, tensor] = max(maxima[trial, tensor], maximum.view(np.float32)[0])
    tables[0, :used] = 0
    for channel in range(channels):
        total = 0.0
        for column in range(channel, columns, channels):
            total += totals[column]
        mean = np.int64(np.rint(total / (values.size // channels) / RESOLUTION))
        for trial in trials:
            sums[trial, channel] += mean
    return largest


@numba.njit(nogil=True, cache=True)
def _row_length(size, channels):  # type: ignore[no-untyped-def]
    """Columns in which values are added up: the channels, or a multiple of few channels that divides the values."""
    if channels == 0:
        return 1
    columns = channels
    while columns < _SHORT_ROW and (size // columns) % 2 == 0:
        columns *= 2
    return columns


@numba.njit(nogil=True, cache=True)
def _log2(bins):  # type: ignore[no-untyped-def]
    exponent = 0
    while (1 << exponent) < bins:
        exponent += 1
    return exponent


@numba.njit(nogil=True, cache=True)
def _exponent_for(bits, bins):  # type: ignore[no-untyped-def]
    """`histogram.exponent_for` of a value given by its bits; denormal values are below the least exponent."""
    return max((bits >> 23) - 126 - _log2(bins), MIN_EXPONENT)


@numba.njit(nogil=True, cache=True)
def _limit_bits(exponent, bins):  # type: ignore[no-untyped-def]
    """Bits of the value at the end of the last bin, of infinity if it is no float."""
    return np.int32(min(exponent + _log2(bins) + 127, 255) << 23)


@numba.njit(nogil=True, cache=True)
def _count_block(block, inverse_width, found, tables):  # type: ignore[no-untyped-def]
    """Adds the values that are not zero to the tables and returns how many they are."""
    first, second = tables[0], tables[1]
    one = np.uint32(1)
    length = 0
    whole = block.size // _LANES * _LANES
    for start in range(0, whole, _LANES):
        length += _store_nonzero_bins(block, start, inverse_width, found, length)
    for start in range(whole, block.size):
        if block[start] != 0:
            found[length] = np.uint32(abs(block[start]) * inverse_width)
            length += 1
    # Unsigned 64-bit indices: a signed one would be tested for being negative.
    for index in range(0, length // 2 * 2, 2):
        first[np.uint64(found[index])] += one
        second[np.uint64(found[index + 1])] += one
    if length % 2:
        first[np.uint64(found[length - 1])] += one
    return length


@numba.njit(nogil=True, cache=True)
def _add_rows(rows, totals):  # type: ignore[no-untyped-def]
    """Adds the rows to the totals in float64, in an order that depends on the shape alone."""
    fours = rows.shape[0] // 4 * 4
    for start in range(0, fours, 4):
        first, second, third, fourth = rows[start], rows[start + 1], rows[start + 2], rows[start + 3]
        for column in range(rows.shape[1]):
            totals[column] += (np.float64(first[column]) + np.float64(second[column])) + (
                np.float64(third[column]) + np.float64(fourth[column])
            )
    for start in range(fours, rows.shape[0]):
        row = rows[start]
        for column in range(rows.shape[1]):
            totals[column] += np.float64(row[column])


@numba.njit(nogil=True, cache=True)
def _gather_tables(tables, inverse_width, largest):  # type: ignore[no-untyped-def]
    """Adds the second table to the first, clears it, and returns how many bins can hold values."""
    maximum = np.empty(1, dtype=np.int32)
    maximum[0] = largest
    used = int(np.float64(maximum.view(np.float32)[0]) * inverse_width) + 1
    first, second = tables[0], tables[1]
    for index in range(used):
        first[index] += second[index]
    second[:used] = 0
    return used


@numba.njit(nogil=True, cache=True)
def _coarsen(row, doublings):  # type: ignore[no-untyped-def]
    """`histogram.coarsen` in place; every bin moves to itself or to one that was moved before."""
    for index in range(row.size):
        count = row[index]
        row[index] = 0
        row[index >> min(doublings, 31)] += count
