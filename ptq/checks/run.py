"""Is a Q/DQ ONNX file fit for an INT8 engine?

onnx.checker, strict shape inference and ONNX Runtime let nearly every quantization fault pass, so the rules are the
project's own. `CHECKS` at the end is the whole list: identifier, severity, the function that finds the fault, and what
to do. How nodes hang together is the work of `graph_walk.py`. Nothing is repaired here, and no accuracy is measured.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx.external_data_helper import load_external_data_for_model
from onnx_graphsurgeon.logger import G_LOGGER

from ptq.config import Dialect
from ptq.errors import ExportError
from ptq.graph.nodes import (
    DEQUANTIZE,
    QUANTIZE,
    RESHAPING,
    Node,
    better_axis,
    channel_ratios,
    constant,
    input_at,
    label,
    module_names,
    producer,
    same_numbers,
    scale_of,
    source_quantize,
    walk_back,
    zero_point_of,
)
from ptq.graph.qdq_graph import Layer, QdqGraph, Weight
from ptq.records.graph import GraphChecks, GraphFinding

OPSET_MINIMUM = 13
OPSET_TENSORRT_8 = 17
PROTOBUF_LIMIT_BYTES = 2**31
METADATA_KEYS = ("checkpoint_sha256", "method", "trial", "dialect")

_SCALE_MINIMUM = 1e-12
_SCALE_NORMAL = float(np.finfo(np.float32).tiny)
_SCALE_TINY = 1e-7
_SCALE_RATIO = 1e4
_SATURATED_SHARE = 0.01
_RATIO_BOUNDS = (0.3, 3.0)
_RATIO_SHARE = 0.9
_NODES_LISTED = 5
_INTEGER_OPERATORS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"})


@dataclass(frozen=True, slots=True)
class _Subject:
    """What every check looks at."""

    model: onnx.ModelProto
    graph: QdqGraph
    dialect: Dialect
    allowed: frozenset[str]
    input_shape: tuple[int, int, int] | None
    num_classes: int | None
    checker_problem: str
    inference_problem: str

    @property
    def opset(self) -> int:
        """The version of the standard operators, 0 if the file names none."""
        return max((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), default=0)

    def is_allowed(self, node: Node, layer: Layer | None = None) -> bool:
        """Whether the caller lets this node, or a module that it is part of, stay in float."""
        if layer is None and node.op in self.allowed:
            return True
        names = module_names(node, layer.weight if layer else None)
        return any(name == allowed or name.startswith(f"{allowed}.") for name in names for allowed in self.allowed)


Severity = Literal["error", "warning", "info"]
_Found = Iterator[tuple[Node | None, str]]


@dataclass(frozen=True, slots=True)
class Check:
    """One rule. `find` yields the node at fault, None for the whole graph, and what was found there.

    `on_cpu` is the severity in the cpu dialect, where engines run what TensorRT refuses or runs slowly; None where it
    is the same.
    """

    identifier: str
    severity: Severity
    find: Callable[[_Subject], _Found]
    remedy: str
    on_cpu: Severity | None = None

    def severity_in(self, dialect: Dialect) -> Severity:
        """Returns how serious a finding is in a dialect."""
        return self.on_cpu if dialect == "cpu" and self.on_cpu is not None else self.severity


def check_graph(
    path: Path,
    *,
    dialect: Dialect | None = None,
    allowed_float_layers: Collection[str] = (),
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
) -> GraphChecks:
    """Returns what the checks find in one ONNX file, in the order of `CHECKS`. The file is not changed.

    A file without quantization gets the checks of structure and interface alone.

    Args:
        path: the file, with its external data beside it if it has any.
        dialect: the dialect the file should be in; None takes "cpu" if any activation is uint8, else "tensorrt".
        allowed_float_layers: layers, pools and adds that may stay in float, by node name or PyTorch module name; a
            module stands for all that is in it. Pools and adds may be named by their operator too.
        input_shape: channels, height and width the input should have; None accepts any static shape.
        num_classes: classes the output should have; None accepts any static number.

    Raises:
        ExportError: the file is absent, is not whole, is not ONNX, or its external data is missing.
    """
    # graphsurgeon logs to the standard output, which belongs to the caller; its errors come as exceptions too.
    with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):
        subject = _subject(path, dialect, frozenset(allowed_float_layers), input_shape, num_classes)
        chosen = CHECKS if subject.graph.quantizes or subject.graph.dequantizes else FILE_CHECKS
        findings = [
            GraphFinding(check.identifier, severity, "" if node is None else label(node), message, check.remedy)
            for check in chosen
            for severity in (check.severity_in(subject.dialect),)
            for node, message in check.find(subject)
        ]
    return GraphChecks(path.name, tuple(check.identifier for check in chosen), tuple(findings))


def _subject(
    path: Path,
    dialect: Dialect | None,
    allowed: frozenset[str],
    input_shape: tuple[int, int, int] | None,
    num_classes: int | None,
) -> _Subject:
    """The file as the checks look at it, with inferred shapes where inference succeeds."""
    model = _load(path)
    checker_problem = _problem_of(lambda: onnx.checker.check_model(str(path)))
    inference_problem = ""
    inferred = [model]
    if not checker_problem:
        inference_problem = _problem_of(
            lambda: inferred.append(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
        )
    graph = _import(path, inferred[-1])
    return _Subject(
        model=model,
        graph=graph,
        dialect=dialect or _infer_dialect(graph),
        allowed=allowed,
        input_shape=input_shape,
        num_classes=num_classes,
        checker_problem=checker_problem,
        inference_problem=inference_problem,
    )


def _load(path: Path) -> onnx.ModelProto:
    """The whole model, its external data included."""
    if not path.is_file():
        raise ExportError(f"{path} is not a file. Give the path of an ONNX file.")
    size_bytes = path.stat().st_size
    if size_bytes >= PROTOBUF_LIMIT_BYTES:
        raise ExportError(
            f"{path} has {size_bytes:,} bytes, and a protobuf file ends below {PROTOBUF_LIMIT_BYTES:,}. "
            "Save the weights as external data."
        )
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ExportError(
            f"{path} has {size_bytes:,} bytes that are no ONNX model: {_first_line(error)}. "
            "The file is cut off or of another format; export it again."
        ) from error
    if not model.graph.node or not model.opset_import:
        raise ExportError(
            f"{path} holds {len(model.graph.node)} nodes and {len(model.opset_import)} opsets; an ONNX model has at "
            "least one of each. The file is empty, cut off or of another format; export it again."
        )
    # Names that are no UTF-8 come back as bytes from protobuf, and no operator or tensor can be looked up by them.
    odd = [name for name in _names(model) if not isinstance(name, str)]
    if odd:
        raise ExportError(f"{path} holds names that are no text, such as {odd[0]!r}. It is damaged; export it again.")
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ExportError(
            f"The external data of {path} cannot be read: {_first_line(error)}. "
            "Copy the data files into the folder of the model."
        ) from error
    return model


def _names(model: onnx.ModelProto) -> Iterator[object]:
    for node in model.graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for named in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        yield named.name
    for entry in (*model.opset_import, *model.metadata_props):
        yield entry.domain if isinstance(entry, onnx.OperatorSetIdProto) else entry.key


def _import(path: Path, model: onnx.ModelProto) -> QdqGraph:
    try:
        graph = gs.import_onnx(model)
    except (gs.OnnxGraphSurgeonException, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(
            f"The graph of {path} cannot be read: {_first_line(error)}. The file is damaged; export it again."
        ) from error
    return QdqGraph(graph.nodes, graph.inputs, graph.outputs)


def _problem_of(attempt: Callable[[], object]) -> str:
    """What onnx has against the model, in one line; empty if nothing."""
    try:
        attempt()
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, TypeError) as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _infer_dialect(graph: QdqGraph) -> Dialect:
    zero_points = (zero_point_of(node) for node in graph.quantizes if graph.is_activation(node))
    return "cpu" if any(values is not None and values.dtype == np.uint8 for values in zero_points) else "tensorrt"


def _checker(subject: _Subject) -> _Found:
    if subject.checker_problem:
        yield None, f"onnx.checker refuses the model: {subject.checker_problem}"


def _shape_inference(subject: _Subject) -> _Found:
    if subject.inference_problem:
        yield None, f"Strict shape inference fails: {subject.inference_problem}"


def _opset_minimum(subject: _Subject) -> _Found:
    if subject.opset < OPSET_MINIMUM:
        yield None, f"The opset is {subject.opset}; per-channel Q/DQ exists from opset {OPSET_MINIMUM} on."


def _opset_tensorrt_8(subject: _Subject) -> _Found:
    if subject.dialect == "tensorrt" and subject.opset > OPSET_TENSORRT_8:
        yield None, f"The opset is {subject.opset}; TensorRT 8.6 reads opsets {OPSET_MINIMUM} to {OPSET_TENSORRT_8}."


def _domain(subject: _Subject) -> _Found:
    for node in subject.graph.nodes:
        if node.domain not in (None, "", "ai.onnx"):
            yield node, f"Operator {node.op} is of domain {node.domain}; expected standard ONNX operators only."


def _node_names(subject: _Subject) -> _Found:
    seen: dict[str, int] = {}
    for node in subject.graph.nodes:
        seen[node.name] = seen.get(node.name, 0) + 1
        if node.name and seen[node.name] == 2:
            yield node, f"Several nodes are called {node.name}."


def _initializer_inputs(subject: _Subject) -> _Found:
    initializers = {tensor.name for tensor in subject.model.graph.initializer}
    for entry in subject.model.graph.input:
        if entry.name in initializers:
            yield None, f"Initializer {entry.name} is listed as an input, so that it is no constant."


def _image_input(subject: _Subject) -> _Found:
    names = [tensor.name for tensor in subject.graph.inputs]
    if len(names) != 1:
        yield None, f"The graph has {len(names)} inputs {names}; expected one, the images."
        return
    entry = next(entry.type.tensor_type for entry in subject.model.graph.input if entry.name == names[0])
    kind = onnx.TensorProto.DataType.Name(entry.elem_type)
    if entry.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) or len(entry.shape.dim) != 4:
        yield None, f"Input {names[0]} is {kind} with {len(entry.shape.dim)} dimensions; expected FLOAT (n, c, h, w)."


def _input_shape(subject: _Subject) -> _Found:
    for tensor in subject.graph.inputs[:1]:
        found = tuple(tensor.shape or ())[1:]
        if len(found) != 3:
            continue
        if not all(isinstance(length, int) and length > 0 for length in found):
            yield None, f"Input {tensor.name} has channels, height and width {found}; only the batch may be dynamic."
        elif subject.input_shape is not None and found != tuple(subject.input_shape):
            yield None, f"Input {tensor.name} has channels, height and width {found}; expected {subject.input_shape}."


def _batch_dimension(subject: _Subject) -> _Found:
    for tensor in subject.graph.inputs[:1]:
        batch = tensor.shape[0] if tensor.shape else None
        kind = f"static, {batch} images" if isinstance(batch, int) else f"dynamic, called {batch or 'nothing'}"
        yield None, f"The batch dimension of {tensor.name} is {kind}."


def _class_output(subject: _Subject) -> _Found:
    outputs = subject.graph.outputs
    if len(outputs) != 1:
        yield None, f"The graph has {len(outputs)} outputs {[t.name for t in outputs]}; expected one, the logits."
        return
    shape = tuple(outputs[0].shape or ())
    if len(shape) != 2 or not isinstance(shape[1], int):
        yield (
            None,
            f"Output {outputs[0].name} has shape {shape}; expected (n, classes) with a static number of classes.",
        )
    elif subject.num_classes is not None and shape[1] != subject.num_classes:
        yield None, f"Output {outputs[0].name} has {shape[1]} classes; expected {subject.num_classes}."


def _batchnorm_foldable(subject: _Subject) -> _Found:
    for node in subject.graph.nodes:
        before = producer(node.inputs[0]) if node.op == "BatchNormalization" and node.inputs else None
        if before is not None and before.op in ("Conv", "ConvTranspose") and subject.graph.is_private(node.inputs[0]):
            yield node, f"This BatchNormalization follows {label(before)} and could be part of its weights."


def _training_mode(subject: _Subject) -> _Found:
    for node in subject.graph.nodes:
        in_training = node.op == "BatchNormalization" and node.attrs.get("training_mode", 0)
        flag = constant(input_at(node, 2)) if node.op == "Dropout" else None
        if in_training or (flag is not None and flag.any()):
            yield node, f"This {node.op} is in training mode."


def _computes_on_integers(node: Node) -> bool:
    """Whether this is an operator of the QOperator format, or of dynamic quantization."""
    return node.op in _INTEGER_OPERATORS or node.op.startswith(("QLinear", "QGemm"))


def _integer_operators(subject: _Subject) -> _Found:
    found = [node for node in subject.graph.nodes if _computes_on_integers(node)]
    if found:
        kinds = ", ".join(sorted({node.op for node in found}))
        yield (
            found[0],
            f"{len(found)} nodes compute on integers ({kinds}); expected float operators between Q/DQ pairs.",
        )


def _metadata_values(subject: _Subject) -> tuple[set[str], bool]:
    """Which of our keys the file has, with or without prefix, and whether the file is ours."""
    keys = {entry.key for entry in subject.model.metadata_props}
    present = {key for key in METADATA_KEYS if key in keys or f"ptq.{key}" in keys}
    # A float export of ours names its checkpoint too, and another maker's quantizer keeps that entry.
    return present, any(f"ptq.{key}" in keys for key in METADATA_KEYS if key != "checkpoint_sha256")


def _metadata_absent(subject: _Subject) -> _Found:
    present, is_ours = _metadata_values(subject)
    if not is_ours and len(present) < len(METADATA_KEYS):
        yield None, "The file does not say where it comes from: it has no metadata of this pipeline."


def _metadata_complete(subject: _Subject) -> _Found:
    present, is_ours = _metadata_values(subject)
    missing = [key for key in METADATA_KEYS if key not in present]
    if is_ours and missing:
        yield None, f"The metadata lacks {', '.join(missing)}."


def _qdq_absent(subject: _Subject) -> _Found:
    graph = subject.graph
    if not graph.quantizes and not graph.dequantizes and not any(_computes_on_integers(node) for node in graph.nodes):
        yield None, "The graph has no QuantizeLinear and no DequantizeLinear: it is a float model."


def _layer_quantized(subject: _Subject) -> _Found:
    graph = subject.graph
    for layer in graph.layers:
        has_activation = graph.dequantize_behind(layer.activation) is not None
        has_weight = graph.has_quantized_weight(layer)
        if (has_activation and has_weight) or subject.is_allowed(layer.node, layer):
            continue
        bare = [name for name, has in (("activation", has_activation), ("weight", has_weight)) if not has]
        yield layer.node, f"This {layer.node.op} has no Q/DQ on its {' and '.join(bare)}, so it runs in float."


def _coverage(subject: _Subject) -> _Found:
    graph = subject.graph
    if not graph.layers:
        return
    quantized = [layer for layer in graph.layers if graph.is_quantized(layer)]
    share = 100 * len(quantized) / len(graph.layers)
    counts = [graph.multiply_accumulates(layer) for layer in graph.layers]
    total = sum(count or 0 for count in counts)
    by_macs = "their multiply-accumulates are unknown"
    if total and None not in counts:
        covered = sum(graph.multiply_accumulates(layer) or 0 for layer in quantized)
        by_macs = f"{100 * covered / total:.1f} % of {total:,} multiply-accumulates per image"
    yield None, f"{len(quantized)} of {len(graph.layers)} layers have INT8 inputs ({share:.1f} %; {by_macs})."


def _bias_float(subject: _Subject) -> _Found:
    for layer in subject.graph.layers:
        before = producer(walk_back(layer.bias, RESHAPING)[1]) if layer.bias is not None else None
        if before is not None and before.op in (QUANTIZE, DEQUANTIZE):
            yield layer.node, f"The bias comes from {label(before)}; expected a float constant."


def _output_float(subject: _Subject) -> _Found:
    for tensor in subject.graph.outputs:
        before = producer(walk_back(tensor, RESHAPING)[1])
        if before is not None and before.op in (QUANTIZE, DEQUANTIZE):
            yield before, f"Output {tensor.name} comes from this {before.op}; expected float logits."


def _softmax_float(subject: _Subject) -> _Found:
    for node in subject.graph.nodes:
        if node.op not in ("Softmax", "LogSoftmax") or not node.inputs or not node.outputs:
            continue
        if subject.graph.dequantize_behind(node.inputs[0]) is not None:
            yield node, f"This {node.op} reads quantized logits; expected float."
        if any(reader.op == QUANTIZE for reader in node.outputs[0].outputs):
            yield node, f"The result of this {node.op} is quantized; expected float."


def _q_feeds_dq(subject: _Subject) -> _Found:
    for node in subject.graph.quantizes:
        others = [reader for tensor in node.outputs for reader in tensor.outputs if reader.op != DEQUANTIZE]
        if others:
            yield node, f"This Q feeds {label(others[0])} ({others[0].op}); expected DequantizeLinear only."


def _dq_source(subject: _Subject) -> _Found:
    for node in subject.graph.dequantizes:
        if source_quantize(node) is not None or _is_quantized_bias(subject, node):
            continue
        values = constant(input_at(node, 0))
        if values is None or values.dtype not in (np.int8, np.uint8):
            found = "a computed tensor" if values is None else f"a constant of type {values.dtype}"
            yield node, f"This DQ reads {found}; expected the output of a Q, or an int8 constant."


def _double(subject: _Subject) -> _Found:
    for node in subject.graph.quantizes:
        before = producer(walk_back(node.inputs[0], frozenset({"Identity"}))[1]) if node.inputs else None
        if before is not None and before.op in (DEQUANTIZE, QUANTIZE):
            yield node, f"This Q reads {label(before)} with nothing between, so that the tensor is rounded twice."


def _dangling(subject: _Subject) -> _Found:
    for node in subject.graph.quantizes + subject.graph.dequantizes:
        if not any(tensor.outputs or tensor.name in subject.graph.output_names for tensor in node.outputs):
            yield node, f"Nothing reads the output of this {node.op}."


def _pairs(subject: _Subject) -> Iterator[tuple[Node, Node]]:
    for node in subject.graph.dequantizes:
        quantize = source_quantize(node)
        if quantize is not None:
            yield quantize, node


def _pair_scale(subject: _Subject) -> _Found:
    for quantize, dequantize in _pairs(subject):
        ours, theirs = scale_of(dequantize), scale_of(quantize)
        if ours is not None and theirs is not None and not same_numbers(ours, theirs):
            yield dequantize, f"The scale is {_brief(ours)}, and {_brief(theirs)} in its Q, {label(quantize)}."


def _pair_zero_point(subject: _Subject) -> _Found:
    for quantize, dequantize in _pairs(subject):
        ours, theirs = zero_point_of(dequantize), zero_point_of(quantize)
        if ours is not None and theirs is not None and not same_numbers(ours, theirs):
            yield dequantize, f"The zero point is {_brief(ours)}, and {_brief(theirs)} in its Q, {label(quantize)}."


def _pair_axis(subject: _Subject) -> _Found:
    for quantize, dequantize in _pairs(subject):
        ours, theirs = dequantize.attrs.get("axis"), quantize.attrs.get("axis")
        scale = scale_of(quantize)
        if scale is not None and scale.size > 1 and ours != theirs:
            yield dequantize, f"The axis is {ours}, and {theirs} in its Q, {label(quantize)}."


def _brief(values: np.ndarray) -> str:
    """The type of an array and its number, or its length and first number."""
    first = f"{values.ravel()[0]:.6g}" if values.size else "nothing"
    return f"{values.dtype} {first}" if values.size == 1 else f"{values.dtype} {first}, ... ({values.size} values)"


def _scale_constant(subject: _Subject) -> _Found:
    for node in subject.graph.quantizes + subject.graph.dequantizes:
        for position, what in ((1, "scale"), (2, "zero point")):
            if input_at(node, position) is not None and constant(input_at(node, position)) is None:
                yield node, f"The {what} is computed; expected a constant."


def _is_usable(subject: _Subject, node: Node, scale: np.ndarray) -> np.ndarray:
    """Which scales are numbers to divide by. Those of a dead weight channel may be as small as float32 has them."""
    minimum = _SCALE_MINIMUM if node.op == QUANTIZE and subject.graph.is_activation(node) else _SCALE_NORMAL
    return np.asarray(np.isfinite(scale) & (scale >= minimum))


def _scale_positive(subject: _Subject) -> _Found:
    for node in subject.graph.scaled():
        scale = scale_of(node)
        if scale is None or _is_usable(subject, node, scale).all():
            continue
        wrong = scale[~_is_usable(subject, node, scale)]
        found = f"{wrong.size} of {scale.size} scales cannot be used, the first is {wrong.ravel()[0]:.6g}"
        yield node, f"{found}; expected finite, positive and not denormal."


def _living_scales(subject: _Subject) -> Iterator[tuple[Node, np.ndarray]]:
    """The usable scales of each quantizer, without those of weight channels that are all zero."""
    weights = subject.graph.weight_quantizers()
    for node in subject.graph.scaled():
        scale, weight = scale_of(node), weights.get(id(node))
        if scale is None or not _is_usable(subject, node, scale).all():
            continue
        if weight is not None and weight.axis is not None and weight.values.shape[weight.axis] == scale.size:
            scale = scale.ravel()[~_dead_channels(weight.values, weight.axis)]
        if scale.size:
            yield node, scale


def _scale_tiny(subject: _Subject) -> _Found:
    for node, scale in _living_scales(subject):
        if scale.min() < _SCALE_TINY and not _is_quantized_bias(subject, node):
            yield node, f"The smallest scale is {scale.min():.3g}, below {_SCALE_TINY:g}."


def _scale_ratio(subject: _Subject) -> _Found:
    for node, scale in _living_scales(subject):
        if scale.max() / scale.min() > _SCALE_RATIO:
            yield node, f"The largest of {scale.size} scales is {scale.max() / scale.min():.3g} times the smallest."


def _zero_point_present(subject: _Subject) -> _Found:
    for node in subject.graph.quantizes + subject.graph.dequantizes:
        if input_at(node, 2) is None:
            yield node, f"This {node.op} has no zero point, and so the type uint8 by default; expected an explicit 0."


def _is_quantized_bias(subject: _Subject, node: Node) -> bool:
    """Whether this is the DQ of an int32 bias, which `bias-float` reports."""
    biases = {layer.bias.name for layer in subject.graph.layers if layer.bias is not None}
    return any(tensor.name in biases for tensor in node.outputs)


def _zero_point_zero(subject: _Subject) -> _Found:
    for node in subject.graph.scaled():
        values = zero_point_of(node)
        if values is not None and values.astype(np.int64).any():
            yield node, f"The zero point is {_brief(values)}; expected 0, the scheme is symmetric."


def _zero_point_type(subject: _Subject) -> _Found:
    for node in subject.graph.scaled():
        values = zero_point_of(node)
        if values is None or _is_quantized_bias(subject, node):
            continue
        may_be_uint8 = subject.dialect == "cpu" and node.op == QUANTIZE and subject.graph.is_activation(node)
        if values.dtype != np.int8 and not (may_be_uint8 and values.dtype == np.uint8):
            expected = "int8 or uint8" if may_be_uint8 else "int8"
            yield node, f"The zero point is {values.dtype}; expected {expected} here in the {subject.dialect} dialect."


def _uint8_never_negative(subject: _Subject) -> _Found:
    for node in subject.graph.quantizes:
        values = zero_point_of(node)
        if (
            values is None
            or values.dtype != np.uint8
            or subject.dialect != "cpu"
            or values.any()  # with another zero point uint8 reaches below zero; `zero-point-zero` reports it
            or not subject.graph.is_activation(node)
        ):
            continue
        if not subject.graph.never_negative(node.inputs[0]):
            before = producer(node.inputs[0])
            source = f"written by {label(before)} ({before.op})" if before is not None else "an input of the graph"
            yield node, f"The type is uint8, and {node.inputs[0].name}, {source}, may be negative."


def _activation_per_tensor(subject: _Subject) -> _Found:
    for node in subject.graph.quantizes:
        scale = scale_of(node)
        if scale is None or scale.size == 1 or not subject.graph.is_activation(node):
            continue
        if not _feeds_depthwise_alone(subject, node):
            yield node, f"This activation has {scale.size} scales; expected one."


def _feeds_depthwise_alone(subject: _Subject, node: Node) -> bool:
    """Whether CPU engines can take one scale per channel here: each reader convolves every channel by itself."""
    if subject.dialect != "cpu":
        return False
    layers = {id(layer.node): layer for layer in subject.graph.layers}
    pairs = [reader for tensor in node.outputs for reader in tensor.outputs]
    readers = [reader for pair in pairs for tensor in pair.outputs for reader in tensor.outputs]
    channels = scale.size if (scale := scale_of(node)) is not None else 0
    return bool(readers) and all(
        id(reader) in layers and reader.op == "Conv" and reader.attrs.get("group", 1) == channels for reader in readers
    )


def _activation_depthwise(subject: _Subject) -> _Found:
    for node in subject.graph.quantizes:
        scale = scale_of(node)
        if scale is None or scale.size == 1 or not subject.graph.is_activation(node):
            continue
        if _feeds_depthwise_alone(subject, node):
            yield node, f"This input of a depthwise convolution has {scale.size} scales; TensorRT expects one."


def _weight_scales(subject: _Subject) -> Iterator[tuple[Weight, np.ndarray]]:
    for weight in subject.graph.weight_quantizers().values():
        scale = scale_of(weight.node)
        if scale is not None and scale.size:
            yield weight, scale


def _weight_per_channel(subject: _Subject) -> _Found:
    for weight, scale in _weight_scales(subject):
        if scale.size == 1 and (weight.axis is None or weight.values.shape[weight.axis] > 1):
            yield (
                weight.node,
                f"The weight of {label(weight.layer.node)} has one scale; expected one per output channel.",
            )


def _weight_axis(subject: _Subject) -> _Found:
    for weight, scale in _weight_scales(subject):
        if scale.size == 1 or weight.axis is None:
            continue
        found = weight.node.attrs.get("axis")
        if found is None:
            yield weight.node, f"No axis is given, and the default is 1; expected an explicit axis {weight.axis}."
        elif found not in (weight.axis, weight.axis - weight.values.ndim):
            yield (
                weight.node,
                f"The axis is {found}; the output channels of {weight.layer.node.op} are axis {weight.axis}.",
            )


def _weight_scale_count(subject: _Subject) -> _Found:
    for weight, scale in _weight_scales(subject):
        channels = None if weight.axis is None else weight.values.shape[weight.axis]
        if channels is not None and scale.size > 1 and (scale.size != channels or scale.ndim != 1):
            yield weight.node, f"There are {scale.size} scales of shape {scale.shape} for {channels} output channels."


def _fitting_steps(subject: _Subject) -> Iterator[tuple[Weight, np.ndarray, np.ndarray]]:
    """Each weight whose scales can be held against it: its step, and max|w| / (127 * step) per living channel."""
    for weight, scale in _weight_scales(subject):
        step = weight.step
        if step is None or weight.values.dtype.kind not in "fi" or not (np.isfinite(scale) & (scale > 0)).all():
            continue
        if not np.isfinite(weight.values.astype(np.float64)).all() or weight.values.size == 0:
            continue
        if scale.size == 1:
            largest = float(np.abs(weight.values.astype(np.float64)).max())
            yield weight, step, np.array([largest / (127 * step.item())] if largest else [])
        elif weight.axis is not None and scale.size == weight.values.shape[weight.axis]:
            yield weight, step, channel_ratios(weight.values, step, weight.axis)


def _misfit(weight: Weight, step: np.ndarray, ratios: np.ndarray) -> str:
    """Why the scales cannot belong to the weight; empty if they can."""
    low, high = _RATIO_BOUNDS
    rival = None if weight.axis is None or step.size == 1 else better_axis(weight.values, step, weight.axis)
    if rival is not None:
        return f"The scales follow the channels of axis {rival}; the output channels are axis {weight.axis}."
    # Of stored integers the file does not say what they were scaled from; they may use part of the codes by choice.
    if weight.quantize is not None and ratios.size and np.mean((ratios >= low) & (ratios <= high)) < _RATIO_SHARE:
        return (
            f"max|w| / (127 * scale) runs from {ratios.min():.3g} to {ratios.max():.3g}; "
            f"expected {low:g} to {high:g} for {100 * _RATIO_SHARE:.0f} % of the channels."
        )
    return ""


def _weight_scale_fit(subject: _Subject) -> _Found:
    for weight, step, ratios in _fitting_steps(subject):
        problem = _misfit(weight, step, ratios)
        if problem:
            yield weight.node, problem


def _weight_saturation(subject: _Subject) -> _Found:
    for weight, step, ratios in _fitting_steps(subject):
        if _misfit(weight, step, ratios) or weight.quantize is None:
            continue
        shape = [1] * weight.values.ndim
        if step.size > 1 and weight.axis is not None:
            shape[weight.axis] = step.size
        share = float(np.mean(np.abs(weight.values / step.reshape(shape)) > 127.5))
        if share > _SATURATED_SHARE:
            yield weight.node, f"{100 * share:.1f} % of the weights lie outside the INT8 range."


def _dead_channels(values: np.ndarray, axis: int) -> np.ndarray:
    others = tuple(index for index in range(values.ndim) if index != axis)
    return np.asarray(~values.astype(bool).any(axis=others))


def _weight_channel_zero(subject: _Subject) -> _Found:
    for weight in subject.graph.weight_quantizers().values():
        dead = np.zeros(1) if weight.axis is None else _dead_channels(weight.values, weight.axis)
        if dead.any():
            what = "zeros as weights" if weight.quantize is not None else "the code 0: dead, or lost to a coarse scale"
            yield weight.node, f"{int(dead.sum())} of {dead.size} output channels have only {what}."


def _weight_prequantized(subject: _Subject) -> _Found:
    if subject.dialect == "tensorrt":
        for weight in subject.graph.weights:
            if weight.quantize is None:
                yield weight.dequantize, f"The weight of {label(weight.layer.node)} is stored as {weight.values.dtype}."


def _residual_add(subject: _Subject) -> _Found:
    for add in subject.graph.residual_adds():
        if subject.is_allowed(add.node):
            continue
        if all(add.quantized):
            yield add.node, "Both operands of this residual add are quantized, which parts it from its convolution."
        elif not any(add.quantized):
            yield add.node, "Neither operand of this residual add is quantized, so that it runs in float."
        elif not all(add.from_conv) and add.from_conv == add.quantized:
            yield add.node, "This residual add has the convolution's branch quantized, and the identity branch bare."


def _readers_of_one_tensor(subject: _Subject) -> Iterator[list[Node]]:
    readers: dict[str, list[Node]] = {}
    for node in subject.graph.quantizes:
        if node.inputs:
            readers.setdefault(node.inputs[0].name, []).append(node)
    yield from (nodes for nodes in readers.values() if len(nodes) > 1)


def _tensor_one_scale(subject: _Subject) -> _Found:
    for nodes in _readers_of_one_tensor(subject):
        scales = [(node, scale) for node in nodes if (scale := scale_of(node)) is not None]
        odd = [(node, scale) for node, scale in scales[1:] if not same_numbers(scale, scales[0][1])]
        if odd:
            yield (
                odd[0][0],
                (
                    f"{nodes[0].inputs[0].name} is quantized with scale {_brief(odd[0][1])} here, "
                    f"and {_brief(scales[0][1])} in {label(scales[0][0])}."
                ),
            )


def _tensor_one_quantizer(subject: _Subject) -> _Found:
    for nodes in _readers_of_one_tensor(subject):
        first = (scale_of(nodes[0]), zero_point_of(nodes[0]))
        same = [
            n for n in nodes[1:] if same_numbers(scale_of(n), first[0]) and same_numbers(zero_point_of(n), first[1])
        ]
        if same:
            yield same[0], f"{len(same) + 1} Q of one scale read {nodes[0].inputs[0].name}; one is enough."


def _concat_scales(subject: _Subject) -> _Found:
    for node in subject.graph.nodes:
        if node.op != "Concat":
            continue
        behind = [found for tensor in node.inputs if (found := subject.graph.dequantize_behind(tensor)) is not None]
        scales = [scale for one in behind if (scale := scale_of(one)) is not None]
        if any(not same_numbers(scale, scales[0]) for scale in scales):
            yield (
                node,
                f"The operands have the scales {', '.join(_brief(scale) for scale in scales[:4])}; expected one scale.",
            )


def _average_pool(subject: _Subject) -> _Found:
    for node in subject.graph.average_pools():
        if subject.graph.dequantize_behind(node.inputs[0]) is None and not subject.is_allowed(node):
            yield node, f"The input of this {node.op} is not quantized, so that it runs in float."


def _float_nodes(subject: _Subject) -> _Found:
    found = [node for node in subject.graph.float_nodes() if not _computes_on_integers(node)]
    if found:
        kinds = Counter(node.op for node in found).most_common()
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds)
        listed = ", ".join(label(node) for node in found[:_NODES_LISTED])
        more = f" and {len(found) - _NODES_LISTED} more" if len(found) > _NODES_LISTED else ""
        yield None, f"{len(found)} nodes compute in float ({counted}): {listed}{more}."


def _float_islands(subject: _Subject) -> _Found:
    islands = subject.graph.float_islands()
    if islands:
        nodes = sum(len(island) for island in islands)
        yield islands[-1][0], f"{len(islands)} groups of float nodes ({nodes} nodes) lie between INT8 layers."


FILE_CHECKS: tuple[Check, ...] = (
    Check("onnx-checker", "error", _checker, "Export the model again with a current exporter."),
    Check("shape-inference", "error", _shape_inference, "Correct the shapes at the node it names."),
    Check("opset-minimum", "error", _opset_minimum, "Export with opset 17."),
    Check("domain-known", "error", _domain, "Export without runtime-specific fusions."),
    Check("node-names-unique", "error", _node_names, "Give every node a name of its own."),
    Check("initializer-not-input", "error", _initializer_inputs, "Remove it from the graph's inputs."),
    Check("image-input", "error", _image_input, "Export the classifier alone, from images to logits."),
    Check("input-shape", "error", _input_shape, "Export with the preprocessing's channels and crop."),
    Check("batch-dimension", "info", _batch_dimension, "Nothing needs to be done."),
    Check("class-output", "error", _class_output, "Export the classifier with its last layer."),
    Check("batchnorm-foldable", "warning", _batchnorm_foldable, "Fold it before calibration."),
    Check("training-mode", "error", _training_mode, "Call `eval()` on the model before exporting it."),
    Check("integer-operators", "error", _integer_operators, "Quantize in the Q/DQ format, not as QOperator."),
    Check("metadata-absent", "info", _metadata_absent, "`ptq quantize` writes it."),
    Check("qdq-absent", "info", _qdq_absent, "Quantize it with `ptq quantize`."),
)

QDQ_CHECKS: tuple[Check, ...] = (
    Check("opset-tensorrt-8", "warning", _opset_tensorrt_8, "Export with opset 17, or use TensorRT 10 or later."),
    Check("metadata-complete", "warning", _metadata_complete, "Write the file with `ptq quantize`."),
    Check("layer-quantized", "error", _layer_quantized, "Quantize both inputs, or name it in skip_layers."),
    Check("layer-coverage", "info", _coverage, "Nothing needs to be done."),
    Check("bias-float", "error", _bias_float, "Keep the bias in float; the engine quantizes it.", "warning"),
    Check("output-float", "error", _output_float, "Remove the Q/DQ pair before the output.", "warning"),
    Check("softmax-float", "error", _softmax_float, "Remove the Q/DQ pair beside the softmax."),
    Check("q-feeds-dq", "error", _q_feeds_dq, "Put a DQ between this Q and every reader."),
    Check("dq-source", "error", _dq_source, "Put the Q of the same scale right before it."),
    Check("qdq-double", "error", _double, "Remove one of the two pairs."),
    Check("qdq-dangling", "error", _dangling, "Remove the pair."),
    Check("qdq-scale-matches", "error", _pair_scale, "Give Q and DQ one scale initializer."),
    Check("qdq-zero-point-matches", "error", _pair_zero_point, "Give Q and DQ one zero-point initializer."),
    Check("qdq-axis-matches", "error", _pair_axis, "Give Q and DQ the same axis."),
    Check("qdq-scale-constant", "error", _scale_constant, "Store it as an initializer."),
    Check("qdq-scale-positive", "error", _scale_positive, "Calibrate again; an amax of 0 or NaN gives such a scale."),
    Check("qdq-scale-tiny", "warning", _scale_tiny, "Leave the layer in float, or look for a dead channel or layer."),
    Check("qdq-scale-ratio", "warning", _scale_ratio, "Equalize the channels, or leave the layer in float."),
    Check("zero-point-present", "error", _zero_point_present, "Add a zero point of 0 with the type of the dialect."),
    Check("zero-point-zero", "error", _zero_point_zero, "Quantize symmetrically.", "warning"),
    Check("zero-point-type", "error", _zero_point_type, "Write the file in the dialect of the engine."),
    Check(
        "uint8-never-negative", "error", _uint8_never_negative, "Use int8, or keep the ReLU where the Q stands for it."
    ),
    Check("activation-per-tensor", "error", _activation_per_tensor, "Give it one scale."),
    Check("activation-depthwise", "warning", _activation_depthwise, "Give it one scale to run the file on TensorRT."),
    Check("weight-per-channel", "warning", _weight_per_channel, "Scale the weight per output channel."),
    Check("weight-axis", "error", _weight_axis, "Set the axis of the Q and the DQ to the output channels."),
    Check("weight-scale-count", "error", _weight_scale_count, "Give each output channel one scale."),
    Check(
        "weight-scale-fit",
        "error",
        _weight_scale_fit,
        "Compute the scales from this weight.",
    ),
    Check("weight-saturation", "warning", _weight_saturation, "Choose larger weight scales; max never saturates."),
    Check(
        "weight-channel-zero",
        "warning",
        _weight_channel_zero,
        "Prune the channels, or look at the training; scale per channel.",
    ),
    Check(
        "weight-prequantized",
        "warning",
        _weight_prequantized,
        "Keep float weights and a Q for TensorRT 8.6.",
    ),
    Check(
        "residual-add",
        "error",
        _residual_add,
        "Quantize the identity or downsample branch, and that one alone.",
        "warning",
    ),
    Check("tensor-one-scale", "error", _tensor_one_scale, "Share one quantizer among all readers of the tensor."),
    Check("tensor-one-quantizer", "info", _tensor_one_quantizer, "Share the pair; engines merge them as well."),
    Check("concat-scales", "warning", _concat_scales, "Give all operands the largest of their scales."),
    Check("average-pool-quantized", "warning", _average_pool, "Quantize its input."),
    Check("float-nodes", "info", _float_nodes, "Convert the float part to FP16 for a strongly typed TensorRT."),
    Check("float-islands", "info", _float_islands, "Quantize their inputs where the accuracy allows it."),
)

CHECKS = FILE_CHECKS + QDQ_CHECKS
