"""How much of a network do its quantizers reach?

Counted on the FP32 graph, which has every convolution and linear layer of the network, however its source spells them:
a module, a function, a subclass. What the placement plan does not name there stays in float.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx

from ptq.errors import ExportError
from ptq.graph.names import module_of, scope_of
from ptq.graph.operations import CONVOLUTIONS, LINEAR, RESHAPING
from ptq.records.plan import Coverage, LayerInFloat, PlacementPlan
from ptq.wording import first_names


@dataclass(frozen=True, slots=True)
class _Layer:
    """A convolution or linear operation on a weight; `macs` are multiply-accumulates for one image.

    `why` tells what keeps it from being quantized, where it is of a kind that never is.
    """

    name: str
    operator: str
    macs: int
    why: str


_RECURRENT = dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent layers are not quantized")


def measure_coverage(fp32: Path, plan: PlacementPlan) -> Coverage:
    """Returns what part of a network's layers and of their multiply-accumulates is quantized by a plan.

    Args:
        fp32: the FP32 graph, whose parameters are called `<layer>.weight`.
        plan: where quantizers go.

    Products of two activations, as attention has, are no layers and not counted.
    """
    model = _for_one_image(onnx.load(fp32))
    layers = _layers(model)
    quantized, chosen = set(plan.quantized_layers), set(plan.chosen_float_layers)
    in_float = [
        LayerInFloat(layer.name, layer.macs, _reason(layer, chosen)) for layer in layers if layer.name not in quantized
    ]
    return Coverage(
        layers=len(layers),
        int8_layers=sum(layer.name in quantized for layer in layers),
        macs=sum(layer.macs for layer in layers),
        int8_macs=sum(layer.macs for layer in layers if layer.name in quantized),
        chosen_macs=sum(layer.macs for layer in layers if layer.name in chosen),
        batchnorms=sum(node.op_type == "BatchNormalization" for node in model.graph.node),
        in_float=tuple(in_float),
    )


def layer_names(fp32: Path) -> tuple[str, ...]:
    """Returns the names of the layers of an FP32 graph, as `measure_coverage` counts them."""
    return tuple(layer.name for layer in _layers(_for_one_image(onnx.load(fp32))))


def describe(coverage: Coverage) -> str:
    """Returns one sentence that says what is in INT8 and what stays in float, and why."""
    text = (
        f"INT8: {coverage.int8_layers} of {coverage.layers} convolutions and linear layers, "
        f"{coverage.int8_macs_percent:.1f} % of their multiply-accumulates"
    )
    for reason in dict.fromkeys(layer.reason for layer in coverage.in_float):
        names = [layer.name for layer in coverage.in_float if layer.reason == reason]
        text += f"; in float: {first_names(names)} ({reason})"
    if coverage.batchnorms:
        text += f"; {coverage.batchnorms} BatchNorms stay, which no layer before them can take in"
    return f"{text}."


def require_coverage(coverage: Coverage, least_percent: float) -> None:
    """Raises where too little of a network would be in INT8.

    Args:
        coverage: of the prepared model.
        least_percent: of the multiply-accumulates, those left in float by choice apart.

    Raises:
        ExportError: less than that is quantized.
    """
    if coverage.int8_macs_percent < least_percent:
        raise ExportError(
            f"Too little of the network can be quantized. {describe(coverage)} Expected {least_percent:g} % "
            "(gate.min_int8_macs_percent). Nothing was calibrated. Name layers that are to stay in float with "
            "quantization.skip_layers, or lower that limit."
        )


def _reason(layer: _Layer, chosen: Collection[str]) -> str:
    if layer.name in chosen:
        return "left in float by choice"
    return layer.why or "no module or node of a kind that gets quantizers"


def _for_one_image(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes of its tensors for a batch of one."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    if dimensions and not dimensions[0].dim_value:
        dimensions[0].dim_value = 1
    del model.graph.value_info[:]
    for value in model.graph.output:
        for dimension in value.type.tensor_type.shape.dim[:1]:
            dimension.dim_value = 1
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _layers(model: onnx.ModelProto) -> list[_Layer]:
    graph = model.graph
    writers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.value_info, *graph.output)} | stored
    constants = _constants(graph, stored)
    found = []
    for node in graph.node:
        if node.op_type in _RECURRENT:
            macs = _recurrent_macs(node, shapes)
            found.append(_Layer(scope_of(node.name) or node.name, node.op_type, macs, _RECURRENT[node.op_type]))
            continue
        if node.op_type not in CONVOLUTIONS | LINEAR:
            continue
        weight = next((name for name in reversed(node.input[:2]) if name in constants), "")
        data = next((name for name in node.input[:2] if name != weight), "")
        if not weight and node.op_type in CONVOLUTIONS:
            macs = _macs(node, prod(shapes.get(node.input[1]) or (1,)), shapes.get(node.output[0]), shapes.get(data))
            name = scope_of(node.name) or node.name
            found.append(_Layer(name, node.op_type, macs, "its weight depends on the image"))
            continue
        if not weight or data in constants:
            continue
        parameter = _parameter(weight, writers, stored)
        name = module_of(parameter) or scope_of(node.name) or node.name or node.output[0]
        size = _size(weight, writers, stored)
        macs = _macs(node, size, shapes.get(node.output[0]), shapes.get(data))
        why = "" if parameter else "its weight is computed from other parameters"
        found.append(_Layer(name, node.op_type, macs, why))
    return found


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """The lengths of a tensor's axes; None where one is unknown."""
    lengths = tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
    return lengths if lengths and all(lengths) else None


def _constants(graph: onnx.GraphProto, stored: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The tensors that do not depend on the image."""
    found = set(stored)
    for node in graph.node:
        if all(name in found or not name for name in node.input) and not any(each.g.node for each in node.attribute):
            found.update(node.output)
    return found


def _parameter(weight: str, writers: Mapping[str, onnx.NodeProto], stored: Mapping[str, tuple[int, ...]]) -> str:
    """The parameter that a weight is, at most transposed; empty where it is computed."""
    while weight not in stored:
        node = writers.get(weight)
        if node is None or node.op_type not in RESHAPING:
            return ""
        weight = node.input[0]
    return weight


def _size(weight: str, writers: Mapping[str, onnx.NodeProto], stored: Mapping[str, tuple[int, ...]]) -> int:
    """The numbers of a weight, or of the largest parameter that it is computed from."""
    pending, seen, largest = [weight], set(), 1
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in stored:
            largest = max(largest, prod(stored[name]))
        elif name in writers:
            pending += writers[name].input
    return largest


def _recurrent_macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...] | None]) -> int:
    """Multiply-accumulates of a recurrent layer: of its two weights (directions, gates, n), in every step."""
    steps = (shapes.get(node.input[0]) or (1,))[0]
    return steps * sum(prod(shapes.get(name) or (1,)) for name in node.input[1:3])


def _macs(node: onnx.NodeProto, size: int, output: tuple[int, ...] | None, data: tuple[int, ...] | None) -> int:
    """Multiply-accumulates for one image; as if the weight were used once where a shape is unknown."""
    if node.op_type == "Conv" and output is not None:
        return prod(output[2:]) * size
    if node.op_type == "ConvTranspose" and data is not None:
        return prod(data[2:]) * size
    if node.op_type in LINEAR and data is not None:
        return prod(data[:-1]) * size
    return size
