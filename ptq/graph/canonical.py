"""Which form do graphs of any exporter take, so that quantizers can be placed and written by name?

Folds constants and BatchNorm, drops what does nothing at inference, frees the batch dimension and gives every node,
tensor and weight one name: a layer's parameters are `<layer>.weight` and `<layer>.bias`, a node's result has the
name of the node. The function of the network stays what it was.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from ptq.errors import CheckpointError
from ptq.graph.names import bias_add, layers_of, module_of, rename_
from ptq.graph.source import OnnxSource
from ptq.graph.transpositions import join_transpositions_, sink_transpositions_

BATCH = "n"
_NOTHING_AT_INFERENCE = ("Identity", "Dropout")


def canonical_graph(source: OnnxSource, *, origin: str) -> gs.Graph:
    """Returns the graph of a source in canonical form, with a dynamic batch dimension.

    Args:
        source: what `source.read_source` found; it is not changed.
        origin: names the file in messages.

    Raises:
        CheckpointError: the graph contradicts itself, or holds control flow.
    """
    with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):  # graphsurgeon logs to the standard output
        try:
            inferred = onnx.shape_inference.infer_shapes(source.model, strict_mode=True, data_prop=True)
            graph = gs.import_onnx(inferred).toposort()
            graph.fold_constants().cleanup().toposort()
        except (onnx.shape_inference.InferenceError, gs.OnnxGraphSurgeonException, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The graph of {origin} cannot be read: {' '.join(str(error).split())[:200]}. Expected shapes that "
                "fit each other; check crop and channels, or export the model again."
            ) from error
    flow = [node for node in graph.nodes if any(isinstance(value, gs.Graph) for value in node.attrs.values())]
    if flow:
        raise CheckpointError(
            f"{origin} branches or loops while it runs: it has {flow[0].op} {flow[0].name}. Expected a plain graph; "
            "export the model in evaluation mode with an example image."
        )
    _remove_nothings_(graph)
    if source.channels_last:
        sink_transpositions_(graph)
    else:
        join_transpositions_(graph)
    _remove_nothings_(graph)
    _fold_batchnorms_(graph)
    _fold_affine_(graph)
    for node in graph.nodes:
        if node.op == "Gemm":
            _weights_first_(node)
    _own_parameters_(graph)
    if source.batch_size is not None:
        _free_reshapes_(graph, source.batch_size)
    _free_batch_(graph)
    _flatten_output_(graph)
    graph.cleanup().toposort()
    rename_(graph)
    return graph


def with_shapes(graph: gs.Graph) -> gs.Graph:
    """Returns a copy of a graph whose tensors have the shapes that inference finds."""
    return gs.import_onnx(onnx.shape_inference.infer_shapes(gs.export_onnx(graph), data_prop=True)).toposort()


def read_graph(path: Path) -> gs.Graph:
    """Returns a canonical graph that `save_graph` has written, with the shapes that inference finds."""
    return with_shapes(gs.import_onnx(onnx.load(path)))


def save_graph(graph: gs.Graph, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a graph; its bytes depend on the arguments alone. Metadata names are prefixed with `ptq.`."""
    model = gs.export_onnx(graph)
    # Shapes between input and output are inferred by every reader, and Q/DQ pairs would contradict those kept here.
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")  # what came from a data file says so, though it is here now
    model.ir_version = max(8, onnx.helper.find_min_ir_version_for(model.opset_import))
    model.producer_name, model.producer_version, model.doc_string = "ptq", "", ""
    for key, text in sorted((metadata or {}).items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = f"ptq.{key}", text
    path.write_bytes(model.SerializeToString(deterministic=True))


def _remove_nothings_(graph: gs.Graph) -> None:
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        if not _is_nothing(node) or any(tensor.outputs for tensor in node.outputs[1:]):
            continue
        source, result = node.inputs[0], node.outputs[0]
        if id(result) in outputs:
            if not source.inputs or len(source.outputs) != 1:
                continue  # the graph's output must keep its name, and the source another reader
            writer = source.inputs[0]
            node.outputs.clear()
            writer.outputs[writer.outputs.index(source)] = result
        else:
            for reader in list(result.outputs):
                for position, tensor in enumerate(reader.inputs):
                    if tensor is result:
                        reader.inputs[position] = source
            node.outputs.clear()
        node.inputs.clear()
    graph.cleanup().toposort()


def _is_nothing(node: gs.Node) -> bool:
    """Whether a node hands on what it reads: at inference, or as a cast to the type that it reads."""
    if node.op == "Cast":
        return node.inputs[0].dtype == np.float32 and node.attrs["to"] == onnx.TensorProto.FLOAT
    return node.op in _NOTHING_AT_INFERENCE


def _fold_batchnorms_(graph: gs.Graph) -> None:
    """Makes every BatchNorm part of the convolution before it, if nothing else reads what that writes."""
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        if node.op != "BatchNormalization" or node.attrs.get("training_mode"):
            continue
        between = node.inputs[0]
        writer = between.inputs[0] if len(between.inputs) == len(between.outputs) == 1 else None
        if writer is None or writer.op not in ("Conv", "ConvTranspose"):
            continue
        constants = [*writer.inputs[1:], *node.inputs[1:5]]
        if id(between) in outputs or not all(isinstance(tensor, gs.Constant) for tensor in constants):
            continue
        _fold_batchnorm_(writer, node)
    graph.cleanup().toposort()


def _fold_affine_(graph: gs.Graph) -> None:
    """Makes factors and shifts per channel behind a convolution part of it, as exporters write BatchNorm too."""
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        position = next((at for at, tensor in enumerate(node.inputs) if isinstance(tensor, gs.Constant)), None)
        if node.op not in _AFFINE or position is None or len(node.inputs) != 2 or (node.op == "Div" and position == 0):
            continue
        between = node.inputs[1 - position]
        writer = between.inputs[0] if len(between.inputs) == len(between.outputs) == 1 else None
        if writer is None or writer.op != "Conv" or id(between) in outputs:
            continue
        if (
            not all(isinstance(tensor, gs.Constant) for tensor in writer.inputs[1:])
            or len(writer.inputs[1].outputs) > 1
        ):
            continue
        weight, constant = writer.inputs[1].values.astype(np.float64), node.inputs[position].values.astype(np.float64)
        channels = len(weight)
        if channels == 1 or constant.size != channels or constant.shape[-3:] != (channels, 1, 1):
            continue
        shift = np.zeros(channels) if len(writer.inputs) < 3 else writer.inputs[2].values.astype(np.float64)
        factor, shift = _AFFINE[node.op](shift, constant.ravel(), position)
        weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        writer.inputs = [
            writer.inputs[0],
            gs.Constant(writer.inputs[1].name, _float32(weight)),
            gs.Constant(f"{writer.name or between.name}#bias", _float32(shift)),
        ]
        result = node.outputs[0]
        node.outputs.clear()
        writer.outputs = [result]
    graph.cleanup().toposort()


# What a constant per channel behind a convolution makes of its bias: the factor of the weights, and the new bias. The
# constant is the first or the second of what the operator reads.
_AFFINE: dict[str, Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]] = {
    "Add": lambda bias, constant, _: (np.ones_like(bias), bias + constant),
    "Sub": lambda bias, constant, position: (
        np.full_like(bias, 1 if position else -1),
        bias - constant if position else constant - bias,
    ),
    "Mul": lambda bias, constant, _: (constant, bias * constant),
    "Div": lambda bias, constant, _: (1 / constant, bias / constant),
}


def _fold_batchnorm_(conv: gs.Node, norm: gs.Node) -> None:
    """Makes factor and shift of a convolution's output part of its weight and bias.

    y = (x - mean) * gamma / sqrt(variance + epsilon) + beta.
    """
    gamma, beta, mean, variance = (tensor.values.astype(np.float64) for tensor in norm.inputs[1:5])
    factor = gamma / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
    weight = conv.inputs[1].values.astype(np.float64)
    bias = conv.inputs[2].values.astype(np.float64) if len(conv.inputs) > 2 else np.zeros_like(mean)
    if conv.op == "Conv":
        weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    else:  # (in, out / groups, ...): a group of inputs writes a run of outputs
        groups = conv.attrs.get("group", 1)
        per_input = factor.reshape(groups, -1).repeat(len(weight) // groups, axis=0)
        weight = weight * per_input.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    name = norm.name or norm.outputs[0].name
    conv.inputs = [
        conv.inputs[0],
        gs.Constant(conv.inputs[1].name if module_of(conv.inputs[1].name) else f"{name}#weight", _float32(weight)),
        gs.Constant(f"{name}#bias", _float32((bias - mean) * factor + beta)),
    ]
    result = norm.outputs[0]
    norm.outputs.clear()
    conv.outputs = [result]


def _float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def _weights_first_(node: gs.Node) -> None:
    """Stores a linear layer's weight as (out, in), as PyTorch has it, with alpha and beta in weight and bias."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or node.attrs.get("transA", 0):
        return
    values = weight.values * np.float32(node.attrs.get("alpha", 1.0))
    values = values if node.attrs.get("transB", 0) else values.T
    attributes = {"transB": 1}
    node.inputs[1] = gs.Constant(weight.name, _float32(values))
    if len(node.inputs) > 2:
        bias = node.inputs[2]
        if isinstance(bias, gs.Constant) and bias.values.size in (1, len(values)):
            scaled = bias.values.ravel() * np.float32(node.attrs.get("beta", 1.0))
            node.inputs[2] = gs.Constant(bias.name, _float32(np.broadcast_to(scaled, len(values))))
        else:
            attributes["beta"] = node.attrs.get("beta", 1.0)
    node.attrs = attributes


def _own_parameters_(graph: gs.Graph) -> None:
    """Gives each layer a bias of its own, and a weight of its own unless nodes of one layer share it."""
    owners: dict[int, str] = {}
    for layer in layers_of(graph):
        node: gs.Node = layer.node
        weight: gs.Constant = layer.weight
        kind = f"{node.op} {layer.axis}"
        if owners.setdefault(id(weight), kind) != kind or any(reader.op != node.op for reader in weight.outputs):
            node.inputs[1] = gs.Constant(weight.name, weight.values)
        if isinstance(layer.bias, gs.Constant) and len(layer.bias.outputs) > 1:
            node.inputs[2] = gs.Constant(layer.bias.name, layer.bias.values)
        add = bias_add(graph, node)
        if add is not None:
            position = next(index for index, tensor in enumerate(add.inputs) if isinstance(tensor, gs.Constant))
            add.inputs[position] = gs.Constant(add.inputs[position].name, add.inputs[position].values)


def _free_reshapes_(graph: gs.Graph, batch_size: int) -> None:
    """Replaces what a Reshape has written down of the batch size by "whatever is left", or by "as it comes"."""
    for node in graph.nodes:
        target = node.inputs[1] if node.op == "Reshape" and len(node.inputs) > 1 else None
        if not isinstance(target, gs.Constant) or node.attrs.get("allowzero", 0) or not target.values.size:
            continue
        sizes = target.values.tolist()
        if min(sizes) > 0:
            sizes[0] = -1
        elif sizes[0] == batch_size:
            sizes[0] = 0
        node.inputs[1] = gs.Constant(f"{target.name}#{node.name}", np.array(sizes, dtype=np.int64))


def _free_batch_(graph: gs.Graph) -> None:
    """Makes the batch dimension dynamic; shapes between input and output are inferred anew where they are needed."""
    ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and id(tensor) not in ends:
            tensor.shape = None
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.shape = [BATCH, *list(tensor.shape or [None])[1:]]


def _flatten_output_(graph: gs.Graph) -> None:
    """Turns logits (n, classes, 1, 1) into (n, classes)."""
    result = graph.outputs[0]
    sizes = list(result.shape[1:])
    if len(sizes) < 2 or any(size != 1 for size in sizes[1:]):
        return
    writer = result.inputs[0]
    inner = gs.Variable(f"{result.name}#unflattened", dtype=result.dtype)
    writer.outputs[writer.outputs.index(result)] = inner
    result.shape = [BATCH, sizes[0]]
    graph.nodes.append(
        gs.Node("Flatten", name=f"{result.name}.flatten", attrs={"axis": 1}, inputs=[inner], outputs=[result])
    )
