"""How is calibration split into shards that several machines collect, and put together again?

A shard is a contiguous part of the images that any trial drew. Histograms and channel sums are integers and merge
exactly, so the statistics of all shards together have the same bits as those collected in one piece, whatever the
number of shards. No network is run here.
"""

import io
from collections.abc import Iterable, Sequence

import numpy as np

from ptq.calibration.statistics import TrialStatistics, merge_statistics, trials_by_image
from ptq.numerics.bias_correction import ChannelSums, empty_channel_sums
from ptq.numerics.histogram import Histograms


def draws_of_shard(draws: Sequence[Sequence[int]], *, shard: int, shards: int) -> tuple[tuple[int, ...], ...]:
    """Returns those images of every trial's draw that belong to one shard, in the order of the draw.

    Args:
        draws: per trial the positions of its images, each at most once.
        shard: number of the shard, from 0.
        shards: number of shards, at most the number of different images, so that none is empty.

    Raises:
        ValueError: there is no such shard, or more shards than images.

    >>> [draws_of_shard([[4, 1], [1, 7]], shard=shard, shards=2) for shard in range(2)]
    [((4, 1), (1,)), ((), (7,))]
    """
    positions = list(trials_by_image(draws))
    if not 0 <= shard < shards <= len(positions):
        raise ValueError(
            f"Shard {shard} of {shards} was asked for over {len(positions)} images; expected at least one image for "
            "each shard, and shards numbered from 0."
        )
    # The first shards take one image more where the images do not divide.
    part = set(np.array_split(positions, shards)[shard].tolist())
    return tuple(tuple(position for position in draw if position in part) for draw in draws)


def bytes_from_shard(trials: Sequence[TrialStatistics]) -> bytes:
    """Returns the statistics of every trial as one compressed npz file without pickles, with deterministic bytes."""
    arrays: dict[str, np.ndarray] = {}
    for index, trial in enumerate(trials):
        found, sums = trial.histograms, trial.channel_sums
        arrays |= {f"{index}.{field}": getattr(found, field) for field in ("counts", "exponents", "maxima", "zeros")}
        arrays[f"{index}.images"] = np.array(sums.images, dtype=np.int64)
        arrays |= {f"{index}.sums.{tensor}": values for tensor, values in enumerate(sums.sums)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def shard_from_bytes(data: bytes) -> list[TrialStatistics]:
    """Returns what `bytes_from_shard` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as content:
        arrays = dict(content)
    trials: list[TrialStatistics] = []
    while f"{len(trials)}.counts" in arrays:
        index = len(trials)
        histograms = Histograms(*(arrays[f"{index}.{field}"] for field in ("counts", "exponents", "maxima", "zeros")))
        tensors = sum(name.startswith(f"{index}.sums.") for name in arrays)
        sums = tuple(arrays[f"{index}.sums.{tensor}"] for tensor in range(tensors))
        channel_sums = ChannelSums(sums, int(arrays[f"{index}.images"])) if sums else empty_channel_sums()
        trials.append(TrialStatistics(histograms, channel_sums))
    return trials


def merge_shards(shards: Iterable[bytes]) -> list[TrialStatistics]:
    """Returns the statistics of every trial over the images of all shards: exact, whatever their order.

    Args:
        shards: files of `bytes_from_shard`, at least one, read one at a time.

    Raises:
        ValueError: there is no shard, or two hold different numbers of trials, tensors or bins.
    """
    merged: list[TrialStatistics] = []
    for data in shards:
        part = shard_from_bytes(data)
        merged = [merge_statistics(*pair) for pair in zip(merged, part, strict=True)] if merged else part
    if not merged:
        raise ValueError("No shard was given; expected at least one.")
    return merged
