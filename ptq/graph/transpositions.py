"""How do the channels of a graph come first, where its exporter put transpositions around every layer?

A transposition moves down through what does not mind the order of axes, until it meets one that takes it back, or a
reduction that takes its axes in another order.
"""

import numpy as np
import onnx_graphsurgeon as gs

_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"}
_REDUCTIONS = {"ReduceMean", "ReduceMax", "ReduceSum"}


def sink_transpositions_(graph: gs.Graph) -> None:
    """Moves transpositions of four axes behind what follows them, and joins those that meet."""
    for node in list(graph.nodes):
        if node.op in _ELEMENTWISE:
            _sink_behind_elementwise_(graph, node)
        elif node.op in _REDUCTIONS:
            _take_into_reduction_(node)
    join_transpositions_(graph)


def join_transpositions_(graph: gs.Graph) -> None:
    """Makes one of two transpositions in a row, and none where the second takes the first back."""
    for node in graph.nodes:
        order = _order(node.inputs[0]) if node.op == "Transpose" and "perm" in node.attrs else None
        if order is None:
            continue
        joined = [order[axis] for axis in node.attrs["perm"]]
        node.inputs = [node.inputs[0].inputs[0].inputs[0]]
        node.attrs = {"perm": joined}
        if joined == sorted(joined):
            node.op, node.attrs = "Identity", {}
    graph.cleanup().toposort()


def _order(tensor: gs.Tensor) -> list[int] | None:
    """The permutation that a tensor comes from, None where no transposition writes it."""
    writer = tensor.inputs[0] if tensor.inputs else None
    return (
        list(writer.attrs["perm"])
        if writer is not None and writer.op == "Transpose" and "perm" in writer.attrs
        else None
    )


def _sink_behind_elementwise_(graph: gs.Graph, node: gs.Node) -> None:
    """Puts one transposition behind an operator all of whose inputs come from such, or are constants."""
    orders = [_order(tensor) for tensor in node.inputs if isinstance(tensor, gs.Variable) and not tensor.is_empty()]
    if not orders or orders[0] is None or len(orders[0]) != 4 or any(order != orders[0] for order in orders):
        return
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    if any(tensor.values.ndim > 4 for tensor in constants):
        return
    order, result = orders[0], node.outputs[0]
    for position, tensor in enumerate(node.inputs):
        if isinstance(tensor, gs.Constant):
            if tensor.values.ndim:
                values = tensor.values.reshape(*[1] * (4 - tensor.values.ndim), *tensor.values.shape)
                node.inputs[position] = gs.Constant(f"{tensor.name}#{node.name}", values.transpose(np.argsort(order)))
        elif not tensor.is_empty():
            node.inputs[position] = tensor.inputs[0].inputs[0]
    inner = gs.Variable(f"{result.name}#first", dtype=result.dtype)
    node.outputs = [inner]
    graph.nodes.append(
        gs.Node("Transpose", name=f"{node.name}.order", attrs={"perm": order}, inputs=[inner], outputs=[result])
    )


def _take_into_reduction_(node: gs.Node) -> None:
    """Lets a reduction without kept dimensions name its axes as they are before a transposition."""
    order = _order(node.inputs[0])
    if order is None or node.attrs.get("keepdims", 1):
        return
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None and not isinstance(given, gs.Constant):
        return
    axes = [int(axis) % len(order) for axis in (node.attrs.get("axes", ()) if given is None else given.values.ravel())]
    left = [order[axis] for axis in range(len(order)) if axis not in axes]
    if not axes or left != sorted(left):
        return
    before = sorted(order[axis] for axis in axes)
    node.inputs[0] = node.inputs[0].inputs[0].inputs[0]
    if given is None:
        node.attrs["axes"] = before
    else:
        node.inputs[1] = gs.Constant(f"{given.name}#{node.name}", np.array(before, dtype=np.int64))
