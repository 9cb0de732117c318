"""Which factor does each channel get, so that the channels of a tensor have ranges of one size?

The part of equalization that does not know how a network is written down: channels are numbers, and whoever walks a
graph says which of them are one, which are tied and which are fixed. Sources are named in `equalization`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# A factor is the inverse of the relative range to this power: half of the difference is given to the next weights.
STRENGTH = 0.5
# Channels narrower than this share of the widest are scaled as if they had it.
NARROWEST = 1 / 64
# A scaled channel stays below a clip, as ReLU6 has, by this factor over what was seen.
CLIP_MARGIN = 1.25

Ids = Int[np.ndarray, " channels"]


class ChannelIds:
    """Which channels of which tensors must have one factor, and which cannot have any.

    Every channel of a new tensor gets an id; operations that a factor passes through keep it, an addition ties
    the ids of its operands, and what a factor cannot pass fixes them.

    Attributes:
        of: the ids of the channels of every tensor, by name.
    """

    def __init__(self) -> None:
        self.of: dict[str, Ids] = {}
        self._count = 0
        self._ties: list[tuple[Ids, Ids]] = []
        self._fixed: list[Ids] = []
        self._clips: list[tuple[Ids, float]] = []

    def new(self, count: int) -> Ids:
        """Returns ids for the channels of a new tensor."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def tie(self, left: Ids, right: Ids) -> None:
        """Notes that channels of two tensors need the same factors, one by one."""
        self._ties.append((left, right))

    def clip(self, ids: Ids, limit: float) -> None:
        """Notes that channels are clipped at `limit`, in activation units, so that they may not grow beyond it."""
        self._clips.append((ids, limit))

    def fix(self, name: str) -> None:
        """Notes that the channels of a tensor keep factor 1; nothing where the tensor has none."""
        if name in self.of:
            self._fixed.append(self.of[name])

    def factors(self, ranges: Mapping[str, Float[np.ndarray, " _"]]) -> Float[np.ndarray, " ids"]:
        """Returns the factor of every id: a power of two, 1 where it is fixed or nothing was seen of it."""
        pairs = np.concatenate([np.zeros((2, 0), dtype=np.int64), *(np.stack(tie) for tie in self._ties)], axis=1)
        graph = coo_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(self._count, self._count))
        groups, group_of = connected_components(graph, directed=False)
        relative, widest = np.zeros(groups), np.zeros(groups)
        for name, ids in self.of.items():
            seen = ranges.get(name)
            if seen is None or len(seen) != len(ids) or not seen.max() > 0:
                continue
            # Tensors that share channels, as along a residual stream, are served by their widest share.
            np.maximum.at(relative, group_of[ids], seen / seen.max())
            np.maximum.at(widest, group_of[ids], seen)
        wanted = np.where(relative > 0, np.maximum(relative, NARROWEST), 1.0) ** -STRENGTH
        for ids, clip in self._clips:
            room = clip / np.maximum(widest[group_of[ids]] * CLIP_MARGIN, np.finfo(np.float32).tiny)
            np.minimum.at(wanted, group_of[ids], np.exp2(np.floor(np.log2(np.maximum(room, 1.0)))))
        for ids in self._fixed:
            wanted[group_of[ids]] = 1.0
        return np.exp2(np.rint(np.log2(wanted)))[group_of]


def channel_ranges(
    tensors: Sequence[Float[np.ndarray, "n ..."]], *, axes: Sequence[int | None]
) -> list[Float[np.ndarray, " _"]]:
    """Returns max |x| of every channel of the tensors of some images, float32; empty where the axis is None.

    >>> [found.tolist() for found in channel_ranges([np.array([[[1.0, -3.0], [0.5, 0.0]]])], axes=[1])]
    [[3.0, 0.5]]
    """
    found = []
    for tensor, axis in zip(tensors, axes, strict=True):
        if axis is None:
            found.append(np.zeros(0, dtype=np.float32))
            continue
        rows = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
        found.append(np.maximum(rows.max(axis=1), -rows.min(axis=1)))
    return found
