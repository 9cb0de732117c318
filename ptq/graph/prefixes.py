"""Where can a Q/DQ graph be cut, so that its beginning shows what is computed up to there?

A cut lies behind a quantizer of an activation, where an engine has the tensor in INT8 anyway: the layers before it are
fused as in the whole graph. Each beginning ends in one vector per image, as a classifier does.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from ptq.graph.operations import CONVOLUTIONS, DEQUANTIZE, LINEAR, QUANTIZE

_OUTPUT = "ptq_beginning"


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor behind which a graph can be cut, and the layers with weights between it and the cuts before it.

    `layers` are the nodes' names by the tensor that each writes, in the order of the graph; `before`, the tensors of
    the cuts that lie directly before this one.
    """

    tensor: str
    layers: Mapping[str, str]
    before: frozenset[str]


def cuts_of(model: onnx.ModelProto) -> list[Cut]:
    """Returns the cuts of a graph in its order, the last one its output. Cuts without a layer before them are left out.

    Args:
        model: a Q/DQ graph with one output, its nodes in topological order.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    writers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.input and all(name in constants or not name for name in node.input)):
            constants.update(node.output)
    places = [
        node.output[0]
        for node in model.graph.node
        if node.op_type == DEQUANTIZE
        and node.output[0] not in constants
        and node.input[0] in writers
        and writers[node.input[0]].op_type == QUANTIZE
    ]
    found = [
        Cut(tensor, *_layers_before(tensor, set(places) - {tensor}, writers, constants))
        for tensor in [*places, model.graph.output[0].name]
    ]
    return [cut for cut in found if cut.layers]


def _layers_before(
    tensor: str, stops: set[str], writers: Mapping[str, onnx.NodeProto], constants: set[str]
) -> tuple[dict[str, str], frozenset[str]]:
    """The layers that a tensor is computed by, back to the tensors at which to stop, and which of these it met."""
    layers: dict[str, str] = {}
    seen: set[str] = set()
    pending = [tensor]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in stops or name not in writers or name in constants:
            continue
        node = writers[name]
        if node.op_type in (*CONVOLUTIONS, *LINEAR) and any(each in constants for each in node.input[:2]):
            layers[node.output[0]] = node.name or name
        pending.extend(node.input)
    return dict(reversed(layers.items())), frozenset(seen & stops)


def beginning_of(model: onnx.ModelProto, tensor: str, *, as_vector: bool = True) -> onnx.ModelProto:
    """Returns the graph up to a tensor: as one vector for each image, or in the tensor's own shape."""
    writers = {name: node for node in model.graph.node for name in node.output}
    needed, pending = set(), [tensor]
    while pending:
        name = pending.pop()
        if name in writers and name not in needed:
            needed.update(writers[name].output)
            pending.extend(writers[name].input)
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    del kept.graph.node[:], kept.graph.output[:], kept.graph.value_info[:], kept.graph.initializer[:]
    kept.graph.node.extend(node for node in model.graph.node if needed & set(node.output))
    read = {name for node in kept.graph.node for name in node.input}
    kept.graph.initializer.extend(each for each in model.graph.initializer if each.name in read)
    if as_vector:
        kept.graph.node.append(helper.make_node("Flatten", [tensor], [_OUTPUT], axis=1))
        kept.graph.output.append(helper.make_tensor_value_info(_OUTPUT, TensorProto.FLOAT, [None, None]))
    else:
        kept.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    return kept


def without_quantizers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the graph as it computes in float: what each pair of Q and DQ would round is passed on as it is.

    A weight that is stored in integers stays the float number that these stand for.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    quantized = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == QUANTIZE}
    del plain.graph.node[:], plain.graph.value_info[:]
    for node in model.graph.node:
        if node.op_type == DEQUANTIZE and node.input[0] in quantized:
            node = helper.make_node("Identity", [quantized[node.input[0]]], list(node.output), name=node.name)
        elif node.op_type == QUANTIZE:
            continue
        plain.graph.node.append(node)
    return plain
