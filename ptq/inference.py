"""Which logits does a model give for many images?

Feeds prepared images to an engine, batch by batch. What the logits mean is `metrics`' business.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from ptq.data.images import network_input

Run = Callable[[Iterable[Float[np.ndarray, "n c h w"]]], Iterator[Float[np.ndarray, "n k"]]]


def logits_of(
    run: Run,
    pixels: Sequence[UInt8[np.ndarray, "n h w c"]],
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    progress: Callable[[int, int], None] | None = None,
) -> list[Float[np.ndarray, "n k"]]:
    """Returns the logits of every image of every array, float32, in order.

    Args:
        run: from normalized batches to their logits, as `Engine.logits` gives them.
        pixels: arrays of uint8 images, of one shape.
        batch_size: images per batch; a batch never spans two arrays.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        progress: called with (images done, images in all) after every batch.
    """
    places = [(part, start) for part, images in enumerate(pixels) for start in range(0, len(images), batch_size)]
    total, done = sum(map(len, pixels)), 0
    found: list[list[np.ndarray]] = [[] for _ in pixels]
    batches = (network_input(pixels[part][start : start + batch_size], mean=mean, std=std) for part, start in places)
    for (part, _), logits in zip(places, run(batches), strict=True):
        found[part].append(logits)
        done += len(logits)
        if progress:
            progress(done, total)
    return [np.concatenate(parts) for parts in found]
