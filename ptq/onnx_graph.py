"""How does a model become ONNX, and a candidate a Q/DQ graph?

Exports once and quantizes many times: the template graph carries one scale and one zero point initializer per
quantizer, named after it, and a candidate is the template with other scales. Weights stay float32 behind
their Q, which every TensorRT generation reads. What is wrong with a graph is found in `graph_checks`.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from onnx import numpy_helper
from torch import nn

from ptq.config import Dialect
from ptq.dialect import amax_bound, is_unsigned
from ptq.errors import ExportError
from ptq.fake_quant import QUANTIZER_PREFIX, exportable_fake_quant
from ptq.records.plan import PlacementPlan

OPSET = 17  # the newest that TensorRT 8.6 reads
INPUT_NAME, OUTPUT_NAME = "images", "logits"
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_TRANSPARENT = ("Identity", "Cast")


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    input_shape: tuple[int, int, int],
    batch_size: int | None = None,
    observed: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `model` as ONNX, opset 17, deterministic bytes.

    Args:
        model: in `eval()`; returns logits, or (logits, *observed).
        path: file to write.
        input_shape: (c, h, w).
        batch_size: the static batch dimension, in images; None for a dynamic one.
        observed: names of the outputs behind the logits.
        metadata: entries of the file's metadata, their names prefixed with `ptq.`.

    Raises:
        ExportError: the exporter fails.
    """
    names = [OUTPUT_NAME, *(observed_output(name) for name in observed)]
    dynamic = {name: {0: "n"} for name in (INPUT_NAME, *names)} if batch_size is None else None
    example = torch.zeros(batch_size or 1, *input_shape)
    try:
        # nn.MultiheadAttention's fast path is one fused operator that ONNX does not have.
        with warnings.catch_warnings(), torch.inference_mode(), _without_attention_fast_path():
            warnings.simplefilter("ignore")  # the TorchScript exporter announces its own deprecation
            torch.onnx.export(
                model, (example,), str(path), dynamo=False, opset_version=OPSET, input_names=[INPUT_NAME],
                output_names=names, dynamic_axes=dynamic, do_constant_folding=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises whatever the model's forward or a symbolic function raises
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX: {str(error).splitlines()[0][:200]}. Expected a "
            "network of operations that ONNX opset 17 has; rewrite the operation named, or quantize an ONNX file."
        ) from error
    graph = gs.import_onnx(onnx.load(path))
    _inline_constants_(graph)
    _save(graph, path, metadata or {})


@contextmanager
def _without_attention_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def observed_output(name: str) -> str:
    """Returns the name of the graph output that carries the observed tensor `name`."""
    return f"observed.{name}"


def _inline_constants_(graph: gs.Graph) -> None:
    """Replaces Constant, Identity and Cast of constants by initializers: scales and zero points become such."""
    for node in graph.nodes:
        for position, tensor in enumerate(node.inputs):
            value = _constant_value(tensor)
            if value is not None and not isinstance(tensor, gs.Constant):
                node.inputs[position] = gs.Constant(f"{node.name or node.op}.{position}", value)
    graph.cleanup().toposort()


def _constant_value(tensor: gs.Tensor) -> np.ndarray | None:
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    if len(tensor.inputs) != 1:
        return None
    producer = tensor.inputs[0]
    if producer.op == "Constant":
        value = producer.attrs["value"]
        return np.asarray(value.values if hasattr(value, "values") else value)
    if producer.op in _TRANSPARENT:
        value = _constant_value(producer.inputs[0])
        if value is not None and producer.op == "Cast":
            return value.astype(onnx.helper.tensor_dtype_to_np_dtype(producer.attrs["to"]))
        return value
    return None


def _save(graph: gs.Graph, path: Path, metadata: Mapping[str, str]) -> None:
    model = gs.export_onnx(graph)
    model.ir_version = 8
    model.producer_name, model.producer_version, model.doc_string = "ptq", "", ""
    for key in sorted(metadata):
        entry = model.metadata_props.add()
        entry.key, entry.value = f"ptq.{key}", metadata[key]
    path.write_bytes(model.SerializeToString(deterministic=True))


def export_qdq_template(
    fake_quant: nn.Module,
    path: Path,
    *,
    plan: PlacementPlan,
    input_shape: tuple[int, int, int],
    batch_size: int | None = None,
) -> None:
    """Writes a fake-quantized model as a Q/DQ graph whose scales are named after their quantizers.

    Args:
        fake_quant: the model of `fake_quant.fake_quant_from_folded`.
        path: file to write.
        plan: the plan it was built from.
        input_shape: (c, h, w).
        batch_size: the static batch dimension, in images; None for a dynamic one.

    Raises:
        ExportError: the exporter fails, or a quantizer of the plan is not in the graph.
    """
    with exportable_fake_quant():
        export_onnx(fake_quant, path, input_shape=input_shape, batch_size=batch_size)
    graph = gs.import_onnx(onnx.load(path))
    quantizers = _quantizer_of_each_node(graph, plan)
    found = set(quantizers.values())
    missing = [spec.name for spec in plan.quantizers if spec.name not in found]
    if missing:
        raise ExportError(
            f"{len(missing)} of {len(plan.quantizers)} quantizers are not in the exported graph: "
            f"{', '.join(missing[:3])}. Expected one Q/DQ pair for each; the exporter has dropped or merged them."
        )
    axes = {spec.name: spec.axis for spec in plan.quantizers}
    shared: dict[tuple[str, str], gs.Constant] = {}
    for node in graph.nodes:
        name = quantizers.get(node.name)
        if name is None:
            continue
        for position, suffix in ((1, "scale"), (2, "zero_point")):
            key = (name, suffix)
            if key not in shared:
                shared[key] = gs.Constant(f"{name}.{suffix}", np.asarray(node.inputs[position].values))
            node.inputs[position] = shared[key]
        axis = axes[name]
        node.attrs = {} if axis is None or shared[(name, "scale")].values.ndim == 0 else {"axis": axis}
    graph.cleanup().toposort()
    _save(graph, path, {})


def _quantizer_of_each_node(graph: gs.Graph, plan: PlacementPlan) -> dict[str, str]:
    """Returns the quantizer of every Q and DQ node, by node name."""
    weights = {f"{spec.readers[0]}.weight": spec.name for spec in plan.weights}
    result: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "QuantizeLinear":
            continue
        source = node.inputs[0]
        name = (
            weights.get(source.name) if isinstance(source, gs.Constant) else _activation_quantizer(node, plan, weights)
        )
        if name is None:
            continue
        result[node.name] = name
        for reader in node.outputs[0].outputs:
            result[reader.name] = name
    return result


def _activation_quantizer(node: gs.Node, plan: PlacementPlan, weights: Mapping[str, str]) -> str | None:
    if plan.traced:
        for part in node.name.split("/"):
            if part.startswith(QUANTIZER_PREFIX):
                return plan.activations[int(part.removeprefix(QUANTIZER_PREFIX + "_").split("_")[0])].name
        return None
    # An untraced model has one quantizer per layer: it is found through the weight that the layer reads.
    for dequantize in node.outputs[0].outputs:
        for layer in dequantize.outputs[0].outputs:
            for tensor in layer.inputs[1:2]:
                weight = tensor
                while weight.inputs:
                    weight = weight.inputs[0].inputs[0]
                if weight.name in weights:
                    return weights[weight.name].removesuffix(".weight")
    return None


def write_candidate(
    template: Path,
    path: Path,
    *,
    plan: PlacementPlan,
    dialect: Dialect,
    activation_amax: Mapping[str, float],
    metadata: Mapping[str, str],
    biases: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes the template with the scales and zero points of one amax table; weights keep the template's scales.

    Args:
        template: the file of `export_qdq_template`.
        path: file to write; its bytes depend on the arguments alone.
        plan: the placement plan.
        dialect: `tensorrt` for int8 throughout, `cpu` for uint8 where a tensor is never negative.
        activation_amax: amax by activation quantizer name, in activation units, positive.
        metadata: entries of the file's metadata, their names prefixed with `ptq.`.
        biases: float32 (channels,) by layer name, in place of the template's; None leaves them. Layers that the plan
            does not quantize keep theirs.

    Raises:
        ExportError: the template lacks a scale of the plan.
    """
    model = onnx.load(template)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for spec in plan.activations:
        for suffix in ("scale", "zero_point"):
            if f"{spec.name}.{suffix}" not in initializers:
                raise ExportError(f"The template has no initializer {spec.name}.{suffix}; export the template again.")
        scale = np.array(activation_amax[spec.name] / amax_bound(spec, dialect), dtype=np.float32)
        zero_point = np.zeros((), dtype=np.uint8 if is_unsigned(spec, dialect) else np.int8)
        for suffix, value in (("scale", scale), ("zero_point", zero_point)):
            name = f"{spec.name}.{suffix}"
            initializers[name].CopyFrom(numpy_helper.from_array(value, name))
    if biases is not None:
        for layer, name in _bias_names(model, plan).items():
            if layer in biases:
                initializers[name].CopyFrom(numpy_helper.from_array(np.asarray(biases[layer], dtype=np.float32), name))
    del model.metadata_props[:]
    for key, text in sorted({**metadata, "dialect": dialect}.items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = f"ptq.{key}", text
    path.write_bytes(model.SerializeToString(deterministic=True))


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Weight, scale per output channel, bias and groups of a quantized layer in a template."""

    name: str
    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    groups: int


def read_layers(template: Path, *, plan: PlacementPlan) -> list[LayerParameters]:
    """Returns the parameters of every quantized layer of a template that has a bias."""
    model = onnx.load(template)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = _layer_nodes(model, plan)
    return [
        LayerParameters(
            name=layer,
            weight=numpy_helper.to_array(initializers[f"{layer}.weight"]),
            scale=numpy_helper.to_array(initializers[f"{layer}.weight.scale"]),
            bias=numpy_helper.to_array(initializers[bias]),
            groups=next((attribute.i for attribute in nodes[layer].attribute if attribute.name == "group"), 1),
        )
        for layer, bias in _bias_names(model, plan).items()
    ]


def _layer_nodes(model: onnx.ModelProto, plan: PlacementPlan) -> dict[str, onnx.NodeProto]:
    """The node of every quantized layer, found through its weight: weight -> Q -> DQ (-> Transpose) -> node."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for layer in plan.quantized_layers:
        tensor = f"{layer}.weight"
        while tensor in readers and readers[tensor][0].op_type in (*_QDQ, "Transpose", "Identity"):
            tensor = readers[tensor][0].output[0]
        if tensor in readers:
            found[layer] = readers[tensor][0]
    return found


def _bias_names(model: onnx.ModelProto, plan: PlacementPlan) -> dict[str, str]:
    """The initializer that holds the bias of every quantized layer that has one, by layer name."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    names = {}
    for layer, node in _layer_nodes(model, plan).items():
        if len(node.input) > 2 and node.input[2] in initializers:
            names[layer] = node.input[2]
        elif f"{layer}.bias" in initializers:  # a linear layer on tokens is MatMul and Add
            names[layer] = f"{layer}.bias"
    return names


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """What a file is: its input shape with None for a dynamic dimension, its logits and its Q/DQ pairs."""

    input_name: str
    input_shape: tuple[int | None, ...]
    output_names: tuple[str, ...]
    outputs: int | None
    quantize_nodes: int
    metadata: dict[str, str]


def summarize_onnx(path: Path) -> GraphSummary:
    """Returns what the ONNX file at `path` is.

    Raises:
        ExportError: there is no such file, or it is not an ONNX model with one image input.
    """
    try:
        model = onnx.load(path)
    except FileNotFoundError as error:
        raise ExportError(f"Model {path} does not exist. Give the path of an ONNX file.") from error
    except Exception as error:  # protobuf and onnx raise several kinds, all meaning: not a model
        raise ExportError(
            f"{path} is not an ONNX model: {str(error).splitlines()[0][:160]}. Give an ONNX file."
        ) from error
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise ExportError(f"{path} has {len(inputs)} inputs; expected one, of images with shape (n, c, h, w).")
    dimensions = inputs[0].type.tensor_type.shape.dim
    return GraphSummary(
        input_name=inputs[0].name,
        input_shape=tuple(d.dim_value if d.HasField("dim_value") else None for d in dimensions),
        output_names=tuple(value.name for value in model.graph.output),
        outputs=_last_dimension(model.graph.output[0]) if model.graph.output else None,
        quantize_nodes=sum(node.op_type == "QuantizeLinear" for node in model.graph.node),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _last_dimension(value: onnx.ValueInfoProto) -> int | None:
    dimensions = value.type.tensor_type.shape.dim
    return dimensions[-1].dim_value if dimensions and dimensions[-1].HasField("dim_value") else None


class HalfPrecision(nn.Module):
    """A model in float16 with float32 input and output, for FP16 engines that read the types of the graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits as float32."""
        return self.model(images.half()).float()
