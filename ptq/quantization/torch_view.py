"""What is a `torch.fx` graph in the words of the rules?

Names of modules, functions and methods, and nothing else, decide what an operation is to placement and to
equalization. Factors of channels are carried out here, quantizers in `fake_quant`.
"""

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ptq.errors import UsageError
from ptq.networks.fake_quant import weight_axis
from ptq.quantization.equalize import LayerFactors
from ptq.quantization.view import MIXED, GraphView, Kind, Operation, Passage, Tensor, WeightedLayer

WEIGHTED_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

# Modules by class, functions by themselves, methods by name.
_OPERATIONS: dict[Kind, tuple[object, ...]] = {
    "convolution": (nn.Conv2d, nn.ConvTranspose2d),
    "linear": (nn.Linear,),
    "quantized_pool": (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    "max_pool": (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d),
    "add": (operator.add, torch.add, "add"),
    "multiply": (operator.mul, torch.mul, "mul"),
    "concat": (torch.cat, torch.concat),
    "permutation": (
        torch.permute,
        "permute",
        torch.transpose,
        "transpose",
        torch.swapaxes,
        "swapaxes",
        torch.movedim,
        "movedim",
    ),
    "reshape": (
        nn.Flatten,
        torch.reshape,
        "reshape",
        "view",
        torch.flatten,
        "flatten",
        "contiguous",
        torch.squeeze,
        "squeeze",
        torch.unsqueeze,
        "unsqueeze",
    ),
}
_KINDS = {target: kind for kind, targets in _OPERATIONS.items() for target in targets}
_MEANS = (torch.mean, "mean")
_PADS = {F.pad: ("input", "pad", "mode", "value"), torch.constant_pad_nd: ("input", "pad", "value")}

_NEVER_NEGATIVE = {
    nn.ReLU,
    nn.ReLU6,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softmax,
    F.relu,
    F.relu6,
    torch.relu,
    torch.sigmoid,
    F.sigmoid,
    F.hardsigmoid,
    F.softmax,
    torch.softmax,
    "relu",
    "sigmoid",
    "softmax",
}
_ARITHMETIC = {*_OPERATIONS["add"], *_OPERATIONS["multiply"]}
_KEEPS_SIGN = {
    *_OPERATIONS["quantized_pool"],
    *_OPERATIONS["max_pool"],
    *_ARITHMETIC,
    nn.Flatten,
    torch.flatten,
    torch.cat,
    operator.getitem,
    torch.reshape,
    torch.permute,
    "flatten",
    "view",
    "reshape",
    "permute",
    "transpose",
    "contiguous",
    "mean",
}

_KEEPS_CHANNELS = {
    nn.ReLU,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Identity,
    F.relu,
    torch.relu,
    F.max_pool2d,
    torch.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    "relu",
    "contiguous",
    "mean",
}
_REPEATS_CHANNELS = {nn.Flatten, torch.flatten, "flatten", "view", "reshape"}
_CLIPS = {nn.ReLU6: 6.0, F.relu6: 6.0}


def view_of(module: nn.Module, *, traced: bool = True, input_shape: tuple[int, int, int] | None = None) -> GraphView:
    """Returns a folded model as the rules see it.

    Args:
        module: the folded model; a `GraphModule` if `traced`.
        traced: whether the model could be traced; if not, the view has layers alone.
        input_shape: (c, h, w); where it is given, the tensors have shapes.

    Raises:
        UsageError: the model has no layer that can be quantized.
    """
    calls = _called_layers(module) if traced else _layers_outside_attention(module)
    if not calls:
        raise UsageError("The model has no convolution and no linear layer; there is nothing to quantize.")
    view = GraphView({name: _layer(module, name, count) for name, count in calls.items()}, is_traced=traced)
    if not traced:
        return view
    assert isinstance(module, fx.GraphModule)
    shapes = {} if input_shape is None else _shapes(module, input_shape)
    for node in module.graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                view.tensors[source.name].is_output = True
        elif node.op != "get_attr":
            view.add(_operation(module, node, view.tensors, shapes.get(node)))
    return view


def scale_layers_(module: nn.Module, factors: Mapping[str, LayerFactors]) -> None:
    """Multiplies weights and biases of layers by their factors."""
    with torch.no_grad():
        for name, found in factors.items():
            layer = module.get_submodule(name)
            weight = torch.from_numpy(found.weight).to(layer.weight.dtype)
            layer.weight.mul_(weight.reshape(*weight.shape, *[1] * (layer.weight.ndim - 2)))
            if layer.bias is not None:
                layer.bias.mul_(torch.from_numpy(found.bias).to(layer.bias.dtype))


def _called_layers(module: nn.Module) -> Counter[str]:
    """How often each layer is called, in the order of the graph."""
    assert isinstance(module, fx.GraphModule)
    return Counter(
        str(node.target)
        for node in module.graph.nodes
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), WEIGHTED_LAYERS)
    )


def _layers_outside_attention(module: nn.Module) -> Counter[str]:
    """The layers in the order of definition; nn.MultiheadAttention's are read by a fused kernel, never called."""
    inside = {
        id(child)
        for attention in module.modules()
        if isinstance(attention, nn.MultiheadAttention)
        for child in attention.modules()
    }
    found = module.named_modules()
    return Counter(name for name, child in found if isinstance(child, WEIGHTED_LAYERS) and id(child) not in inside)


def _layer(module: nn.Module, name: str, calls: int) -> WeightedLayer:
    layer: Any = module.get_submodule(name)
    if isinstance(layer, nn.Conv2d):
        return WeightedLayer(weight_axis(layer), layer.in_channels, layer.groups, scalable=calls == 1)
    if isinstance(layer, nn.Linear):
        return WeightedLayer(weight_axis(layer), layer.in_features, scalable=calls == 1)
    return WeightedLayer(weight_axis(layer))


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


def _operation(
    module: fx.GraphModule, node: fx.Node, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None
) -> Operation:
    child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    target = _target(node, child)
    inputs = [tensors[source.name] for source in node.all_input_nodes if source.op != "get_attr"]
    reads_parameters = len(inputs) < len(node.all_input_nodes)
    padding = _zero_padding(node, child)
    kind = _kind(node, target, padding)
    if not inputs or (kind == "concat" and reads_parameters):
        kind = "other"
    sign = target in _NEVER_NEGATIVE or (
        target in _KEEPS_SIGN
        and not reads_parameters
        and not (target in _ARITHMETIC and _has_negative_number(node))
        and all(tensor.never_negative for tensor in inputs)
    )
    layer = str(node.target) if kind in ("convolution", "linear") else ""
    passage = MIXED if reads_parameters else _passage(node, target, padding, shape)
    return Operation(node.name, kind, inputs, [Tensor(node.name, sign, shape)], layer, passage)


def _target(node: fx.Node, child: nn.Module | None) -> object:
    """What the tables know a node by: a class, a function, the name of a method; None for anything else."""
    if child is not None:
        known = (_KINDS, _NEVER_NEGATIVE, _KEEPS_SIGN, _KEEPS_CHANNELS, _REPEATS_CHANNELS, _CLIPS)
        return next((base for base in type(child).__mro__ if any(base in table for table in known)), None)
    return node.target if node.op in ("call_function", "call_method") else None


def _kind(node: fx.Node, target: object, padding: tuple[int, ...] | None) -> Kind:
    """What placement makes of the node; a mean over height and width is an average pool."""
    if target in _MEANS:
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        over = set(axes) if isinstance(axes, list | tuple) else {axes}
        return "quantized_pool" if over in ({2, 3}, {-2, -1}) else "other"
    if padding is not None or (target is operator.getitem and _is_slice(node)):
        return "cut"
    return _KINDS.get(target, "other")


def _is_slice(node: fx.Node) -> bool:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(isinstance(part, slice) or part is Ellipsis for part in index)


def _zero_padding(node: fx.Node, child: nn.Module | None) -> tuple[int, ...] | None:
    """How far each axis is padded with zeros, in torch's order, the last axis first; None where it is not."""
    if isinstance(child, nn.ConstantPad2d):
        return None if child.value else tuple(child.padding)
    names = _PADS.get(node.target) if node.op == "call_function" else None
    if names is None:
        return None
    arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    is_zero = arguments.get("mode", "constant") == "constant" and not arguments.get("value")
    return tuple(arguments.get("pad", ())) if is_zero else None


def _has_negative_number(node: fx.Node) -> bool:
    """Whether a number among the arguments is below zero, as `alpha` may be, by which torch multiplies an operand."""
    return any(isinstance(given, int | float) and given < 0 for given in (*node.args, *node.kwargs.values()))


def _passage(node: fx.Node, target: object, padding: tuple[int, ...] | None, shape: tuple[int, ...] | None) -> Passage:
    """What becomes of a factor per channel."""
    passage = MIXED
    if target is nn.Conv2d or (target is nn.Linear and len(shape or ()) == 2):
        passage = Passage("weighted")
    elif target in _CLIPS:
        passage = Passage("clipped", limit=_CLIPS[target])
    elif target in _OPERATIONS["add"]:
        passage = Passage("added")
    elif target in _OPERATIONS["concat"]:
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        passage = Passage("joined") if axis == 1 else MIXED
    elif target is F.pad and padding is not None:
        added = (padding[4], padding[5]) if len(padding) >= 6 else (0, 0)
        passage = Passage("padded", padding=added) if min(added) >= 0 else MIXED
    elif target is operator.getitem:
        index = node.args[1]
        leaves_channels = isinstance(index, tuple) and list(index[:2]) == [slice(None)] * 2
        passage = Passage("kept") if leaves_channels else MIXED
    elif target in _REPEATS_CHANNELS:
        passage = Passage("repeated")
    elif target in _KEEPS_CHANNELS:
        passage = Passage("kept")
    return passage
