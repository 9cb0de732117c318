"""How do calibration images become histograms, in one pass for every trial?

Each worker runs one image at a time through its own reader and adds the image's histograms to every trial that
drew it; the workers' parts are merged at the end. One image at a time keeps the forward pass independent of
any batch size, and the merge is exact, so the result does not depend on the order or the number of workers.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from ptq.data.images import network_input
from ptq.engines.base import StreamingReader
from ptq.errors import CalibrationError
from ptq.numerics.bias_correction import ChannelSums, merge_channel_sums
from ptq.numerics.histogram import Histograms, merge
from ptq.numerics.histogram_kernel import Accumulators
from ptq.records.base import Progress


@dataclass(frozen=True, slots=True)
class TrialStatistics:
    """What one trial's images left: a histogram per tensor, and channel sums of the tensors that layers read."""

    histograms: Histograms
    channel_sums: ChannelSums


Reader = Callable[[Float[np.ndarray, "1 c h w"]], Sequence[Float[np.ndarray, "..."]]]


def collect_statistics(
    readers: Sequence[Reader],
    pixels: UInt8[np.ndarray, "n h w c"],
    *,
    draws: Sequence[Sequence[int]],
    names: Sequence[str],
    channel_axes: Sequence[int | None],
    image_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    bins: int,
    progress: Progress | None = None,
) -> list[TrialStatistics]:
    """Returns the statistics of every trial, each over exactly the images it drew.

    Args:
        readers: one function per worker, from a normalized image (1, c, h, w) to one tensor per name. One that streams
            is asked to do so.
        pixels: all calibration images, uint8.
        draws: per trial the positions in `pixels` of its images, each at most once.
        names: names of the observed tensors, in the order of the readers' results.
        channel_axes: the channel axis of each tensor; None where its channel means are not needed.
        image_names: a name per image of `pixels`, for messages.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        bins: bins of each histogram, a power of two.
        progress: called with (images done, images in all), at most ten times a second.

    Raises:
        CalibrationError: no image was drawn, or a tensor holds NaN or infinity.
    """
    trials_of = trials_by_image(draws)
    pending = iter(trials_of)
    lock = threading.Lock()
    done, reported = 0, 0.0

    def work(reader: Reader) -> list[TrialStatistics]:
        nonlocal done, reported
        found = Accumulators(trials=len(draws), names=names, channel_axes=channel_axes, bins=bins)
        while True:
            with lock:
                position = next(pending, None)
            if position is None:
                return [TrialStatistics(*pair) for pair in found.statistics()]
            image = network_input(pixels[position : position + 1], mean=mean, std=std)
            observe = found.add_image_(trials_of[position], image_names[position])
            if isinstance(reader, StreamingReader):
                reader.stream(image, observe)
            else:
                for index, tensor in zip(range(len(names)), reader(image), strict=True):
                    observe(index, tensor)
            with lock:
                done += 1
                if progress and (time.monotonic() - reported > 0.1 or done == len(trials_of)):
                    reported = time.monotonic()
                    progress(done, len(trials_of))

    with ThreadPoolExecutor(len(readers)) as pool:
        parts = list(pool.map(work, readers))
    merged = parts[0]
    for part in parts[1:]:
        merged = [merge_statistics(left, right) for left, right in zip(merged, part, strict=True)]
    return merged


def trials_by_image(draws: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Returns the trials that drew each image, by its position, ascending; images that no trial drew are left out.

    Raises:
        CalibrationError: no image was drawn.
        ValueError: a trial draws an image twice.

    >>> trials_by_image([[4, 1], [1]])
    {1: [0, 1], 4: [0]}
    """
    trials_of: dict[int, list[int]] = {}
    for trial, draw in enumerate(draws):
        if len(set(draw)) != len(draw):
            raise ValueError(f"Trial {trial} draws an image twice.")
        for position in draw:
            trials_of.setdefault(int(position), []).append(trial)
    if not trials_of:
        raise CalibrationError("Calibration was asked for 0 images; set calibration.images to at least 1.")
    return dict(sorted(trials_of.items()))


def merge_statistics(left: TrialStatistics, right: TrialStatistics) -> TrialStatistics:
    """Returns the statistics of the images of both: exact, commutative, associative."""
    return TrialStatistics(
        merge(left.histograms, right.histograms), merge_channel_sums(left.channel_sums, right.channel_sums)
    )
