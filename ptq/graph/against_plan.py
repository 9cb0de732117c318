"""Does a Q/DQ graph hold what was decided: these quantizers with these scales, on this network?

A graph is written from a template, and held here against what the template was made from: the plan, the amax table, the
corrected biases and the FP32 graph. Equalization has multiplied weights and biases by powers of two, which change no
digit of a float's mantissa; any other change does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from ptq.config import Dialect, WeightMethod
from ptq.dialect import amax_bound, zero_point_of
from ptq.graph.candidate import bias_names, layer_nodes
from ptq.graph.operations import DEQUANTIZE, QUANTIZE
from ptq.graph.walk import dequantizes_behind
from ptq.graph.whole_operators import AGAIN, least_scale
from ptq.records.parity import Cause, Parting
from ptq.records.plan import PlacementPlan, QuantizerSpec

# By how much a weight's scale may exceed max |w| / 127. Two weights of 64 steps keep any sum within 16 bits, so that a
# scale grows by 2 at most; the rest is rounding.
_LARGEST_GROWTH = 2.02
# Below it a float has fewer digits, and below it no scale lies.
_SMALLEST = float(np.finfo(np.float32).tiny)
# Least squared error clips a channel's largest weights; below this share of max |w| it never does.
_LEAST_MSE = 0.2
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Decisions:
    """What a graph was written from.

    `biases` are those that replace the network's; `trained` says that its weights are not those of the FP32 graph.
    """

    plan: PlacementPlan
    dialect: Dialect
    amax: Mapping[str, float]
    biases: Mapping[str, np.ndarray]
    weight_method: WeightMethod = "max"
    trained: bool = False


class _Graph:
    """A graph by the names of its tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.values = {tensor.name: tensor for tensor in model.graph.initializer}
        self.writers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def array(self, name: str) -> np.ndarray | None:
        """A constant's numbers."""
        return numpy_helper.to_array(self.values[name]) if name in self.values else None

    def bias(self, name: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """A bias, and the steps that it is stored in where it is an integer."""
        dequantize = self.writers.get(name)
        if dequantize is None or dequantize.op_type != DEQUANTIZE:
            return self.array(name), None
        codes, step = (self.array(each) for each in dequantize.input[:2])
        return (None, None) if codes is None or step is None else (codes * step.astype(np.float64), step)

    def scales_behind(self, tensor: str) -> set[str]:
        """The scales of the DQs that a tensor comes from; none where a number is computed on the way, or is bare."""
        return {node.input[1] for node in dequantizes_behind(tensor, self.writers)}

    def is_quantized(self, tensor: str) -> bool:
        """Whether a tensor is dequantized, with only operators between that move or compare its numbers."""
        return bool(self.scales_behind(tensor))


def find_difference(model: onnx.ModelProto, fp32: onnx.ModelProto, decided: Decisions) -> Parting | None:
    """Returns the first place where a graph is not what was decided, None if there is none.

    Args:
        model: a Q/DQ graph that `write_candidate` wrote.
        fp32: the FP32 graph of the same network, with the same names of weights.
        decided: what it was written from.
    """
    graph, exact = _Graph(model), _Graph(fp32)
    plan, nodes = decided.plan.of_dialect(decided.dialect), layer_nodes(model, decided.plan)
    biases = {
        **bias_names(model, plan),
        **{layer: node.input[2] for layer, node in nodes.items() if len(node.input) > 2},
    }
    checks = (
        *(_activation(graph, spec, decided) for spec in plan.activations),
        *(_weight(graph, exact, spec, biases.get(spec.readers[0], ""), decided) for spec in plan.weights),
        _layers(graph, nodes, plan),
        _biases(graph, exact, biases, decided),
        _adds(graph, plan, decided.dialect),
    )
    return next((found for check in checks for found in check), None)


def difference_in_file(graph: Path, fp32: Path, decided: Decisions) -> Parting | None:
    """Returns what `find_difference` finds in the file of a graph."""
    return find_difference(onnx.load(graph), onnx.load(fp32), decided)


def _activation(graph: _Graph, spec: QuantizerSpec, decided: Decisions) -> Iterator[Parting]:
    scale, zero_point = f"{spec.name}.scale", f"{spec.name}.zero_point"
    placed = [node for node in graph.nodes if node.op_type == QUANTIZE and not node.name.endswith(AGAIN)]
    pairs = [node for node in placed if node.input[1] == scale]
    # A network that could not be traced has no tensors: its layers may be called any number of times.
    if len(pairs) != len(spec.tensors) if spec.tensors else not pairs:
        yield _at(spec.name, "placement", f"{len(pairs)} quantizers of it are there, not {len(spec.tensors) or 'one'}")
        return
    expected = np.float32(decided.amax[spec.name] / amax_bound(spec, decided.dialect))
    found, centre = graph.array(scale), graph.array(zero_point)
    if found is None or found.size != 1 or found.ravel()[0] != expected:
        what = "no number" if found is None else f"{found.ravel()[0]:.6g}"
        yield _at(spec.name, "scale", f"its scale is {what}, calibration chose {expected:.6g}")
    wanted = zero_point_of(spec, decided.dialect)
    if centre is None or centre.dtype != wanted.dtype or not np.array_equal(centre, wanted):
        what = "nothing" if centre is None else f"{centre.dtype} {centre.ravel()[0]}"
        yield _at(spec.name, "zero point", f"its zero point is {what}, expected {wanted.dtype} {wanted}")
    for node in pairs:
        behind = graph.readers.get(node.output[0], [])
        if not behind or any(
            each.op_type != DEQUANTIZE or list(each.input[1:]) != [scale, zero_point] for each in behind
        ):
            yield _at(spec.name, "scale", "it is dequantized with other numbers than it is quantized with")


def _weight(graph: _Graph, exact: _Graph, spec: QuantizerSpec, bias: str, decided: Decisions) -> Iterator[Parting]:
    layer, axis = spec.readers[0], spec.axis or 0
    weight, scale = graph.array(f"{layer}.weight"), graph.array(f"{layer}.weight.scale")
    quantize = next((node for node in graph.readers.get(f"{layer}.weight", ()) if node.op_type == QUANTIZE), None)
    if weight is None or scale is None or quantize is None:
        yield _at(layer, "float", "its weight has no quantizer")
        return
    given = _axis_of(quantize)
    for dequantize in graph.readers.get(quantize.output[0], ()):
        if list(dequantize.input[1:]) != list(quantize.input[1:]) or _axis_of(dequantize) != given:
            yield _at(layer, "scale", "its weight is dequantized with other numbers than it is quantized with")
    if scale.size > 1 and (given % weight.ndim != axis or scale.size != weight.shape[axis]):
        yield _at(layer, "axis", f"its {scale.size} scales lie along axis {given} of {weight.shape}, expected {axis}")
        return
    centre = graph.array(f"{layer}.weight.zero_point")
    if centre is None or centre.any():
        yield _at(layer, "zero point", "the zero point of its weight is not 0")
    largest = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1).max(axis=1)
    least = largest / 127 * (_LEAST_MSE if decided.weight_method == "mse" else 1 - _ROUNDING)
    most = np.maximum(largest / 127, _SMALLEST) * _LARGEST_GROWTH
    if decided.dialect == "onnxruntime":
        most = np.maximum(most, 1.01 * _needed_by_bias(graph, layer, bias, decided, largest.size))
    wrong = (largest > 0) & ((scale < least) | (scale > most)) if scale.size == largest.size else []
    if np.any(wrong):
        first = int(np.flatnonzero(wrong)[0])
        yield _at(
            layer,
            "scale",
            f"the scale of output channel {first} is {scale.ravel()[first]:.4g}, and its largest weight of "
            f"{largest[first]:.4g} asks for {largest[first] / 127:.4g}",
        )
    original = exact.array(f"{layer}.weight")
    if original is not None and original.shape == weight.shape and not decided.trained:
        changed = _differ(weight, original)
        if changed.any():
            yield _at(layer, "weight", f"{int(changed.sum())} of {changed.size} weights are not the network's")


def _axis_of(node: onnx.NodeProto) -> int:
    return next((each.i for each in node.attribute if each.name == "axis"), 1)


def _needed_by_bias(graph: _Graph, layer: str, name: str, decided: Decisions, outputs: int) -> np.ndarray:
    """The weight scales that a layer's biases ask for in the onnxruntime dialect; 0 where it is not known."""
    specs = {spec.name: spec for spec in decided.plan.activations}
    read = next((specs.get(found.quantizer) for found in decided.plan.layer_inputs if found.layer == layer), None)
    bias, _ = graph.bias(name)
    if read is None or bias is None or bias.size != outputs:
        return np.zeros(outputs)
    return least_scale(bias, np.array(decided.amax[read.name] / amax_bound(read, decided.dialect)))


def _differ(found: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Where two arrays differ by more than powers of two; numbers so small that these cost digits are let pass."""
    tiny = (np.abs(found) < _SMALLEST * 2**12) & (np.abs(original) < _SMALLEST * 2**12)
    return (np.frexp(found)[0] != np.frexp(original)[0]) & ~tiny


def _layers(graph: _Graph, found: Mapping[str, onnx.NodeProto], plan: PlacementPlan) -> Iterator[Parting]:
    """Layers that read something bare, or another quantizer than the plan gives them."""
    scales = {each.layer: f"{each.quantizer}.scale" for each in plan.layer_inputs}
    wanted = {layer: scale for layer, scale in scales.items() if scale in graph.values}
    for layer in plan.quantized_layers:
        if layer not in found:
            yield _at(layer, "float", "its weight is read without its quantizer")
            continue
        read = graph.scales_behind(found[layer].input[0])
        if not read:
            yield _at(layer, "float", "what it reads has no quantizer")
        elif layer in wanted and wanted[layer] not in read:
            yield _at(layer, "placement", f"it reads {', '.join(sorted(read))}, expected {wanted[layer]}")


def _biases(graph: _Graph, exact: _Graph, names: Mapping[str, str], decided: Decisions) -> Iterator[Parting]:
    for layer, name in names.items():
        bias, step = graph.bias(name)
        original, corrected = exact.array(f"{layer}.bias"), decided.biases.get(layer)
        if bias is None:
            continue
        if corrected is not None:
            least = 0 if step is None else 0.51 * step
            wrong = np.abs(bias - np.asarray(corrected, dtype=np.float32)) > least
        elif original is not None and original.shape == bias.shape and step is None and not decided.trained:
            wrong = _differ(bias, original)
        else:
            continue
        if wrong.any():
            what = "those corrected for it" if corrected is not None else "the network's"
            yield _at(layer, "bias", f"its biases are not {what}")


def _adds(graph: _Graph, plan: PlacementPlan, dialect: Dialect) -> Iterator[Parting]:
    """Residual additions of which another number of operands is quantized than an engine fuses."""
    wanted = 2 if dialect == "onnxruntime" else 1
    counts = {
        node.name or node.output[0]: sum(graph.is_quantized(name) for name in node.input)
        for node in graph.nodes
        if node.op_type == "Add" and not any(name in graph.values for name in node.input)
    }
    whole = sum(count == wanted for count in counts.values())
    if whole < plan.quantized_residual_adds:
        name = next((name for name, count in counts.items() if count != wanted), None)
        if name is None:  # the exporter has made one of two
            return
        yield _at(
            name, "placement", f"{counts[name]} of its operands are quantized, {wanted} make one step of the engine"
        )


def _at(layer: str, cause: Cause, what: str) -> Parting:
    return Parting(layer, cause, f"At {layer} the file is not what was decided: {what}.", in_file=True)
