"""How does a template become the Q/DQ graph of one candidate?"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from ptq.config import Dialect
from ptq.dialect import amax_bound, zero_point_of
from ptq.errors import ExportError
from ptq.graph.whole_operators import quantize_whole_operators_, remove_pairs_
from ptq.records.plan import PlacementPlan

_QDQ = ("QuantizeLinear", "DequantizeLinear")


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
        dialect: `tensorrt` for int8 throughout; `cpu` and `onnxruntime` for uint8 where a tensor is never negative,
            the latter with all that its operators read and write quantized.
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
        zero_point = zero_point_of(spec, dialect)
        for suffix, value in (("scale", scale), ("zero_point", zero_point)):
            name = f"{spec.name}.{suffix}"
            initializers[name].CopyFrom(numpy_helper.from_array(value, name))
    if biases is not None:
        for layer, name in bias_names(model, plan).items():
            if layer in biases:
                initializers[name].CopyFrom(numpy_helper.from_array(np.asarray(biases[layer], dtype=np.float32), name))
    remove_pairs_(model, {spec.name for spec in plan.activations if spec.dialect not in (None, dialect)})
    if dialect == "onnxruntime":
        quantize_whole_operators_(model)
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
    nodes = layer_nodes(model, plan)
    return [
        LayerParameters(
            name=layer,
            weight=numpy_helper.to_array(initializers[f"{layer}.weight"]),
            scale=numpy_helper.to_array(initializers[f"{layer}.weight.scale"]),
            bias=numpy_helper.to_array(initializers[bias]),
            groups=groups_of(nodes[layer]),
        )
        for layer, bias in bias_names(model, plan).items()
    ]


def groups_of(node: onnx.NodeProto) -> int:
    """Returns the groups of a convolution; 1 for any other node."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def layer_nodes(model: onnx.ModelProto, plan: PlacementPlan) -> dict[str, onnx.NodeProto]:
    """Returns the node of every quantized layer, found through its weight: weight -> Q -> DQ (-> Transpose) -> node."""
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


def bias_names(model: onnx.ModelProto, plan: PlacementPlan) -> dict[str, str]:
    """Returns the initializer that holds the bias of every quantized layer that has one, by layer name."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    names = {}
    for layer, node in layer_nodes(model, plan).items():
        if len(node.input) > 2 and node.input[2] in initializers:
            names[layer] = node.input[2]
        elif f"{layer}.bias" in initializers:  # a linear layer on tokens is MatMul and Add
            names[layer] = f"{layer}.bias"
    return names
