"""How are calibration statistics collected on a GPU without waiting for it?

The same statistics as `collection` gives, computed by torch where the activations are. Widths are chosen, bins added
pairwise and trials fed by integer arithmetic on the device, so that the host never asks for a value while images
are running; it looks at the flags of values that are not finite once per `CHECK_EVERY` batches, and fetches
everything once at the end. Given the same tensors, the histograms have the same bits as `histogram.histograms_of`
and `add_` give, for any batch size. Channel sums are float64 sums rounded to `RESOLUTION` per image, as
`bias_correction.channel_sums_of` has them: equal wherever the float64 sum is exact, otherwise the order of the sum
can move one image's mean by one `RESOLUTION`.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ptq.calibration.statistics import TrialStatistics, trials_by_image
from ptq.data.images import network_input
from ptq.errors import CalibrationError
from ptq.numerics.bias_correction import RESOLUTION, ChannelSums, empty_channel_sums
from ptq.numerics.histogram import MIN_EXPONENT, Histograms
from ptq.records.base import Progress

# Batches between two looks at the flags of values that are not finite; each look waits for the device.
CHECK_EVERY = 256

_MAGNITUDE = 0x7FFFFFFF
_LARGEST_FINITE = 0x7F7FFFFF
_MANTISSA_BITS = 23
_BIAS = 127


class DeviceStatistics:
    """Accumulates the statistics of several trials on one device.

    Every method but `check_finite` and `trials` only queues work: nothing in them depends on a value that the device
    has yet to compute.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        channel_axes: Sequence[int | None],
        image_names: Sequence[str],
        trials: int,
        bins: int,
        device: torch.device,
    ) -> None:
        """Reserves the histograms.

        Args:
            names: names of the observed tensors.
            channel_axes: the channel axis of each tensor; None where its channel means are not needed.
            image_names: a name per image, in the order in which `add_` will see them.
            trials: number of trials.
            bins: bins of each histogram, a power of two, at least 4.
            device: where the tensors will be.
        """
        if bins < 4 or bins & (bins - 1):
            raise ValueError(f"bins must be a power of two of at least 4, got {bins}.")
        self._names, self._axes, self._image_names = tuple(names), tuple(channel_axes), tuple(image_names)
        self._bins, self._trials, self._device = bins, trials, device
        self._seen = 0
        shape = (len(names), trials)
        self._counts = torch.zeros(*shape, bins, dtype=torch.int64, device=device)
        self._exponents = torch.full(shape, MIN_EXPONENT, dtype=torch.int32, device=device)
        self._maxima = torch.zeros(shape, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(shape, dtype=torch.int64, device=device)
        self._images = torch.zeros(trials, dtype=torch.int64, device=device)
        self._not_finite = torch.zeros(len(names), len(image_names), dtype=torch.bool, device=device)
        self._sums: list[Tensor | None] = [None] * len(names)
        self._bin = torch.arange(bins, dtype=torch.int64, device=device)

    def add_(self, tensors: Sequence[Float[Tensor, "..."]], drawn: Int[Tensor, "n trials"]) -> None:
        """Queues the addition of the next images.

        Args:
            tensors: on the device, one per name, images along the first axis. A tensor of a single image may have
                any shape.
            drawn: int64 on the device, 1 where a trial drew the image, else 0.

        Raises:
            CalibrationError: a tensor is empty, has 2^31 values or more per image, or does not have the images along
                its first axis.
        """
        images = drawn.shape[0]
        for index, tensor in enumerate(tensors):
            self._check_shape(index, tensor, images=images)
            self._add_histogram_(index, tensor.float().reshape(images, -1).contiguous(), drawn)
            axis = self._axes[index]
            if axis is not None:
                self._add_channel_sums_(index, tensor[:images], axis, drawn)
        self._images += drawn.sum(0)
        self._seen += images

    def check_finite(self) -> None:
        """Waits for the device and raises CalibrationError if a value was not finite, naming layer and image."""
        flags = self._not_finite[:, : self._seen].cpu().numpy()
        if flags.any():
            image = int(flags.any(axis=0).argmax())
            raise CalibrationError(
                f"Activation {self._names[int(flags[:, image].argmax())]} holds NaN or infinity for image "
                f"{self._image_names[image]}. Expected finite values. Check the checkpoint and the preprocessing (mean "
                "and std) with `ptq evaluate` first."
            )

    def trials(self) -> list[TrialStatistics]:
        """Waits for the device and returns the statistics of every trial.

        Raises:
            CalibrationError: a value was not finite.
        """
        self.check_finite()
        counts, exponents, zeros = (part.cpu().numpy() for part in (self._counts, self._exponents, self._zeros))
        maxima = self._maxima.cpu().numpy().view(np.float32)
        sums = [None if part is None else part.cpu().numpy() for part in self._sums]
        images = self._images.cpu().tolist()
        found = []
        for trial in range(self._trials):
            histograms = Histograms(
                np.ascontiguousarray(counts[:, trial]),
                exponents[:, trial].copy(),
                maxima[:, trial].copy(),
                zeros[:, trial].copy(),
            )
            rows = tuple(np.zeros(0, dtype=np.int64) if part is None else part[trial].copy() for part in sums)
            channel_sums = ChannelSums(rows, images[trial]) if images[trial] else empty_channel_sums()
            found.append(TrialStatistics(histograms, channel_sums))
        return found

    def _check_shape(self, index: int, tensor: Tensor, *, images: int) -> None:
        name, shape = self._names[index], tuple(tensor.shape)
        if tensor.numel() == 0:
            raise CalibrationError(f"Tensor {name} is empty: its shape is {shape}; expected at least one value.")
        if tensor.numel() >= images * 2**31:
            raise CalibrationError(
                f"Tensor {name} has {tensor.numel():,} values for {images} images; expected fewer than 2^31 per image."
            )
        if images > 1 and shape[:1] != (images,):
            raise CalibrationError(
                f"Tensor {name} has shape {shape} for {images} images; expected the images along the first axis. "
                "Collect with batch_size 1."
            )

    def _add_histogram_(self, index: int, values: Float[Tensor, "n values"], drawn: Int[Tensor, "n trials"]) -> None:
        bits = values.view(torch.int32) & _MAGNITUDE
        peak = bits.amax(1)
        slots = slice(self._seen, self._seen + values.shape[0])
        self._not_finite[index, slots] = peak > _LARGEST_FINITE
        # What is not finite is an error later; until then it must not lead outside the bins.
        bits, peak = bits.clamp(max=_LARGEST_FINITE), peak.clamp(max=_LARGEST_FINITE)
        # As `exponent_for`: |x| with the biased exponent k lies in [2^(k-127), 2^(k-126)), or below if k is 0.
        bin_bits = self._bins.bit_length() - 1
        exponents = ((peak >> _MANTISSA_BITS) - (_BIAS - 1) - bin_bits).clamp(min=MIN_EXPONENT)
        inverse_widths = ((_BIAS - exponents) << _MANTISSA_BITS).view(torch.float32)
        # Exact: multiplying by a power of two only changes the exponent.
        bins_of = (bits.view(torch.float32) * inverse_widths[:, None]).long()
        counts = torch.zeros(values.shape[0], self._bins, dtype=torch.int64, device=self._device)
        counts.scatter_add_(1, bins_of, torch.ones_like(bins_of))
        self._merge_(index, counts, exponents, drawn)
        has_drawn = drawn.bool()
        peaks = torch.where(has_drawn, peak[:, None], torch.zeros_like(peak)[:, None]).amax(0)
        self._maxima[index] = torch.maximum(self._maxima[index], peaks)
        self._zeros[index] += ((bits == 0).sum(1)[:, None] * drawn).sum(0)

    def _merge_(
        self, index: int, counts: Int[Tensor, "n bins"], exponents: Int[Tensor, " n"], drawn: Int[Tensor, "n trials"]
    ) -> None:
        """Adds the images' counts to the trials that drew them, in the coarsest width of both, as `histogram.add_`."""
        before = self._exponents[index]
        lowest = torch.full_like(exponents, MIN_EXPONENT)
        drawn_exponents = torch.where(drawn.bool(), exponents[:, None], lowest[:, None])
        after = torch.maximum(before, drawn_exponents.amax(0))
        merged = torch.zeros_like(self._counts[index])
        merged.scatter_add_(1, self._coarse_bins(after - before), self._counts[index])
        doublings = (after[:, None] - exponents[None, :]).clamp(min=0)
        # Images that a trial did not draw count 0 times.
        weighted = counts[None] * drawn.T[:, :, None]
        merged.scatter_add_(1, self._coarse_bins(doublings).flatten(1), weighted.flatten(1))
        self._counts[index] = merged
        self._exponents[index] = after

    def _coarse_bins(self, doublings: Int[Tensor, "..."]) -> Int[Tensor, "... bins"]:
        """Returns where each bin goes when the width doubles so many times."""
        return self._bin >> doublings.clamp(max=62).long()[..., None]

    def _add_channel_sums_(
        self, index: int, tensor: Float[Tensor, "n ..."], axis: int, drawn: Int[Tensor, "n trials"]
    ) -> None:
        rows = tensor.movedim(axis, 1).flatten(2) if tensor.ndim > 2 else tensor[:, :, None]
        # A tensor as divisor: by a number, CUDA would multiply with its rounded reciprocal.
        length = torch.full((), rows.shape[2], dtype=torch.float64, device=self._device)
        means = rows.double().sum(2) / length
        units = torch.round(means * (1 / RESOLUTION)).long()
        added = (units[None] * drawn.T[:, :, None]).sum(1)
        previous = self._sums[index]
        self._sums[index] = added if previous is None else previous + added


def collect_statistics_on_device(
    observed: nn.Module,
    pixels: UInt8[np.ndarray, "n h w c"],
    *,
    draws: Sequence[Sequence[int]],
    names: Sequence[str],
    channel_axes: Sequence[int | None],
    image_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    bins: int,
    device: str = "cuda",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[TrialStatistics]:
    """Returns what `collection.collect_statistics` returns, the model and the counting run by torch on a device.

    Args:
        observed: model of `observed.observed_from_folded`: logits, then one tensor per name. It is not changed.
        pixels: all calibration images, uint8.
        draws: per trial the positions in `pixels` of its images, each at most once.
        names: names of the observed tensors.
        channel_axes: the channel axis of each tensor; None where its channel means are not needed.
        image_names: a name per image of `pixels`, for messages.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        bins: bins of each histogram, a power of two.
        device: a torch device.
        batch_size: images per forward pass. Only 1 makes the activations, and so every bit of the result,
            independent of it: the float kernels of a device round differently for other batch sizes.
        progress: called with (images queued, images in all), at most ten times a second.

    Raises:
        CalibrationError: no image was drawn, a tensor holds NaN or infinity, or, in batches, a tensor does not have
            the images along its first axis.
    """
    positions, drawn = _membership(draws)
    place = torch.device(device)
    model = copy.deepcopy(observed).eval().to(place)
    statistics = DeviceStatistics(
        names=names,
        channel_axes=channel_axes,
        image_names=[image_names[position] for position in positions],
        trials=len(draws),
        bins=bins,
        device=place,
    )
    reported = 0.0
    full_precision = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), full_precision, _MatmulWithoutTf32():
        for batch, start in enumerate(range(0, len(positions), batch_size)):
            end = min(start + batch_size, len(positions))
            images = network_input(pixels[positions[start:end]], mean=mean, std=std)
            _, *tensors = model(_on_device(images, place))
            statistics.add_(tensors, _on_device(drawn[start:end], place))
            if (batch + 1) % CHECK_EVERY == 0:
                statistics.check_finite()
            if progress and (time.monotonic() - reported > 0.1 or end == len(positions)):
                reported = time.monotonic()
                progress(end, len(positions))
        return statistics.trials()


class _MatmulWithoutTf32:
    """Turns TF32 off in matrix products for a while; convolutions have a switch of their own."""

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *details: Any) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before


def _membership(draws: Sequence[Sequence[int]]) -> tuple[list[int], Int[np.ndarray, "n trials"]]:
    """The positions drawn by any trial, ascending, and 1 where a trial drew one."""
    trials_of = trials_by_image(draws)
    drawn = np.zeros((len(trials_of), len(draws)), dtype=np.int64)
    for row, trials in enumerate(trials_of.values()):
        drawn[row, trials] = 1
    return list(trials_of), drawn


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; from pinned memory, so that the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
