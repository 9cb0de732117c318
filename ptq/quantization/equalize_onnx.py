"""By how much can each channel of an ONNX graph be scaled, so that the channels of a tensor have ranges of one size?

The rules of `equalization`, read from the operators of a graph in canonical form; the factors are those of
`channel_ids`. Weights and biases of the graph's layers are changed, nothing else.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from ptq.graph.nodes import Node, Tensor, constant, input_at, is_zero_padding
from ptq.graph.qdq_graph import Layer, QdqGraph
from ptq.numerics.channel_factors import ChannelIds, Ids
from ptq.quantization.placement_onnx import layer_name

_SCALABLE = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean")
_FLATTENS = ("Flatten", "Reshape", "Squeeze")


def equalize_(graph: QdqGraph, layers: Sequence[Layer], ranges: Mapping[str, Float[np.ndarray, " channels"]]) -> int:
    """Rescales weights and biases of a canonical graph in place, and returns the number of channels that changed.

    Args:
        graph: the graph, its shapes inferred.
        layers: its layers with a stored weight.
        ranges: the range max |x| of each channel of tensors by name, in activation units.
    """
    channels = _Channels(graph, layers)
    factors = channels.ids.factors(ranges)
    for name, ids in channels.outputs.items():
        layer, factor = channels.layers[name], factors[ids].astype(np.float32)
        _scale_(layer.weight, factor.reshape(-1, *[1] * (_stored(layer.weight).ndim - 1)))
        if layer.bias is not None:
            _scale_(layer.bias, factor)
    for name, ids in channels.inputs.items():
        layer = channels.layers[name]
        shape, groups = _stored(layer.weight).shape, _groups(layer.node)
        per_output = factors[ids].reshape(groups, -1).repeat(shape[0] // groups, axis=0)
        _scale_(layer.weight, (1 / per_output).astype(np.float32).reshape(*shape[:2], *[1] * (len(shape) - 2)))
    return int(sum((factors[ids] != 1).sum() for ids in channels.outputs.values()))


def _stored(tensor: Tensor) -> np.ndarray:
    values = constant(tensor)
    assert values is not None
    return values


def _scale_(tensor: Tensor, factor: np.ndarray) -> None:
    tensor.values = _stored(tensor) * factor  # type: ignore[attr-defined]


def _groups(node: Node) -> int:
    return int(node.attrs.get("group", 1)) if node.op == "Conv" else 1


class _Channels:
    """Which channels of a graph's tensors must have one factor, and which cannot have any.

    Attributes:
        ids: the channels of every tensor, by name.
        layers: the layers whose weights can be scaled, by name.
        outputs: ids of the output channels of these, by name.
        inputs: ids of their input channels.
    """

    def __init__(self, graph: QdqGraph, layers: Sequence[Layer]) -> None:
        self.ids = ChannelIds()
        self.layers: dict[str, Layer] = {}
        self.outputs: dict[str, Ids] = {}
        self.inputs: dict[str, Ids] = {}
        self._by_node = {id(layer.node): layer for layer in layers}
        for tensor in graph.inputs:
            self._begin(tensor)
        for node in graph.nodes:
            self._visit(node)
        for tensor in graph.outputs:
            self.ids.fix(tensor.name)

    def _begin(self, tensor: Tensor) -> None:
        """Gives a tensor channels that cannot be scaled."""
        if tensor.shape is not None and len(tensor.shape) in (2, 4) and isinstance(tensor.shape[1], int):
            self.ids.of[tensor.name] = self.ids.new(tensor.shape[1])
            self.ids.fix(tensor.name)

    def _visit(self, node: Node) -> None:
        passed = self._passed(node, node.outputs[0])
        if passed is not None:
            self.ids.of[node.outputs[0].name] = passed
            return
        for source in node.inputs:
            self.ids.fix(source.name)
        for tensor in node.outputs:
            self._begin(tensor)

    def _passed(self, node: Node, result: Tensor) -> Ids | None:
        """The ids of the result's channels where a factor passes through the node, else None."""
        if result.shape is None or len(result.shape) not in (2, 4) or not isinstance(result.shape[1], int):
            return None
        channels = result.shape[1]
        computed = [tensor for tensor in node.inputs if tensor.name and constant(tensor) is None]
        sources = [self.ids.of[tensor.name] for tensor in computed if tensor.name in self.ids.of]
        if not sources or len(sources) != len(computed):
            return None
        if id(node) in self._by_node:
            return self._layer(self._by_node[id(node)], sources, channels)
        if node.op == "Add" and [len(ids) for ids in sources] == [channels] * 2:
            self.ids.tie(sources[0], sources[1])
            return sources[0]
        if node.op == "Concat" and len(computed) == len(node.inputs) and node.attrs.get("axis") == 1:
            return np.concatenate(sources)
        return self._of_one(node, sources[0], channels, rank=len(result.shape)) if len(sources) == 1 else None

    def _of_one(self, node: Node, ids: Ids, channels: int, *, rank: int) -> Ids | None:
        """The ids behind a node that reads one computed tensor."""
        if node.op == "Clip":
            return self._clipped(node, ids)
        if node.op == "Pad":
            return self._padded(node, ids)
        if node.op in _FLATTENS:
            fits = rank == 2 and channels % len(ids) == 0 and node.attrs.get("axis", 1) == 1
            return np.repeat(ids, channels // len(ids)) if fits else None
        keeps = node.op in _SCALABLE or (node.op == "Slice" and self._slices_pixels(node))
        return ids if keeps and len(ids) == channels else None

    def _layer(self, layer: Layer, sources: list[Ids], channels: int) -> Ids | None:
        weight, node = _stored(layer.weight), layer.node
        reads = weight.shape[1] * _groups(node)
        scalable_bias = layer.bias is None or constant(layer.bias) is not None
        if node.op not in ("Conv", "Gemm") or len(sources) != 1 or len(sources[0]) != reads or not scalable_bias:
            return None
        if len(layer.weight.outputs) != 1:  # a layer that is called twice reads two tensors
            return None
        name = layer_name(layer)
        self.layers[name], self.inputs[name] = layer, sources[0]
        self.outputs[name] = self.ids.new(channels)
        return self.outputs[name]

    def _clipped(self, node: Node, ids: Ids) -> Ids | None:
        """Zero stays zero under any factor; what is clipped above may not grow into the limit."""
        lowest, highest = (constant(input_at(node, position)) for position in (1, 2))
        if lowest is None or lowest.size != 1 or float(lowest.ravel()[0]) != 0.0:
            return None
        if input_at(node, 2) is None:
            return ids
        if highest is None or highest.size != 1:
            return None
        self.ids.clip(ids, float(highest.ravel()[0]))
        return ids

    def _padded(self, node: Node, ids: Ids) -> Ids | None:
        """Zeros may have any factor: the channels that are added get ids of their own."""
        pads = constant(input_at(node, 1))
        if pads is None or pads.size != 8 or not is_zero_padding(node) or input_at(node, 3) is not None:
            return None
        if pads[[0, 4]].any() or min(pads[1], pads[5]) < 0:
            return None
        return np.concatenate([self.ids.new(int(pads[1])), ids, self.ids.new(int(pads[5]))])

    @staticmethod
    def _slices_pixels(node: Node) -> bool:
        """Whether a Slice leaves batch and channels as they are."""
        axes = constant(input_at(node, 3))
        rank = len(node.inputs[0].shape or ())
        return axes is not None and rank == 4 and all(int(axis) % rank >= 2 for axis in axes.ravel())
