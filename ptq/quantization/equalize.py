"""By how much can each channel be scaled, so that the channels of a tensor have ranges of one size?

One scale per tensor serves its widest channel; a channel of a tenth of that range keeps a tenth of the integers.
Where only operations lie between two layers that a positive factor passes through, the first layer's output
channel can be multiplied by a factor and the second layer's input channel divided by it: the network computes
the same, and the ranges come closer. Weights of the first layer do not mind, they have a scale per output channel.
Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 4.1, with
the ranges of activations, measured, in place of those of weights; the exponent is that of Xiao et al.,
SmoothQuant (2022), section 4. No amax is chosen here, and no weight changed: the views carry the factors out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ptq.numerics.channel_factors import ChannelIds, Ids
from ptq.quantization.view import GraphView, Operation


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """By what a layer's numbers are multiplied: its weights by output and input channel, its bias by output channel."""

    weight: Float[np.ndarray, "outputs inputs"]
    bias: Float[np.ndarray, " outputs"]


def layer_factors(
    view: GraphView, ranges: Mapping[str, Float[np.ndarray, " channels"]]
) -> tuple[dict[str, LayerFactors], int]:
    """Returns the factors of every layer that can be scaled, by name, and the number of channels that change.

    Every factor is a power of two, so that a network without clips computes the same floats as before. A network
    with clips (ReLU6) does for every channel that stays as far below the clip as `CLIP_MARGIN` says.

    Args:
        view: the network, its shapes known.
        ranges: the range max |x| of each channel of tensors by name, in activation units.
    """
    channels = _Channels(view)
    factors = channels.ids.factors(ranges)
    found = {}
    for name, (inputs, outputs) in channels.layers.items():
        # A group of a convolution reads a run of channels.
        groups = view.layers[name].groups
        read = factors[inputs].reshape(groups, -1).repeat(len(outputs) // groups, axis=0)
        found[name] = LayerFactors(factors[outputs][:, None] / read, factors[outputs])
    return found, int(sum((layer.bias != 1).sum() for layer in found.values()))


class _Channels:
    """Which channels of a network's tensors must have one factor, and which cannot have any.

    Attributes:
        ids: the channels of every tensor, by name.
        layers: ids of the input and the output channels of every layer whose weights can be scaled, by name.
    """

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self.ids = ChannelIds()
        self.layers: dict[str, tuple[Ids, Ids]] = {}
        for operation in view.operations:
            self._visit(operation)
        for tensor in view.tensors.values():
            if tensor.is_output:
                self.ids.fix(tensor.name)

    def _visit(self, operation: Operation) -> None:
        passed = self._passed(operation)
        if passed is not None:
            self.ids.of[operation.outputs[0].name] = passed
            return
        for tensor in operation.inputs:
            self.ids.fix(tensor.name)
        for tensor in operation.outputs:
            if tensor.channels is not None:
                self.ids.of[tensor.name] = self.ids.new(tensor.channels)
                self.ids.fix(tensor.name)

    def _passed(self, operation: Operation) -> Ids | None:
        """The ids of the result's channels where a factor passes through the operation, else None."""
        how, channels = operation.channels.how, operation.outputs[0].channels
        sources = [self.ids.of.get(tensor.name) for tensor in operation.inputs]
        known = [ids for ids in sources if ids is not None]
        if channels is None or not known or len(known) != len(sources):
            return None
        if how == "joined":
            return np.concatenate(known)
        if how == "added" and [len(ids) for ids in known] == [channels] * 2:
            self.ids.tie(*known)
            return known[0]
        return self._of_one(operation, known[0], channels) if len(known) == 1 else None

    def _of_one(self, operation: Operation, ids: Ids, channels: int) -> Ids | None:
        """The ids behind an operation that reads one tensor."""
        passage = operation.channels
        if passage.how == "weighted":
            return self._behind_layer(operation.layer, ids, channels)
        if passage.how == "repeated":
            is_flat = len(operation.outputs[0].shape or ()) == 2
            return np.repeat(ids, channels // len(ids)) if is_flat and channels % len(ids) == 0 else None
        if passage.how == "padded":
            # Zeros may have any factor: the channels that are added get ids of their own.
            before, behind = map(self.ids.new, passage.padding)
            return np.concatenate([before, ids, behind])
        if passage.how == "clipped":
            self.ids.clip(ids, passage.limit)
            return ids
        return ids if passage.how == "kept" and len(ids) == channels else None

    def _behind_layer(self, name: str, ids: Ids, channels: int) -> Ids | None:
        layer = self._view.layers[name]
        if not layer.scalable or len(ids) != layer.inputs:
            return None
        self.layers[name] = ids, self.ids.new(channels)
        return self.layers[name][1]
