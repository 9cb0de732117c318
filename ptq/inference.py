"""Which logits does a model give for many images?

Feeds prepared images to a runner, batch by batch. What the logits mean is `metrics`' business.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from ptq.engines.interface import Runner
from ptq.images import network_input


def logits_of(
    runner: Runner,
    pixels: UInt8[np.ndarray, "n h w c"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "n k"]:
    """Returns the logits of every image, float32, in order.

    Args:
        runner: a loaded engine.
        pixels: uint8 images.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        progress: called with (images done, images in all) after every batch.
    """
    parts = []
    for start in range(0, len(pixels), runner.batch_size):
        images = network_input(pixels[start : start + runner.batch_size], mean=mean, std=std)
        parts.append(runner(images))
        if progress:
            progress(min(start + runner.batch_size, len(pixels)), len(pixels))
    return np.concatenate(parts)
