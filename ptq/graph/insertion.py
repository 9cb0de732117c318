"""How does a placement plan become Q/DQ pairs in an ONNX graph?

Writes the files that the PyTorch way exports, from a graph in canonical form: the observed graph for calibration and
the Q/DQ template, whose initializers are named after their quantizers. Where pairs go was decided in
`quantization.rules`.
"""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ptq.config import WeightMethod
from ptq.errors import ExportError
from ptq.graph.canonical import save_graph
from ptq.graph.names import observed_output
from ptq.numerics.amax import amax_from_weight
from ptq.records.plan import PlacementPlan, QuantizerSpec


def write_observed(graph_file: Path, path: Path, *, plan: PlacementPlan) -> None:
    """Writes a canonical graph for batch 1 with every observed tensor as an output behind the logits."""
    graph = gs.import_onnx(onnx.load(graph_file))
    tensors = graph.tensors()
    for end in (*graph.inputs, *graph.outputs):
        end.shape = [1, *end.shape[1:]]
    for spec in plan.activations:
        output = gs.Variable(observed_output(spec.name), dtype=np.float32)
        graph.nodes.append(
            gs.Node("Identity", f"{spec.name}.observe", inputs=[tensors[spec.observed]], outputs=[output])
        )
        graph.outputs.append(output)
    save_graph(graph.toposort(), path)


def write_qdq_template(
    graph_file: Path, path: Path, *, plan: PlacementPlan, weight_method: WeightMethod = "max"
) -> None:
    """Writes the Q/DQ template of a canonical graph: weight scales set, every activation's scale 1 / 127, int8.

    Args:
        graph_file: a graph as `onnx_canonical` leaves it.
        path: file to write.
        plan: where quantizers go.
        weight_method: how the amax of each output channel's weights is chosen.

    Raises:
        ExportError: the plan is of another graph.
    """
    graph = gs.import_onnx(onnx.load(graph_file))
    tensors, nodes = graph.tensors(), {node.name: node for node in graph.nodes}
    wanted = {name for spec in plan.quantizers for name in spec.tensors} | {spec.name for spec in plan.weights}
    missing = sorted(wanted - set(tensors)) + sorted(
        {reader for spec in plan.activations for reader in spec.readers} - set(nodes)
    )
    if missing:
        raise ExportError(
            f"The placement plan names {', '.join(missing[:3])}, which the graph does not have. Expected the plan of "
            "this graph; prepare the model again."
        )
    for spec in plan.weights:
        _quantize_weight(graph, tensors[spec.name], spec, weight_method)
    for spec in plan.activations:
        scale = gs.Constant(f"{spec.name}.scale", np.array(1 / 127, np.float32))
        zero_point = gs.Constant(f"{spec.name}.zero_point", np.zeros((), np.int8))
        for position, name in enumerate(spec.tensors):
            label = spec.name if len(spec.tensors) == 1 else f"{spec.name}.{position}"
            readers = [nodes[reader] for reader in spec.readers]
            _insert_pair(graph, tensors[name], readers, [scale, zero_point], name=label, axis=None)
    save_graph(graph.cleanup().toposort(), path)


def _quantize_weight(graph: gs.Graph, weight: gs.Constant, spec: QuantizerSpec, method: WeightMethod) -> None:
    axis = spec.axis or 0
    channels = np.moveaxis(weight.values, axis, 0).reshape(weight.values.shape[axis], -1)
    amax = amax_from_weight(np.ascontiguousarray(channels, np.float32), method=method)
    scale = gs.Constant(f"{spec.name}.scale", amax / np.float32(127))
    zero_point = gs.Constant(f"{spec.name}.zero_point", np.zeros(len(amax), np.int8))
    _insert_pair(graph, weight, list(weight.outputs), [scale, zero_point], name=spec.name, axis=axis)


def _insert_pair(
    graph: gs.Graph,
    tensor: gs.Tensor,
    readers: list[gs.Node],
    numbers: list[gs.Constant],
    *,
    name: str,
    axis: int | None,
) -> None:
    """Puts one Q/DQ pair on a tensor and lets the readers read its result."""
    attributes = {} if axis is None else {"axis": axis}
    codes, result = gs.Variable(f"{name}.quantized"), gs.Variable(f"{name}.dequantized")
    quantize = gs.Node("QuantizeLinear", f"{name}.quantize", dict(attributes), [tensor, *numbers], [codes])
    dequantize = gs.Node("DequantizeLinear", f"{name}.dequantize", dict(attributes), [codes, *numbers], [result])
    for reader in readers:
        for position, source in enumerate(reader.inputs):
            if source is tensor:
                reader.inputs[position] = result
    graph.nodes += [quantize, dequantize]
