"""How does a model become ONNX, and a candidate a Q/DQ graph?

Exports once and quantizes many times: the template graph carries one scale and one zero point initializer per
quantizer, named after it, and a candidate is the template with other scales. Weights stay float32 behind
their Q, which every TensorRT generation reads. What is wrong with a graph is found in `ptq.checks`.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import nn

from ptq.errors import ExportError
from ptq.graph.names import observed_output
from ptq.networks.fake_quant import QUANTIZER_PREFIX, exportable_fake_quant
from ptq.records.plan import PlacementPlan

OPSET = 17  # the newest that TensorRT 8.6 reads
INPUT_NAME, OUTPUT_NAME = "images", "logits"
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
        with warnings.catch_warnings(), torch.inference_mode(), _without_attention_fast_path(), _without_log():
            warnings.simplefilter("ignore")  # the TorchScript exporter announces its own deprecation
            torch.onnx.export(
                model,
                (example,),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=names,
                dynamic_axes=dynamic,
                do_constant_folding=False,
                # Layers with equal parameters would be given one of them, and quantizers are found by their names.
                keep_initializers_as_inputs=True,
            )
    except Exception as error:  # the exporter raises whatever the model's forward or a symbolic function raises
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX: {str(error).splitlines()[0][:200]}. Expected a "
            "network of operations that ONNX opset 17 has; rewrite the operation named, or quantize an ONNX file."
        ) from error
    graph = gs.import_onnx(onnx.load(path))
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, gs.Constant)]
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


@contextmanager
def _without_log() -> Iterator[None]:
    """Keeps the exporter from printing the whole graph where it lacks an operator; what it raises names that."""
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


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


class HalfPrecision(nn.Module):
    """A model in float16 with float32 input and output, for FP16 engines that read the types of the graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits as float32."""
        return self.model(images.half()).float()
