"""How does a template get weights whose sums of two products fit 16 bits?

For processors without VNNI; see `numerics.saturation`. The scale of an output channel grows where a pair of its weights
could saturate at any input, and nowhere else, so that nothing needs to be known of images.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from jaxtyping import Float
from onnx import helper, numpy_helper

from ptq.graph.candidate import groups_of, layer_nodes
from ptq.graph.operations import DEQUANTIZE, QUANTIZE
from ptq.graph.walk import dequantizes_behind
from ptq.numerics.saturation import LARGEST_INPUT, OPENVINO, SHIFT, Runtime, count_saturated, scales_without_saturation
from ptq.records.plan import PlacementPlan


@dataclass(frozen=True, slots=True)
class GrownScales:
    """How many scales of how many there are have grown, in how many layers, and the largest factor."""

    scales: int
    grown: int
    layers: int
    largest_factor: float


def limit_pair_sums(
    template: Path, path: Path, *, plan: PlacementPlan, runtimes: Collection[Runtime] = OPENVINO
) -> GrownScales:
    """Writes the template with weight scales at which no 16-bit sum of two products can saturate.

    Args:
        template: a Q/DQ template, whose weight scales are set.
        path: file to write; its bytes depend on the arguments alone.
        plan: the placement plan.
        runtimes: whose kernels are to be right.
    """
    model = onnx.load(template)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    axes = {spec.readers[0]: spec.axis or 0 for spec in plan.weights}
    factors: list[Float[np.ndarray, " out"]] = []
    for layer, node in layer_nodes(model, plan).items():
        name = f"{layer}.weight.scale"
        weight = numpy_helper.to_array(initializers[f"{layer}.weight"])
        before = numpy_helper.to_array(initializers[name])
        groups = groups_of(node)
        turned = outputs_first(weight, axes[layer], node.op_type, groups)
        after = scales_without_saturation(
            turned,
            np.tile(np.atleast_1d(before), len(turned) // before.size),
            np.full(turned.shape[1] * groups, LARGEST_INPUT),
            groups=groups,
            runtimes=runtimes,
        )
        # A scale may be that of several rows: one for the tensor, or one for all groups of a ConvTranspose.
        after = after.reshape(-1, before.size).max(axis=0).reshape(before.shape)
        initializers[name].CopyFrom(numpy_helper.from_array(after, name))
        factors.append(np.atleast_1d(after / before))
    path.write_bytes(model.SerializeToString(deterministic=True))
    return GrownScales(
        scales=sum(each.size for each in factors),
        grown=sum(int((each > 1).sum()) for each in factors),
        layers=sum(bool((each > 1).any()) for each in factors),
        largest_factor=max((float(each.max()) for each in factors), default=1.0),
    )


@dataclass(frozen=True, slots=True)
class IntegerLayer:
    """What a layer multiplies: the tensor that it reads, in steps of `scale` from `zero_point`, and integer weights.

    `steps` is (out, inputs of a group, kh, kw), float32; a linear layer is a convolution with a kernel of one position.
    `pads` are rows above, columns left, rows below and columns right.
    """

    activation: str
    scale: float
    zero_point: int
    is_signed: bool
    steps: Float[np.ndarray, "out inputs kh kw"]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1

    def saturated_sums(
        self, activations: Float[np.ndarray, "n ..."], *, runtime: Runtime = "openvino"
    ) -> tuple[int, int]:
        """Returns how many sums of two products exceed 16 bits, and how many there are.

        Args:
            activations: that tensor: (n, channels, h, w), or (..., channels) of a linear layer.
            runtime: whose kernels.
        """
        factors = np.rint(activations / self.scale) + self.zero_point + (SHIFT if self.is_signed else 0)
        if activations.ndim != 4 or self.steps.shape[2:] == (1, 1) and activations.shape[1] != self._channels:
            factors = factors.reshape(-1, self._channels, 1, 1)
        top, left, bottom, right = self.pads
        border = self.zero_point + (SHIFT if self.is_signed else 0)
        padded = np.pad(factors, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=border)
        return count_saturated(
            self.steps,
            padded.astype(np.float32),
            strides=self.strides,
            dilations=self.dilations,
            groups=self.groups,
            runtime=runtime,
        )

    @property
    def _channels(self) -> int:
        return self.steps.shape[1] * self.groups


def integer_layer(model: onnx.ModelProto, output: str) -> IntegerLayer | None:
    """Returns the layer that writes a tensor; None where it is no two-dimensional one with an INT8 input and weight."""
    graph = model.graph
    writers = {name: node for node in graph.node for name in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    node = writers[output]
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    source, turns = node.input[1], []
    while source in writers and writers[source].op_type in ("Transpose", "Identity"):
        if writers[source].op_type == "Transpose":
            turns.append([list(each.ints) for each in writers[source].attribute if each.name == "perm"])
        source = writers[source].input[0]
    weight = writers.get(source)
    grids = _grids_behind(node.input[0], writers, values)
    steps = None if weight is None else _stored_steps(weight, writers, values)
    if steps is None or len(grids) != 1:
        return None
    for given in reversed(turns):
        steps = steps.transpose(given[0] if given else None)
    ((scale, zero_point, is_signed),) = grids
    found = IntegerLayer(node.input[0], scale, zero_point, is_signed, steps)
    if node.op_type == "Conv" and steps.ndim == 4 and attributes.get("auto_pad", b"NOTSET") in (b"", b"NOTSET"):
        return replace(
            found,
            strides=tuple(attributes.get("strides", (1, 1))),
            pads=tuple(attributes.get("pads", (0, 0, 0, 0))),
            dilations=tuple(attributes.get("dilations", (1, 1))),
            groups=int(attributes.get("group", 1)),
        )
    if node.op_type in ("Gemm", "MatMul") and steps.ndim == 2:
        turned = steps if attributes.get("transB", 0) else steps.T
        return replace(found, steps=np.ascontiguousarray(turned)[:, :, None, None])
    return None


def _grids_behind(
    tensor: str, writers: Mapping[str, onnx.NodeProto], values: Mapping[str, onnx.TensorProto]
) -> set[tuple[float, int, bool]]:
    """Scale, zero point and whether it is signed of each DQ that a tensor comes from; none if a scale is computed."""
    found: set[tuple[float, int, bool]] = set()
    for node in dequantizes_behind(tensor, writers):
        if node.input[1] not in values:
            return set()
        scale = numpy_helper.to_array(values[node.input[1]])
        stored = values.get(node.input[2]) if len(node.input) > 2 else None
        zero = numpy_helper.to_array(stored) if stored is not None else np.zeros((), np.uint8)
        found.add((float(scale.ravel()[0]), int(zero.ravel()[0]), zero.dtype.kind == "i"))
    return found


def _stored_steps(
    dequantize: onnx.NodeProto, writers: Mapping[str, onnx.NodeProto], values: Mapping[str, onnx.TensorProto]
) -> np.ndarray | None:
    """The integers that a DQ of a weight reads, less their zero point, as float32."""
    quantize = writers.get(dequantize.input[0])
    node = quantize or dequantize
    stored, scale = (values.get(name) for name in node.input[:2])
    if stored is None or scale is None or node.op_type not in (QUANTIZE, DEQUANTIZE):
        return None
    array, step = numpy_helper.to_array(stored), numpy_helper.to_array(scale)
    zero = values.get(node.input[2]) if len(node.input) > 2 else None
    offset = numpy_helper.to_array(zero).astype(np.float32) if zero is not None else np.float32(0)
    axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
    shape = [1] * array.ndim
    if step.size > 1:
        shape[axis] = step.size
    if quantize is None:
        return array.astype(np.float32) - offset.reshape(shape if offset.size > 1 else [1] * array.ndim)
    return np.clip(np.rint(array / step.reshape(shape)), -128, 127).astype(np.float32)


def outputs_first(
    weight: Float[np.ndarray, "..."], axis: int, operator: str, groups: int
) -> Float[np.ndarray, "out inputs *kernel"]:
    """Returns a weight as (outputs, inputs of a group, ...).

    Args:
        weight: of a Conv, a ConvTranspose (in, outputs of a group, ...), or a matrix.
        axis: its output-channel axis.
        operator: of the node that reads it.
        groups: groups of a convolution, else 1.
    """
    if operator != "ConvTranspose":
        return np.moveaxis(weight, axis, 0)
    parts = np.split(weight, groups, axis=0)
    return np.concatenate([np.moveaxis(part, 1, 0) for part in parts])
