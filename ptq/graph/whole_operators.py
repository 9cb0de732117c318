"""How does a Q/DQ graph become one whose operators ONNX Runtime computes in INT8?

ONNX Runtime replaces DQ -> operator -> Q by one operator on integers, and leaves an operator in float of which one
input, or the output, is not quantized. The quantizers that this takes are placed by `quantization.rules`, as those of
the dialect `onnxruntime`; here they are removed for the other dialects, and wired for this one.
"""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ptq.graph.operations import DEQUANTIZE, QUANTIZE

# Of a channel whose weights are all zero; and what an int32 holds.
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)
_LARGEST_CODE = 2**31 - 1


def remove_pairs_(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Removes the Q/DQ pairs of activation quantizers, whose readers read the bare tensor then.

    Args:
        model: a Q/DQ graph whose scales are named `<quantizer>.scale`.
        names: of the quantizers.
    """
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
            helper.make_node(QUANTIZE, [output, scale, zero_point], [codes], name=f"{output}.quantize"),
            helper.make_node(DEQUANTIZE, [codes, scale, zero_point], [renamed[output]], name=f"{output}.dequantize"),
        ]
        dequantizes[renamed[output]] = ordered[-1]
    _set_nodes_(graph, ordered)


def _quantize_biases_(graph: onnx.GraphProto) -> None:
    """The bias of a Gemm in steps of its products, which ONNX Runtime does by itself for convolutions alone."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    scales = {node.output[0]: constants.get(node.input[1]) for node in graph.node if node.op_type == DEQUANTIZE}
    ordered: list[onnx.NodeProto] = []
    for node in graph.node:
        of_products = [scales.get(name) for name in node.input[:2]]
        if node.op_type == "Gemm" and None not in of_products and len(node.input) > 2 and node.input[2] in constants:
            name = node.input[2]
            bias = numpy_helper.to_array(constants[name])
            step = np.float32(1) * np.multiply(*(numpy_helper.to_array(scale) for scale in of_products if scale))
            step = np.broadcast_to(np.maximum(step, _SMALLEST_STEP), bias.shape)
            codes = np.clip(np.rint(bias / step.astype(np.float64)), -_LARGEST_CODE, _LARGEST_CODE).astype(np.int32)
            graph.initializer.extend(
                [
                    numpy_helper.from_array(codes, f"{name}.codes"),
                    numpy_helper.from_array(np.ascontiguousarray(step, dtype=np.float32), f"{name}.scale"),
                ]
            )
            pair = [f"{name}.codes", f"{name}.scale"], [f"{name}.dequantized"]
            ordered.append(helper.make_node(DEQUANTIZE, *pair, name=f"{name}.dequantize", axis=0))
            node.input[2] = f"{name}.dequantized"
        ordered.append(node)
    _set_nodes_(graph, ordered)


def _set_nodes_(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
