"""Is a Q/DQ ONNX file fit for an INT8 engine?

onnx.checker, strict shape inference and ONNX Runtime let nearly every quantization fault pass, so the rules are the
project's own. Each is a function under `@check` in the module of its theme. How nodes hang together is the work of
`ptq/graph/qdq_graph.py`. Nothing is repaired here, and no accuracy is measured.
"""

from collections.abc import Collection
from pathlib import Path

from onnx_graphsurgeon.logger import G_LOGGER

from ptq.checks import file, layers, pairs, placement, scales, weights
from ptq.checks.subject import Check, read_subject
from ptq.config import Dialect
from ptq.graph.nodes import label
from ptq.records.graph import GraphChecks, GraphFinding

# In the order of the results: module by module, and in a module from its first line to its last.
THEMES = (file, layers, pairs, scales, weights, placement)
CHECKS = tuple(found for theme in THEMES for found in vars(theme).values() if isinstance(found, Check))


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
        subject = read_subject(path, dialect, frozenset(allowed_float_layers), input_shape, num_classes)
        is_quantized = bool(subject.graph.quantizes or subject.graph.dequantizes)
        chosen = [check for check in CHECKS if is_quantized or not check.needs_qdq]
        findings = [
            GraphFinding(check.identifier, severity, "" if node is None else label(node), message, check.remedy)
            for check in chosen
            for severity in (check.severity_in(subject.dialect),)
            for node, message in check.find(subject)
        ]
    return GraphChecks(path.name, tuple(check.identifier for check in chosen), tuple(findings))
