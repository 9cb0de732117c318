"""How do the nodes of a Q/DQ graph hang together?

Answers what the graph checks ask: which quantizer stands behind a tensor, which layers carry weights, which adds are
residual, which tensors cannot be negative, what stays in float. It passes no judgement, that is the work of
`checks`, and it knows graphsurgeon's nodes and tensors only through the two protocols below. Every walk ends,
on a graph with a cycle or with missing inputs too, since the files of other makers are walked as well.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ptq.graph.operations import DEQUANTIZE, QUANTIZE, RESHAPING


class Tensor(Protocol):
    """A graphsurgeon tensor; a constant also has `values`."""

    name: str
    dtype: Any
    shape: Sequence[int | str | None] | None
    inputs: list["Node"]
    outputs: list["Node"]


class Node(Protocol):
    """A graphsurgeon node."""

    name: str
    op: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]


def label(node: Node) -> str:
    """Returns the node's name, or its operator and first output where it has none."""
    return node.name or f"{node.op} -> {node.outputs[0].name if node.outputs else '?'}"


def producer(tensor: Tensor) -> Node | None:
    """Returns the node that writes `tensor`, None for inputs and initializers."""
    return tensor.inputs[0] if tensor.inputs else None


def input_at(node: Node, index: int) -> Tensor | None:
    """Returns the input at a position, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) and node.inputs[index].name else None


def is_zero_padding(node: Node) -> bool:
    """Tells whether a node pads with zeros, which a symmetric quantizer leaves as they are."""
    mode = node.attrs.get("mode", "constant")
    if node.op != "Pad" or not node.inputs or mode not in ("constant", b"constant"):
        return False
    given = input_at(node, 2)
    value = node.attrs.get("value", 0.0) if given is None else constant(given)
    return value is not None and not np.any(value)


def reach(tensor: Tensor) -> set[str]:
    """Returns the names of the tensor and of every tensor that it is computed from."""
    found, pending = {tensor.name}, [tensor]
    while pending:
        node = producer(pending.pop())
        for source in node.inputs if node is not None else ():
            if source.name not in found:
                found.add(source.name)
                pending.append(source)
    return found


def walk_back(tensor: Tensor, operators: frozenset[str]) -> tuple[list[Node], Tensor]:
    """Returns the nodes of the given operators before `tensor`, nearest first, and the tensor where they begin."""
    chain: list[Node] = []
    node = producer(tensor)
    while node is not None and node.op in operators and node.inputs and not any(node is passed for passed in chain):
        chain.append(node)
        tensor = node.inputs[0]
        node = producer(tensor)
    return chain, tensor


def stored(tensor: Tensor) -> np.ndarray | None:
    """The numbers of an initializer or of a Constant node; None for anything else."""
    holder: Any = tensor
    node = producer(tensor)
    if node is not None and node.op == "Constant":
        holder = next(iter(node.attrs.values()), None)
        if isinstance(holder, int | float | list):
            return np.asarray(holder)
    if not hasattr(type(holder), "values"):
        return None
    try:
        return np.asarray(holder.values)
    except (ValueError, TypeError, KeyError):
        # The bytes do not fill the shape. onnx.checker says so; here the tensor counts as not constant.
        return None


def permutation_of(node: Node, rank: int) -> list[int] | None:
    """Returns the axes that a Transpose permutes, None where they are no permutation."""
    permutation = list(node.attrs.get("perm", range(rank)[::-1]))
    return permutation if sorted(permutation) == list(range(rank)) else None


def constant(tensor: Tensor | None) -> np.ndarray | None:
    """Returns the numbers of a tensor known from the file, through Identity and Transpose; None if it is computed."""
    if tensor is None:
        return None
    chain, source = walk_back(tensor, frozenset({"Identity", "Transpose"}))
    values = stored(source)
    for node in reversed(chain):
        if values is not None and node.op == "Transpose":
            permutation = permutation_of(node, values.ndim)
            values = None if permutation is None else values.transpose(permutation)
    return values


def scale_of(node: Node) -> np.ndarray | None:
    """Returns the scale of a Q or DQ as float64, None if it is missing or computed."""
    values = constant(input_at(node, 1))
    return None if values is None or values.dtype.kind not in "fiu" else values.astype(np.float64)


def zero_point_of(node: Node) -> np.ndarray | None:
    """Returns the zero point of a Q or DQ in its own type, None if it is missing or computed."""
    return constant(input_at(node, 2))


def is_integer(tensors: Sequence[Tensor]) -> bool:
    """Whether these are known to hold integers: arithmetic on shapes, not on images."""
    return any(isinstance(tensor.dtype, np.dtype) and tensor.dtype.kind in "iub" for tensor in tensors)


def same_numbers(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    """Tells whether two scales or zero points have the same type and bits; a scalar equals a vector of length one."""
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and first.ravel().tobytes() == second.ravel().tobytes()


def source_quantize(node: Node) -> Node | None:
    """Returns the Q that feeds a DQ, None if something else does."""
    before = producer(node.inputs[0]) if node.inputs else None
    return before if before is not None and before.op == QUANTIZE else None


def module_names(node: Node, weight: Tensor | None = None) -> set[str]:
    """Returns every name under which a person may know a layer.

    These are the node's name, the PyTorch module that the exporter's scope spells (`/layer1/layer1.0/conv1/Conv` is
    `layer1.0.conv1`), and the module whose parameter its weight is.
    """
    modules: list[str] = []
    for part in node.name.strip("/").split("/")[:-1]:
        if modules and part.startswith(modules[-1] + "."):
            modules.pop()
        modules.append(part)
    names = {node.name, ".".join(modules)}
    if weight is not None:
        names.add(walk_back(weight, RESHAPING | {QUANTIZE, DEQUANTIZE})[1].name.rpartition(".")[0])
    return names - {""}


# Against the largest weight of its layer: such a channel carries nothing, whatever its scale.
_NEARLY_DEAD = 1e-6


def channel_ratios(values: np.ndarray, step: np.ndarray, axis: int) -> np.ndarray:
    """Returns max|w| / (127 * step) of each channel along `axis`, but for the dead and those with next to no weight.

    >>> channel_ratios(np.array([[127.0, -1.0], [0.0, 254.0]]), np.array([1.0, 1.0]), 0)
    array([1., 2.])
    """
    others = tuple(index for index in range(values.ndim) if index != axis)
    largest = np.abs(values.astype(np.float64)).max(axis=others, initial=0.0)
    return (largest / (127 * step.ravel()))[largest > _NEARLY_DEAD * largest.max(initial=0.0)]


def better_axis(values: np.ndarray, step: np.ndarray, axis: int) -> int | None:
    """Returns the axis whose channels explain `step` clearly better than `axis` does, None if there is none.

    A scale belongs to an axis if max|w| / (127 * step) is nearly the same number for all its channels. That number may
    differ from one, since a search for the least squared error clips the largest weights.
    """

    def spread(candidate: int) -> float:
        ratios = channel_ratios(values, step, candidate)
        return float(np.std(np.log(ratios))) if ratios.size else 0.0

    own = spread(axis)
    rivals = [rival for rival in range(values.ndim) if rival != axis and values.shape[rival] == step.size]
    fitting = [rival for rival in rivals if own > 0.02 and spread(rival) < own / 2]
    return min(fitting, key=spread, default=None)
