"""Which weight scales keep an INT8 layer right on a processor that adds its products in 16 bits?

Without VNNI, `vpmaddubsw` multiplies unsigned bytes by signed ones and adds two neighbouring products with signed
saturation (Intel 64 and IA-32 Software Developer's Manual, vol. 2): a pair sum beyond 32,767 is cut off, and the layer
computes something else than its graph says. Which inputs are neighbours was read off OpenVINO 2026.4.1 and ONNX Runtime
1.32 under AVX2, layer by layer: `neighbours`. Signed inputs are moved by 128 beforehand, so they too are factors of 0
to 255.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ptq.config import Dialect

# Whose kernels add two products in 16 bits.
Runtime = Literal["openvino", "onnxruntime"]
OPENVINO: tuple[Runtime, ...] = ("openvino",)
# What a signed 16-bit sum holds.
LARGEST_SUM = 2**15 - 1
# What an input holds, in steps, after a signed one was moved by `SHIFT`.
LARGEST_INPUT = 255
SHIFT = 128
# An engine may divide a weight by its scale in another order, which moves a weight that lies half-way between two
# steps. Twice what float32 can move it by.
_MARGIN = 1 + 2.0**-21
# Weights looked at together, to bound the memory.
_CHUNK = 2**22
_HALVINGS = 30
# Pairs of a channel among which the one is sought that decides its scale.
_WATCHED = 32


def runtimes_of(dialects: Iterable[Dialect]) -> tuple[Runtime, ...]:
    """Returns the runtimes with such kernels that dialects are for."""
    of_dialect: dict[Dialect, Runtime] = {"cpu": "openvino", "onnxruntime": "onnxruntime"}
    return tuple(of_dialect[dialect] for dialect in dialects if dialect in of_dialect)


def neighbours(
    inputs: int, positions: int, *, outputs: int, groups: int, runtimes: Collection[Runtime] = OPENVINO
) -> Int[np.ndarray, "pairs 2"]:
    """Returns which elements of an output channel's weights share a 16-bit sum, as positions in (inputs, positions).

    OpenVINO adds input channels 0 and 1, 2 and 3, ... at one position of the kernel; an odd last one is alone. To ONNX
    Runtime, and to OpenVINO where there are groups, a convolution is a matrix product over all positions, with the
    channels of one position side by side. A depthwise one has no pair.

    Args:
        inputs: input channels of a group.
        positions: positions of the kernel, 1 for a linear layer.
        outputs: output channels of a group.
        groups: groups of a convolution, else 1.
        runtimes: whose kernels; the pairs are those of any of them.

    >>> neighbours(3, 2, outputs=8, groups=1).tolist()
    [[0, 2], [1, 3]]
    >>> neighbours(3, 2, outputs=8, groups=2).tolist()
    [[0, 2], [4, 1], [3, 5]]
    >>> neighbours(3, 2, outputs=8, groups=1, runtimes=["onnxruntime"]).tolist()
    [[0, 2], [4, 1], [3, 5]]
    """
    grid = np.arange(inputs * positions).reshape(inputs, positions)
    if groups > 1 and inputs == outputs == 1:
        return np.zeros((0, 2), dtype=np.int64)
    found: dict[tuple[int, int], None] = {}
    for runtime in runtimes:
        if runtime == "openvino" and groups == 1:
            couples = grid[: inputs // 2 * 2].reshape(-1, 2, positions)
            pairs = couples.transpose(0, 2, 1).reshape(-1, 2)
        else:
            flat = grid.T.ravel()
            pairs = flat[: len(flat) // 2 * 2].reshape(-1, 2)
        found |= dict.fromkeys((int(one), int(other)) for one, other in pairs)
    return np.array(list(found), dtype=np.int64).reshape(-1, 2)


def _steps_of(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The integers, as float32, that an engine multiplies with, as QuantizeLinear defines them: (out, n)."""
    return np.clip(np.rint(weight / scale[:, None]), -128, 127)


def largest_sums(
    weight: Float[np.ndarray, "out inputs *kernel"],
    scale: Float[np.ndarray, " out"],
    largest_inputs: Int[np.ndarray, " channels"],
    *,
    groups: int,
    runtimes: Collection[Runtime] = OPENVINO,
) -> Float[np.ndarray, " out"]:
    """Returns the largest magnitude that a 16-bit sum of each output channel can reach; 0 where it has no pair.

    The arguments are those of `scales_without_saturation`.
    """
    found = np.zeros(len(weight), dtype=np.float32)
    for rows, flat, pairs, inputs in _chunks(weight, largest_inputs, groups, runtimes):
        found[rows] = _sums(_steps_of(flat, scale[rows]), pairs, inputs).max(axis=1)
    return found


def scales_without_saturation(
    weight: Float[np.ndarray, "out inputs *kernel"],
    scale: Float[np.ndarray, " out"],
    largest_inputs: Int[np.ndarray, " channels"],
    *,
    groups: int,
    runtimes: Collection[Runtime] = OPENVINO,
) -> Float[np.ndarray, " out"]:
    """Returns the scales, float32, each as it was or as little larger as keeps every 16-bit sum from saturating.

    Args:
        weight: float32, output channels first; (out, inputs of a group, ...).
        scale: the scale that each output channel has now.
        largest_inputs: per input channel of the layer the largest factor, in steps: 255 for any input at all.
        groups: groups of a convolution, else 1.
        runtimes: whose kernels are to be right.
    """
    found = np.array(scale, dtype=np.float32)
    for rows, flat, pairs, inputs in _chunks(weight, largest_inputs, groups, runtimes):
        found[rows] = _grown(flat, found[rows], pairs, inputs)
    return found


def count_saturated(
    steps: Float[np.ndarray, "out inputs kh kw"],
    inputs: Float[np.ndarray, "n channels h w"],
    *,
    strides: tuple[int, int],
    dilations: tuple[int, int],
    groups: int,
    runtime: Runtime = "openvino",
) -> tuple[int, int]:
    """Returns how many 16-bit sums of a convolution saturate at these inputs, and how many sums there are.

    Args:
        steps: integers of the weights, as float32, output channels first.
        inputs: the factors as the engine has them, as float32: padded, signed ones moved by `SHIFT`.
        strides: rows and columns from one output to the next.
        dilations: rows and columns from one position of the kernel to the next.
        groups: groups of the convolution; 1 for a linear layer, which is one with a kernel of one position.
        runtime: whose kernels.
    """
    outputs, width, *kernel = steps.shape
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(inputs, reach, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    pairs = neighbours(width, kernel[0] * kernel[1], outputs=outputs // groups, groups=groups, runtimes=[runtime])
    flat, places = steps.reshape(groups, outputs // groups, -1), windows[:, 0, :, :, 0, 0].size
    saturated = 0
    for group, weights in enumerate(flat):
        can = _magnitude(*(LARGEST_INPUT * weights[:, pairs[:, side]] for side in (0, 1))) > LARGEST_SUM
        for pair in np.flatnonzero(can.any(axis=0)):
            sums = np.zeros((int(can[:, pair].sum()), places), dtype=np.float32)
            for element in pairs[pair]:
                channel, row, column = np.unravel_index(element, (width, *kernel))
                factors = windows[:, group * width + channel, :, :, row, column].reshape(1, -1)
                sums += weights[can[:, pair], element, None] * factors
            saturated += int(((sums > LARGEST_SUM) | (sums < -LARGEST_SUM - 1)).sum())
    return saturated, outputs * len(pairs) * places


def _chunks(
    weight: Float[np.ndarray, "out inputs *kernel"],
    largest_inputs: Int[np.ndarray, " channels"],
    groups: int,
    runtimes: Collection[Runtime],
) -> Iterator[tuple[slice, Float[np.ndarray, "rows n"], Int[np.ndarray, "pairs 2"], Float[np.ndarray, "rows n"]]]:
    """Parts of a layer that has pairs: output channels, their weights, the pairs, the largest factor of each weight."""
    outputs, inputs = weight.shape[:2]
    positions = int(np.prod(weight.shape[2:]))
    pairs = neighbours(inputs, positions, outputs=outputs // groups, groups=groups, runtimes=runtimes)
    if not len(pairs):
        return
    flat = np.ascontiguousarray(weight, dtype=np.float32).reshape(outputs, -1)
    of_groups = np.repeat(largest_inputs.reshape(groups, inputs).astype(np.float32), positions, axis=1)
    group_of = np.arange(outputs) // (outputs // groups)
    count = max(_CHUNK // flat.shape[1], 1)
    for start in range(0, outputs, count):
        rows = slice(start, start + count)
        yield rows, flat[rows], pairs, of_groups[group_of[rows]]


def _grown(
    weight: Float[np.ndarray, "out n"],
    scale: Float[np.ndarray, " out"],
    pairs: Int[np.ndarray, "pairs 2"],
    inputs: Float[np.ndarray, "out n"],
) -> Float[np.ndarray, " out"]:
    """The scales at which no pair of any channel saturates, found on the pairs that can do most."""
    grown = scale.copy()
    while True:
        rows = np.flatnonzero(_sums(_steps_of(weight, grown), pairs, inputs).max(axis=1) > LARGEST_SUM)
        if not rows.size:
            return grown
        count = min(_WATCHED, len(pairs))
        of_real = _sums(weight[rows], pairs, inputs[rows])
        watched = pairs[np.argpartition(of_real, -count, axis=1)[:, -count:]]
        sides = [
            [np.take_along_axis(values[rows], watched[..., side], axis=1) for values in (weight, inputs)]
            for side in (0, 1)
        ]
        grown[rows] = _halved(grown[rows], np.array(sides[0]), np.array(sides[1]))


def _halved(
    scale: Float[np.ndarray, " out"],
    first: Float[np.ndarray, "2 out pairs"],
    second: Float[np.ndarray, "2 out pairs"],
) -> Float[np.ndarray, " out"]:
    """Halves the interval in which a channel's scale stops to saturate; `first` and `second` are weights and inputs."""

    def saturates(candidate: np.ndarray) -> np.ndarray:
        products = [_steps_of(weight, candidate.astype(np.float32)) * inputs for weight, inputs in (first, second)]
        return _magnitude(*products).max(axis=1) > LARGEST_SUM

    widest = np.maximum(np.abs(first[0]), np.abs(second[0])).max(axis=1)
    below = scale.astype(np.float64)
    # Two inputs of 255 and two weights of at most 64 steps stay within the sum.
    above = np.maximum(2 * below, widest / 63.5)
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        below, above = np.where(saturates(middle), (middle, above), (below, middle))
    return (above * _MARGIN).astype(np.float32)


def _sums(
    factors: Float[np.ndarray, "out n"], pairs: Int[np.ndarray, "pairs 2"], inputs: Float[np.ndarray, "out n"]
) -> Float[np.ndarray, "out pairs"]:
    """The largest magnitude that each pair can reach."""
    products = factors * inputs
    return _magnitude(products[:, pairs[:, 0]], products[:, pairs[:, 1]])


def _magnitude(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(out, pairs). Inputs may be anything up to their largest: products of unlike signs do not make up for another."""
    return np.maximum(np.maximum(first, 0) + np.maximum(second, 0), np.maximum(-first, 0) + np.maximum(-second, 0))
