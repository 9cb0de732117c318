"""By how much can each channel be scaled, so that the channels of a tensor have ranges of one size?

One scale per tensor serves its widest channel; a channel of a tenth of that range keeps a tenth of the integers.
Where only operations lie between two layers that a positive factor passes through, the first layer's output
channel can be multiplied by a factor and the second layer's input channel divided by it: the network computes
the same, and the ranges come closer. Weights of the first layer do not mind, they have a scale per output channel.
Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 4.1, with
the ranges of activations, measured, in place of those of weights; the exponent is that of Xiao et al.,
SmoothQuant (2022), section 4. No amax is chosen here.
"""

import operator
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import fx, nn

from ptq.numerics.channel_factors import ChannelIds, Ids

_SCALABLE_MODULES = (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity)
_SCALABLE_FUNCTIONS = {F.relu, torch.relu, F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d}
_SCALABLE_METHODS = {"relu", "contiguous", "mean"}
_FLATTENS = (torch.flatten, "flatten", "view", "reshape")


def equalize_(
    module: fx.GraphModule,
    ranges: Mapping[str, Float[np.ndarray, " channels"]],
    *,
    input_shape: tuple[int, int, int],
) -> int:
    """Rescales weights and biases of a folded model in place, and returns the number of channels that changed.

    Every factor is a power of two, so that a network without clips computes the same floats as before. A network
    with clips (ReLU6) does for every channel that stays as far below the clip as `CLIP_MARGIN` says.

    Args:
        module: the folded model.
        ranges: the range max |x| of each channel of tensors by node name, in activation units.
        input_shape: (c, h, w).
    """
    channels = _Channels(module, _shapes(module, input_shape))
    factors = channels.ids.factors(ranges)
    with torch.no_grad():
        for name, ids in channels.outputs.items():
            layer = module.get_submodule(name)
            factor = torch.from_numpy(factors[ids]).to(layer.weight.dtype)
            layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.mul_(factor)
        for name, ids in channels.inputs.items():
            _divide_inputs_(module.get_submodule(name), factors[ids])
    return int(sum((factors[ids] != 1).sum() for ids in channels.outputs.values()))


def _divide_inputs_(layer: nn.Module, factors: Float[np.ndarray, " inputs"]) -> None:
    """Divides the weights of each input channel by its factor; a group of a convolution reads a run of channels."""
    weight = layer.weight
    groups = getattr(layer, "groups", 1)
    per_output = factors.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
    weight.div_(torch.from_numpy(per_output).to(weight.dtype).reshape(*weight.shape[:2], *[1] * (weight.ndim - 2)))


def _shapes(module: fx.GraphModule, input_shape: tuple[int, int, int]) -> dict[fx.Node, tuple[int, ...]]:
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            value = super().run_node(node)
            if isinstance(value, torch.Tensor):
                shapes[node] = tuple(value.shape)
            return value

    with torch.inference_mode():
        Recorder(module).run(torch.zeros(1, *input_shape))
    return shapes


class _Channels:
    """Which channels of a `torch.fx` graph's tensors must have one factor, and which cannot have any.

    Attributes:
        ids: the channels of every tensor, by node name.
        outputs: ids of the output channels of every layer whose weights can be scaled, by name.
        inputs: ids of its input channels.
    """

    def __init__(self, module: fx.GraphModule, shapes: Mapping[fx.Node, tuple[int, ...]]) -> None:
        self._module = module
        self._shapes = shapes
        self.ids = ChannelIds()
        self.outputs: dict[str, Ids] = {}
        self.inputs: dict[str, Ids] = {}
        for node in module.graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        shape = self._shapes.get(node)
        has_channels = shape is not None and len(shape) in (2, 4)
        passed = self._passed(node, shape) if shape is not None and has_channels and node.op != "output" else None
        if passed is not None:
            self.ids.of[node.name] = passed
            return
        for source in node.all_input_nodes:
            self.ids.fix(source.name)
        if shape is not None and has_channels:
            self.ids.of[node.name] = self.ids.new(shape[1])
            self.ids.fix(node.name)

    def _passed(self, node: fx.Node, shape: tuple[int, ...]) -> Ids | None:
        """The ids of the node's channels where a factor passes through it, else None."""
        channels = shape[1]
        sources = [self.ids.of[source.name] for source in node.all_input_nodes if source.name in self.ids.of]
        if not sources or len(sources) != len(node.all_input_nodes):
            return None
        module = self._module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d | nn.Linear):
            return self._layer(str(node.target), module, sources[0], channels, rank=len(shape))
        if isinstance(module, nn.ReLU6) or node.target is F.relu6:
            self.ids.clip(sources[0], 6.0)
            return sources[0]
        if node.target in (operator.add, torch.add, "add") and [len(ids) for ids in sources] == [channels] * 2:
            self.ids.tie(sources[0], sources[1])
            return sources[0]
        if node.target in (torch.cat, torch.concat) and self._axis(node) == 1:
            return np.concatenate(sources)
        if node.target is F.pad and len(sources[0]) <= channels:
            return self._padded(node, sources[0])
        if node.target is operator.getitem and self._keeps_channels(node, channels, sources[0]):
            return sources[0]
        if isinstance(module, nn.Flatten) or node.target in _FLATTENS:
            if len(shape) != 2 or channels % len(sources[0]):
                return None
            return np.repeat(sources[0], channels // len(sources[0]))
        passes = isinstance(module, _SCALABLE_MODULES) or node.target in (*_SCALABLE_FUNCTIONS, *_SCALABLE_METHODS)
        return sources[0] if passes and len(sources) == 1 and len(sources[0]) == channels else None

    def _layer(self, name: str, layer: nn.Conv2d | nn.Linear, ids: Ids, channels: int, *, rank: int) -> Ids | None:
        reads = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        calls = sum(node.op == "call_module" and node.target == name for node in self._module.graph.nodes)
        if len(ids) != reads or calls != 1 or (isinstance(layer, nn.Linear) and rank != 2):
            return None
        self.inputs[name] = ids
        self.outputs[name] = self.ids.new(channels)
        return self.outputs[name]

    @staticmethod
    def _axis(node: fx.Node) -> object:
        return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)

    def _padded(self, node: fx.Node, ids: Ids) -> Ids | None:
        """Zeros may have any factor: the channels that are added get ids of their own."""
        pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        if not isinstance(pad, tuple | list) or node.kwargs.get("mode", "constant") != "constant":
            return None
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value", 0)
        if value not in (None, 0, 0.0) or len(node.args) > 2 and node.args[2] != "constant":
            return None
        before, after = (int(pad[4]), int(pad[5])) if len(pad) >= 6 else (0, 0)
        return np.concatenate([self.ids.new(max(before, 0)), ids, self.ids.new(max(after, 0))]) if before >= 0 else None

    @staticmethod
    def _keeps_channels(node: fx.Node, channels: int, ids: Ids) -> bool:
        index = node.args[1]
        return isinstance(index, tuple) and len(ids) == channels and list(index[:2]) == [slice(None)] * 2
