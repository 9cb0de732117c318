"""What is an ONNX graph in canonical form in the words of the rules?

Operators, and nothing else, decide what an operation is to placement and to equalization. Factors of channels are
carried out here, quantizers in `insertion`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ptq.errors import UsageError
from ptq.graph import operations
from ptq.graph.names import Graph, bias_add, layers_of
from ptq.graph.nodes import Node, constant, input_at, is_zero_padding
from ptq.graph.nodes import Tensor as OnnxTensor
from ptq.graph.qdq_graph import Layer, QdqGraph
from ptq.quantization.equalize import LayerFactors
from ptq.quantization.view import MIXED, GraphView, Kind, Operation, Passage, Tensor, WeightedLayer

_OPERATIONS: dict[Kind, frozenset[str]] = {
    "convolution": operations.CONVOLUTIONS,
    "linear": operations.LINEAR,
    "max_pool": frozenset({"MaxPool"}),
    "add": frozenset({"Add"}),
    "multiply": frozenset({"Mul"}),
    "concat": frozenset({"Concat"}),
    "permutation": frozenset({"Transpose"}),
    "reshape": operations.RESHAPING - {"Transpose"},
    "cut": frozenset({"Slice"}),
}
_KINDS = {operator: kind for kind, operators in _OPERATIONS.items() for operator in operators}


def view_of(canonical: Graph) -> GraphView:
    """Returns a float graph in canonical form, its shapes inferred, as the rules see it.

    Raises:
        UsageError: the graph has no layer that can be quantized.
    """
    graph = QdqGraph(canonical.nodes, canonical.inputs, canonical.outputs)
    layers = list(layers_of(canonical))
    if not layers:
        raise UsageError("The model has no convolution and no linear layer with stored weights; nothing to quantize.")
    known = {id(layer.node) for layer in layers}
    others = [layer.node.name for layer in graph.layers if id(layer.node) not in known]
    weighted: dict[str, WeightedLayer] = {}
    for layer in layers:
        weighted.setdefault(layer_name(layer), _weighted_layer(layer))
    view = GraphView(weighted, tuple(others), _warnings(others), shares_dense_blocks=False)
    for tensor in graph.inputs:
        view.add(Operation(tensor.name, "other", [], [_tensor(graph, tensor)]))
    # A MatMul ends with the addition of its bias.
    ends = {id(bias_add(graph, layer.node) or layer.node): layer for layer in layers}
    pools = {id(pool) for pool in graph.pools_to_quantize()}
    for node in graph.nodes:
        if id(node) in ends or id(node) not in known:
            view.add(_operation(graph, node, ends.get(id(node)), view.tensors, is_quantized_pool=id(node) in pools))
    return view


def scale_layers_(canonical: Graph, factors: Mapping[str, LayerFactors]) -> None:
    """Multiplies weights and biases of layers by their factors."""
    for layer in layers_of(canonical):
        found = factors.get(layer_name(layer))
        if found is not None:
            rank = _stored(layer.weight).ndim
            _scale_(layer.weight, found.weight.reshape(*found.weight.shape, *[1] * (rank - 2)))
            if layer.bias is not None:
                _scale_(layer.bias, found.bias)


def _stored(tensor: OnnxTensor) -> np.ndarray:
    values = constant(tensor)
    assert values is not None
    return values


def _scale_(tensor: OnnxTensor, factor: np.ndarray) -> None:
    tensor.values = _stored(tensor) * factor.astype(np.float32)  # type: ignore[attr-defined]


def layer_name(layer: Layer) -> str:
    """Returns the name of a layer of a canonical graph: its weight is `<name>.weight`."""
    return layer.weight.name.removesuffix(".weight")


def _weighted_layer(layer: Layer) -> WeightedLayer:
    shape, op = _stored(layer.weight).shape, layer.node.op
    groups = int(layer.node.attrs.get("group", 1)) if op == "Conv" else 1
    has_stored_bias = layer.bias is None or constant(layer.bias) is not None
    # A weight that is read twice belongs to a layer that is called twice, on two tensors.
    is_scalable = op in ("Conv", "Gemm") and has_stored_bias and len(layer.weight.outputs) == 1
    axis = layer.axis % 2 if op in operations.LINEAR else layer.axis
    return WeightedLayer(axis, shape[1] * groups, groups, scalable=is_scalable)


def _warnings(others: Sequence[str]) -> tuple[str, ...]:
    if not others:
        return ()
    names = ", ".join(others[:3])
    return (f"{len(others)} layers stay in float, for their weights are computed or stored unusually: {names}.",)


def _tensor(graph: QdqGraph, tensor: OnnxTensor) -> Tensor:
    shape = None
    if tensor.shape is not None:
        shape = tuple(length if isinstance(length, int) else None for length in tensor.shape)
    is_output = tensor.name in graph.output_names
    return Tensor(tensor.name, graph.never_negative(tensor), shape, is_output=is_output)


def _operation(
    graph: QdqGraph, end: Node, layer: Layer | None, tensors: Mapping[str, Tensor], *, is_quantized_pool: bool
) -> Operation:
    """The operation whose result `end` writes: the node, or the layer of which it adds the bias."""
    node = end if layer is None else layer.node
    computed = [tensor for tensor in node.inputs if tensor.name and constant(tensor) is None]
    # Integers are sizes and positions, from which masks are made.
    read = [tensor for tensor in computed if getattr(tensor.dtype, "kind", "f") not in "iub"]
    kind: Kind = "quantized_pool" if is_quantized_pool else _kind(node, layer, is_whole=len(read) == len(node.inputs))
    return Operation(
        node.name,
        kind if read else "other",
        [tensors[tensor.name] for tensor in read],
        [_tensor(graph, tensor) for tensor in end.outputs],
        "" if layer is None else layer_name(layer),
        _passage(node, layer, kind) if len(read) == len(computed) else MIXED,
    )


def _kind(node: Node, layer: Layer | None, *, is_whole: bool) -> Kind:
    """What placement makes of the node; `is_whole` says that all it reads depends on the image."""
    kind: Kind = "cut" if is_zero_padding(node) else _KINDS.get(node.op, "other")
    lacks_weight = kind in ("convolution", "linear") and layer is None
    is_odd = lacks_weight or (kind == "concat" and not is_whole) or (kind == "max_pool" and len(node.outputs) != 1)
    return "other" if is_odd else kind


def _passage(node: Node, layer: Layer | None, kind: Kind) -> Passage:
    """What becomes of a factor per channel."""
    passage = MIXED
    if layer is not None:
        passage = Passage("weighted")
    elif kind == "add":
        passage = Passage("added")
    elif kind == "concat" and node.attrs.get("axis") == 1:
        passage = Passage("joined")
    elif node.op == "Clip":
        passage = _clip(node)
    elif node.op == "Pad":
        passage = _pad(node)
    elif node.op in operations.REPEATS_CHANNELS and node.attrs.get("axis", 1) == 1:
        passage = Passage("repeated")
    elif node.op in operations.KEEPS_CHANNELS or (node.op == "Slice" and _slices_pixels(node)):
        passage = Passage("kept")
    return passage


def _clip(node: Node) -> Passage:
    """Zero stays zero under any factor; what is clipped above may not grow into the limit."""
    lowest, highest = (constant(input_at(node, position)) for position in (1, 2))
    if lowest is None or lowest.size != 1 or float(lowest.ravel()[0]) != 0.0:
        return MIXED
    if input_at(node, 2) is None:
        return Passage("kept")
    return MIXED if highest is None or highest.size != 1 else Passage("clipped", limit=float(highest.ravel()[0]))


def _pad(node: Node) -> Passage:
    pads = constant(input_at(node, 1))
    if pads is None or pads.size != 8 or not is_zero_padding(node) or input_at(node, 3) is not None:
        return MIXED
    if pads[[0, 4]].any() or min(pads[1], pads[5]) < 0:
        return MIXED
    return Passage("padded", padding=(int(pads[1]), int(pads[5])))


def _slices_pixels(node: Node) -> bool:
    """Whether a Slice leaves batch and channels as they are."""
    axes = constant(input_at(node, 3))
    rank = len(node.inputs[0].shape or ())
    return axes is not None and rank == 4 and all(int(axis) % rank >= 2 for axis in axes.ravel())
