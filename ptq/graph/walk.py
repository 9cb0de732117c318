"""Which DQs does a tensor of an ONNX graph come from?

On ONNX's own nodes, for graphs that are written; `qdq_graph` answers it for the checks on graphs of whatever maker.
"""

from collections.abc import Mapping

import onnx

from ptq.graph.operations import COMMUTING, DEQUANTIZE

_PASSED = COMMUTING | {"Pad"}


def dequantizes_behind(tensor: str, writers: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Returns the DQs that a tensor comes from, with only operators between that move or compare its numbers.

    Args:
        tensor: its name.
        writers: the node that writes each tensor.

    Returns:
        Each once; several behind a concat. None where a number is computed on the way, or comes from no DQ.
    """
    found: list[onnx.NodeProto] = []
    seen: set[str] = set()
    pending = [tensor]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        node = writers.get(name)
        if node is not None and node.op_type == DEQUANTIZE:
            found.append(node)
        elif node is not None and node.op_type == "Concat":
            pending += node.input
        elif node is not None and node.op_type in _PASSED:
            pending.append(node.input[0])
        else:
            return []
    return found
