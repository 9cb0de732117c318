"""How do calibration images become histograms, in one pass for every trial?

Each worker runs one image at a time through its own reader and adds the image's histograms to every trial that
drew it; the workers' parts are merged at the end. One image at a time keeps the forward pass independent of
any batch size, and the merge is exact, so the result does not depend on the order or the number of workers.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, UInt8

from ptq.errors import CalibrationError
from ptq.histogram import Histograms, add_, empty_histograms, histograms_of, merge
from ptq.images import network_input

Reader = Callable[[Float[np.ndarray, "1 c h w"]], Sequence[Float[np.ndarray, "..."]]]
Progress = Callable[[int, int], None]


def collect_statistics(
    readers: Sequence[Reader],
    pixels: UInt8[np.ndarray, "n h w c"],
    *,
    draws: Sequence[Sequence[int]],
    names: Sequence[str],
    image_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    bins: int,
    progress: Progress | None = None,
) -> list[Histograms]:
    """Returns the histograms of every trial, each over exactly the images it drew.

    Args:
        readers: one function per worker, from a normalized image (1, c, h, w) to one tensor per name.
        pixels: all calibration images, uint8.
        draws: per trial the positions in `pixels` of its images, each at most once.
        names: names of the observed tensors, in the order of the readers' results.
        image_names: a name per image of `pixels`, for messages.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        bins: bins of each histogram, a power of two.
        progress: called with (images done, images in all), at most ten times a second.

    Raises:
        CalibrationError: no image was drawn, or a tensor holds NaN or infinity.
    """
    trials_of: dict[int, list[int]] = {}
    for trial, draw in enumerate(draws):
        if len(set(draw)) != len(draw):
            raise ValueError(f"Trial {trial} draws an image twice.")
        for position in draw:
            trials_of.setdefault(int(position), []).append(trial)
    if not trials_of:
        raise CalibrationError("Calibration was asked for 0 images; set calibration.images to at least 1.")
    pending = iter(sorted(trials_of))
    lock = threading.Lock()
    done, reported = 0, 0.0

    def work(reader: Reader) -> list[Histograms]:
        nonlocal done, reported
        parts = [empty_histograms(len(names), bins=bins) for _ in draws]
        while True:
            with lock:
                position = next(pending, None)
            if position is None:
                return parts
            image = network_input(pixels[position : position + 1], mean=mean, std=std)
            found = histograms_of(reader(image), bins=bins, names=names, image=image_names[position])
            for trial in trials_of[position]:
                add_(parts[trial], found)
            with lock:
                done += 1
                if progress and (time.monotonic() - reported > 0.1 or done == len(trials_of)):
                    reported = time.monotonic()
                    progress(done, len(trials_of))

    with ThreadPoolExecutor(len(readers)) as pool:
        parts = list(pool.map(work, readers))
    merged = parts[0]
    for part in parts[1:]:
        merged = [merge(left, right) for left, right in zip(merged, part, strict=True)]
    return merged
