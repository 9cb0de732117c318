"""How does a Q/DQ graph become one whose operators ONNX Runtime computes in INT8?

ONNX Runtime replaces DQ -> operator -> Q by one operator on integers, and leaves an operator in float of which one
input, or the output, is not quantized. The quantizers that this takes are placed by `quantization.rules`, as those of
the dialect `onnxruntime`; here they are removed for the other dialects, and wired for this one.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from jaxtyping import Float
from onnx import helper, numpy_helper

from ptq.graph.operations import CONVOLUTIONS, DEQUANTIZE, QUANTIZE
from ptq.graph.walk import dequantizes_behind

# The name of the Q behind a concat ends so.
AGAIN = ".quantize_again"
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)
# Half of what an int32 holds: the products are added to the bias.
_LARGEST_CODE = 2**30


def remove_pairs_(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Removes the Q/DQ pairs of activation quantizers, whose readers read the bare tensor then.

    Args:
        model: a Q/DQ graph whose scales are named `<quantizer>.scale`.
        names: of the quantizers.
    """
    if not names:
        return
    graph, scales = model.graph, {f"{name}.scale" for name in names}
    bare: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE) and node.input[1] in scales:
            bare[node.output[0]] = bare.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    for node in kept:
        for position, name in enumerate(node.input):
            node.input[position] = bare.get(name, name)
    unused = scales | {f"{name}.zero_point" for name in names}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in unused]:
        graph.initializer.remove(tensor)
    _set_nodes_(graph, kept)


def quantize_whole_operators_(model: onnx.ModelProto) -> None:
    """Lets every reader of a quantized tensor read it quantized, and quantizes concats of such and biases of Gemm."""
    _share_pairs_(model.graph)
    _quantize_concats_(model.graph)
    _widen_scales_(model.graph)
    _quantize_biases_(model.graph)


def _share_pairs_(graph: onnx.GraphProto) -> None:
    """One pair on each tensor, directly behind what writes it, for all that reads the tensor."""
    constants = {tensor.name for tensor in graph.initializer}
    dequantizes = {node.input[0]: node for node in graph.node if node.op_type == DEQUANTIZE}
    pairs: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        tensor = node.input[0] if node.op_type == QUANTIZE and node.output[0] in dequantizes else ""
        if tensor and tensor not in constants and tensor not in pairs:
            pairs[tensor] = [node, dequantizes[node.output[0]]]
    moved = {id(node) for pair in pairs.values() for node in pair}
    ordered = [node for each in graph.input for node in pairs.get(each.name, ())]
    for node in graph.node:
        if id(node) in moved:
            continue
        for position, name in enumerate(node.input):
            if name in pairs and node.op_type not in ("Shape", QUANTIZE):
                node.input[position] = pairs[name][1].output[0]
        ordered.append(node)
        ordered += [each for name in node.output for each in pairs.get(name, ())]
    _set_nodes_(graph, ordered)


def _quantize_concats_(graph: onnx.GraphProto) -> None:
    """Behind a concat of tensors of one scale comes a pair with that scale, which changes no number."""
    dequantizes = {node.output[0]: node for node in graph.node if node.op_type == DEQUANTIZE}
    quantized = {node.input[0] for node in graph.node if node.op_type == QUANTIZE}
    ordered: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        ordered.append(node)
        grids = {tuple(dequantizes[name].input[1:]) if name in dequantizes else () for name in node.input}
        if node.op_type != "Concat" or len(grids) != 1 or () in grids or node.output[0] in quantized:
            continue
        (output,), ((scale, zero_point),) = node.output, grids
        codes, renamed[output] = f"{output}.quantized", f"{output}.dequantized"
        ordered += [
            helper.make_node(QUANTIZE, [output, scale, zero_point], [codes], name=f"{output}{AGAIN}"),
            helper.make_node(
                DEQUANTIZE, [codes, scale, zero_point], [renamed[output]], name=f"{output}.dequantize_again"
            ),
        ]
        dequantizes[renamed[output]] = ordered[-1]
    _set_nodes_(graph, ordered)


def _widen_scales_(graph: onnx.GraphProto) -> None:
    """Weight scales at which each bias fits an int32 in steps of its products: larger ones for nearly dead channels."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    writers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type not in (*CONVOLUTIONS, "Gemm") or len(node.input) < 3 or node.input[2] not in constants:
            continue
        scales = [_scale_behind(name, writers) for name in node.input[:2]]
        if any(name not in constants for name in scales):
            continue
        step, scale = (numpy_helper.to_array(constants[name]) for name in scales)
        bias = numpy_helper.to_array(constants[node.input[2]])
        if step.size != 1 or scale.size not in (1, bias.size):
            continue
        least = least_scale(bias, step)
        widened = np.maximum(scale, least if scale.size > 1 else least.max()).astype(np.float32)
        constants[scales[1]].CopyFrom(numpy_helper.from_array(widened.reshape(scale.shape), scales[1]))


def least_scale(bias: Float[np.ndarray, " out"], step: Float[np.ndarray, "..."]) -> Float[np.ndarray, " out"]:
    """Returns the least weight scale of each output channel at which its bias fits an int32.

    Args:
        bias: in activation units.
        step: the scale of what the layer reads.
    """
    return np.abs(bias) / (step.ravel()[0].astype(np.float64) * _LARGEST_CODE)


def _scale_behind(tensor: str, writers: Mapping[str, onnx.NodeProto]) -> str:
    """The scale of the DQs that a tensor comes from, empty where there is none or another one for each."""
    scales = {node.input[1] for node in dequantizes_behind(tensor, writers)}
    return scales.pop() if len(scales) == 1 else ""


def _quantize_biases_(graph: onnx.GraphProto) -> None:
    """The bias of a Gemm in steps of its products, which ONNX Runtime does by itself for convolutions alone."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    writers = {name: node for node in graph.node for name in node.output}
    ordered: list[onnx.NodeProto] = []
    for node in graph.node:
        scales = [_scale_behind(name, writers) for name in node.input[:2]] if node.op_type == "Gemm" else [""]
        if all(name in constants for name in scales) and len(node.input) > 2 and node.input[2] in constants:
            bias = numpy_helper.to_array(constants[node.input[2]])
            step = np.multiply(*(numpy_helper.to_array(constants[name]) for name in scales))
            step = np.broadcast_to(np.maximum(step, _SMALLEST_STEP), bias.shape).astype(np.float32)
            codes = np.rint(bias / step.astype(np.float64)).astype(np.int32)
            name = node.output[0]
            for suffix, values in (("codes", codes), ("scale", np.ascontiguousarray(step))):
                graph.initializer.append(numpy_helper.from_array(values, f"{name}.bias.{suffix}"))
            pair = [f"{name}.bias.codes", f"{name}.bias.scale"], [f"{name}.bias.dequantized"]
            ordered.append(helper.make_node(DEQUANTIZE, *pair, name=f"{name}.bias.dequantize", axis=0))
            node.input[2] = f"{name}.bias.dequantized"
        ordered.append(node)
    _set_nodes_(graph, ordered)
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _set_nodes_(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
