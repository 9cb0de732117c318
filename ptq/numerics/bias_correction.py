"""How far does rounding the weights move the mean of a layer's output, and how is that undone?

Rounded weights W' give each output channel the systematic error sum((W' - W) * E[x]), which the bias can take
back. E[x] per input channel comes from the calibration pass, as integers, so that it merges exactly like the
histograms do. Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction
(2019), section 4.2, with the mean measured instead of derived from BatchNorm; borders of padded convolutions
count like the inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from jaxtyping import Float, Int

# Means are kept as integer multiples of this, so that their sum does not depend on the order of the images.
RESOLUTION = 2.0**-32


@dataclass(frozen=True, slots=True)
class ChannelSums:
    """Sums over images of the mean activation per channel, in units of `RESOLUTION`, and the number of images.

    `sums[t]` is int64 (channels of tensor t,), empty for a tensor that no weighted layer reads.
    """

    sums: tuple[Int[np.ndarray, " _"], ...]
    images: int

    def means(self) -> list[Float[np.ndarray, " _"]]:
        """Returns the mean per channel of every tensor, in activation units."""
        return [values * (RESOLUTION / max(self.images, 1)) for values in self.sums]


def channel_sums_of(tensors: Sequence[Float[np.ndarray, "1 ..."]], *, axes: Sequence[int | None]) -> ChannelSums:
    """Returns the channel sums of one image.

    Args:
        tensors: float32, the observed tensors of one image.
        axes: the channel axis of each; None for a tensor that is not needed.
    """
    sums = []
    for tensor, axis in zip(tensors, axes, strict=True):
        if axis is None:
            sums.append(np.zeros(0, dtype=np.int64))
            continue
        channels_first = np.ascontiguousarray(np.moveaxis(tensor[0], axis if axis < 0 else axis - 1, 0))
        rows = channels_first.reshape(len(channels_first), -1)
        sums.append(np.rint(_row_means(rows) / RESOLUTION).astype(np.int64))
    return ChannelSums(tuple(sums), 1)


# Reassociation lets the sum use vector registers; the result is rounded to RESOLUTION afterwards.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _row_means(rows):  # type: ignore[no-untyped-def]
    means = np.empty(rows.shape[0], dtype=np.float64)
    for row in range(rows.shape[0]):
        total = 0.0
        for column in range(rows.shape[1]):
            total += rows[row, column]
        means[row] = total / rows.shape[1]
    return means


def merge_channel_sums(left: ChannelSums, right: ChannelSums) -> ChannelSums:
    """Returns the channel sums of the images of both; exact, commutative and associative.

    >>> one = ChannelSums((np.array([2**32]),), 1)
    >>> merge_channel_sums(one, ChannelSums((np.array([2**33]),), 1)).means()[0].tolist()
    [1.5]
    """
    if not left.sums:
        return right
    if not right.sums:
        return left
    return ChannelSums(
        tuple(first + second for first, second in zip(left.sums, right.sums, strict=True)), left.images + right.images
    )


def empty_channel_sums() -> ChannelSums:
    """Returns the channel sums of no image: the neutral element of `merge_channel_sums`."""
    return ChannelSums((), 0)


def bias_shift(
    weight: Float[np.ndarray, "..."],
    scale: Float[np.ndarray, "..."],
    mean: Float[np.ndarray, " inputs"],
    *,
    axis: int,
    groups: int,
) -> Float[np.ndarray, " out"]:
    """Returns what has to be added to a layer's bias to undo the mean error of its rounded weights.

    Args:
        weight: float32, Conv (out, in / groups, ...), ConvTranspose (in, out / groups, ...) or Linear (out, in).
        scale: scale per output channel (out,), or one scale ().
        mean: mean of each input channel, in activation units.
        axis: the output-channel axis of the weight.
        groups: groups of a convolution, else 1.

    Returns:
        float64 (out,), in units of the output.

    >>> bias_shift(np.array([[0.9]]), np.array([0.5]), np.array([10.0]), axis=0, groups=1).round(3).tolist()
    [-1.0]
    """
    shape = [1] * weight.ndim
    shape[axis] = -1
    steps = np.asarray(scale, dtype=np.float64).reshape(shape if np.ndim(scale) else ())
    exact = weight.astype(np.float64)
    error = exact - np.clip(np.rint(exact / steps), -128, 127) * steps
    error = error.reshape(*error.shape[:2], -1).sum(axis=2)
    # A group is a run of consecutive rows: outputs of a Conv, inputs of a ConvTranspose.
    parts = [part.T if axis == 1 else part for part in np.split(error, groups, axis=0)]
    return np.concatenate([part @ inputs for part, inputs in zip(parts, np.split(mean, groups), strict=True)])
