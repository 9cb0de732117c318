"""What is a check, and what does every check look at?

`@check` makes a function a check. `read_subject` reads the file once, and refuses what is no whole ONNX file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx.external_data_helper import load_external_data_for_model

from ptq.config import Dialect
from ptq.errors import ExportError
from ptq.graph.nodes import Node, module_names, zero_point_of
from ptq.graph.qdq_graph import Layer, QdqGraph

PROTOBUF_LIMIT_BYTES = 2**31
_INTEGER_OPERATORS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"})


@dataclass(frozen=True, slots=True)
class Subject:
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

    def is_quantized_bias(self, node: Node) -> bool:
        """Whether this is the DQ of an int32 bias, which `bias-float` reports."""
        biases = {layer.bias.name for layer in self.graph.layers if layer.bias is not None}
        return any(tensor.name in biases for tensor in node.outputs)


Severity = Literal["error", "warning", "info"]
Found = Iterator[tuple[Node | None, str]]


@dataclass(frozen=True, slots=True)
class Check:
    """One rule. `find` yields the node at fault, None for the whole graph, and what was found there.

    `on_cpu` is the severity in the dialects of CPUs, where engines run what TensorRT refuses or runs slowly; None where
    it is the same. A check that `needs_qdq` leaves a file without quantization alone.
    """

    identifier: str
    severity: Severity
    remedy: str
    find: Callable[[Subject], Found]
    on_cpu: Severity | None
    needs_qdq: bool

    def severity_in(self, dialect: Dialect) -> Severity:
        """Returns how serious a finding is in a dialect."""
        return self.on_cpu if dialect != "tensorrt" and self.on_cpu is not None else self.severity


def check(
    identifier: str, severity: Severity, remedy: str, *, on_cpu: Severity | None = None, needs_qdq: bool = True
) -> Callable[[Callable[[Subject], Found]], Check]:
    """Makes the function below it a `Check`, which runs at its place in its module."""
    return lambda find: Check(identifier, severity, remedy, find, on_cpu, needs_qdq)


def computes_on_integers(node: Node) -> bool:
    """Tells whether this is an operator of the QOperator format, or of dynamic quantization."""
    return node.op in _INTEGER_OPERATORS or node.op.startswith(("QLinear", "QGemm"))


def dead_channels(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns which channels of a weight are all zero."""
    others = tuple(index for index in range(values.ndim) if index != axis)
    return np.asarray(~values.astype(bool).any(axis=others))


def brief(values: np.ndarray) -> str:
    """Returns the type of an array and its number, or its length and first number."""
    first = f"{values.ravel()[0]:.6g}" if values.size else "nothing"
    return f"{values.dtype} {first}" if values.size == 1 else f"{values.dtype} {first}, ... ({values.size} values)"


def read_subject(
    path: Path,
    dialect: Dialect | None,
    allowed: frozenset[str],
    input_shape: tuple[int, int, int] | None,
    num_classes: int | None,
) -> Subject:
    """Returns the file as the checks look at it, with inferred shapes where inference succeeds.

    Raises:
        ExportError: the file is absent, is not whole, is not ONNX, or its external data is missing.
    """
    model = _load(path)
    checker_problem = _problem_of(lambda: onnx.checker.check_model(str(path)))
    inference_problem = ""
    inferred = [model]
    if not checker_problem:
        inference_problem = _problem_of(
            lambda: inferred.append(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
        )
    graph = _import(path, inferred[-1])
    return Subject(
        model=model,
        graph=graph,
        dialect=dialect or _infer_dialect(model, graph),
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


def _infer_dialect(model: onnx.ModelProto, graph: QdqGraph) -> Dialect:
    zero_points = (zero_point_of(node) for node in graph.quantizes if graph.is_activation(node))
    if not any(values is not None and values.dtype == np.uint8 for values in zero_points):
        return "tensorrt"
    says = {entry.key: entry.value for entry in model.metadata_props}
    return "onnxruntime" if says.get("ptq.dialect") == "onnxruntime" else "cpu"
