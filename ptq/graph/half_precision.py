"""How does a graph become one whose float tensors are FP16?

A strongly typed TensorRT takes every layer's type from the graph, so that what a Q/DQ graph leaves in float, and what
fuses behind an INT8 layer, is FP16 only where the file says so. Weights, biases and scales become float16, casts keep
input and output float32, and integer codes stay as they are. QuantizeLinear has float16 from opset 19 on. Which layers
tolerate FP16 is not decided here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from ptq.errors import ExportError

OPSET_HALF = 19
_HALF = np.finfo(np.float16)
_HALF_MAXIMUM = float(_HALF.max)
HALF_SMALLEST_NORMAL = float(_HALF.smallest_normal)
_QDQ = ("QuantizeLinear", "DequantizeLinear")
# Inputs that stay float32 whatever the type of the image: operator and position.
_FLOAT32_INPUTS = {("Resize", 1), ("Resize", 2), ("Upsample", 1)}


@dataclass(frozen=True, slots=True)
class HalfModel:
    """A graph with FP16 tensors, and a sentence for every scale that FP16 cannot hold."""

    model: ModelProto
    warnings: tuple[str, ...]


def is_half(model: ModelProto) -> bool:
    """Tells whether a graph holds float16 constants, so that it needs no conversion."""
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in _stored_tensors(model))


def half_from_float32(model: ModelProto) -> HalfModel:
    """Returns the graph with float16 tensors and the float32 input and output it had; `model` is not changed.

    Scales below the smallest normal number of float16, 2**-14, are raised to it: a smaller one would lose digits or
    become zero. A larger scale clips nothing but rounds more coarsely, so that each such tensor has a warning; channels
    whose weights are all zero have none.

    Raises:
        ExportError: a constant is beyond float16's largest number, 65504, or the graph cannot be raised to opset 19.
    """
    raised = _raised(model)
    graph = raised.graph
    kept = _kept_in_float32(raised)
    scales = {node.input[1] for node in graph.node if node.op_type in _QDQ}
    living = _largest_steps(raised)
    notes: list[str] = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept:
            values = numpy_helper.to_array(tensor)
            if tensor.name in scales:
                values, note = _half_scale(tensor.name, values, living.get(tensor.name))
                notes += [note] if note else []
            tensor.CopyFrom(numpy_helper.from_array(_half(tensor.name, values), tensor.name))
    for node in graph.node:
        _convert_attributes_(node)
    _cast_ends_(raised)
    del graph.value_info[:]
    return HalfModel(raised, tuple(notes))


def _raised(model: ModelProto) -> ModelProto:
    """A copy at opset 19 or what it has above."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset >= OPSET_HALF:
        copy = ModelProto()
        copy.CopyFrom(model)
        return copy
    try:
        raised = version_converter.convert_version(model, OPSET_HALF)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ExportError(
            f"The graph is of opset {opset} and cannot be raised to {OPSET_HALF}, the first in which QuantizeLinear "
            f"has float16: {' '.join(str(error).split())[:200]}. Export it again at opset {OPSET_HALF}."
        ) from error
    # Opset 19 came with version 9 of the file format. The converter drops the metadata in some releases.
    raised.ir_version = max(model.ir_version, 9)
    del raised.metadata_props[:]
    raised.metadata_props.extend(model.metadata_props)
    return raised


def _stored_tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        yield from (item.t for item in node.attribute if item.type == onnx.AttributeProto.TENSOR)


def _kept_in_float32(model: ModelProto) -> set[str]:
    """Names of constants that every reader wants in float32."""
    return {
        name
        for node in model.graph.node
        for position, name in enumerate(node.input)
        if (node.op_type, position) in _FLOAT32_INPUTS
    }


def _largest_steps(model: ModelProto) -> dict[str, np.ndarray]:
    """max|w| per scale of every quantized weight, by the scale's name, where the file has the numbers."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in stored and node.input[1] in stored:
            values = np.abs(numpy_helper.to_array(stored[node.input[0]]))
            axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
            per_channel = numpy_helper.to_array(stored[node.input[1]]).size > 1
            others = tuple(i for i in range(values.ndim) if not per_channel or i != axis % values.ndim)
            found[node.input[1]] = values.max(axis=others, initial=0)
    return found


def _half_scale(name: str, scale: np.ndarray, largest: np.ndarray | None) -> tuple[np.ndarray, str]:
    """A scale that float16 holds, and what was changed in it."""
    small = scale < HALF_SMALLEST_NORMAL
    counted = small if largest is None or largest.shape != scale.shape else small & (largest > 0)
    note = ""
    if counted.any():
        note = (
            f"{int(counted.sum())} of {scale.size} scales of {name} are below {HALF_SMALLEST_NORMAL:.3g}, float16's "
            f"smallest normal number, the least is {scale[counted].min():.3g}. They were raised to it, which rounds "
            "more coarsely. Leave the layer in float if the accuracy drops."
        )
    return np.where(small & (scale >= 0), HALF_SMALLEST_NORMAL, scale), note


def _half(name: str, values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    if finite.size and np.abs(finite).max() > _HALF_MAXIMUM:
        raise ExportError(
            f"Constant {name} holds {np.abs(finite).max():.6g}; float16 ends at {_HALF_MAXIMUM:g}. Leave the graph in "
            "FP32, or scale the layer's weights down."
        )
    return values.astype(np.float16)


def _convert_attributes_(node: NodeProto) -> None:
    """Makes float16 of the float32 constants and types that a node carries."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.TENSOR and item.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(item.t)
            item.t.CopyFrom(numpy_helper.from_array(_half(node.name, values), item.t.name))
        elif (
            node.op_type in ("Cast", "EyeLike", "RandomNormal", "RandomUniform")
            and item.name in ("to", "dtype")
            and (item.i == TensorProto.FLOAT)
        ):
            item.i = TensorProto.FLOAT16
        elif node.op_type == "Constant" and item.name in ("value_float", "value_floats"):
            values = np.array(item.f if item.name == "value_float" else list(item.floats), np.float32)
            item.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(_half(node.name, values))))


def _cast_ends_(model: ModelProto) -> None:
    """Puts a cast behind every float32 input and before every float32 output of the graph."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    for position, entry in enumerate(graph.input):
        if entry.type.tensor_type.elem_type == TensorProto.FLOAT and entry.name not in constants:
            half = f"{entry.name}.half"
            _rename_(graph, entry.name, half, outputs=False)
            cast = helper.make_node("Cast", [entry.name], [half], name=f"{entry.name}/half", to=TensorProto.FLOAT16)
            graph.node.insert(position, cast)
    for entry in graph.output:
        if entry.type.tensor_type.elem_type == TensorProto.FLOAT:
            half = f"{entry.name}.half"
            _rename_(graph, entry.name, half, outputs=True)
            graph.node.append(
                helper.make_node("Cast", [half], [entry.name], name=f"{entry.name}/float", to=TensorProto.FLOAT)
            )


def _rename_(graph: onnx.GraphProto, old: str, new: str, *, outputs: bool) -> None:
    """Renames a tensor in the inputs of all nodes, and in their outputs if asked."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        if outputs:
            node.output[:] = [new if name == old else name for name in node.output]
