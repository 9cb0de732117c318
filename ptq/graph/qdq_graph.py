"""How do layers, residual adds and Q/DQ pairs of a graph hang together?"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ptq.graph.nodes import (
    Node,
    Tensor,
    constant,
    input_at,
    is_integer,
    is_zero_padding,
    permutation_of,
    producer,
    reach,
    same_numbers,
    scale_of,
    source_quantize,
    stored,
    walk_back,
    zero_point_of,
)
from ptq.graph.operations import (
    AVERAGE_POOLS,
    BRANCH,
    COMMUTING,
    CONVOLUTIONS,
    DEQUANTIZE,
    EPILOGUE,
    KEEPS_SIGN_OF_ALL,
    KEEPS_SIGN_OF_FIRST,
    LINEAR,
    MOVING,
    NEVER_NEGATIVE,
    QUANTIZE,
    RESHAPING,
)


@dataclass(frozen=True, slots=True)
class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul with weights.

    `axis` is the output-channel axis of the weight as the node reads it, counted from the end where negative.
    """

    node: Node
    activation: Tensor
    weight: Tensor
    bias: Tensor | None
    axis: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A quantized weight. `values` is what the Q reads, or the stored integers where there is no Q.

    `axis` is the output-channel axis of `values`, None where a reshape hides it.
    """

    layer: Layer
    quantize: Node | None
    dequantize: Node
    values: np.ndarray
    axis: int | None

    @property
    def node(self) -> Node:
        """The node that holds the scale."""
        return self.quantize or self.dequantize

    @property
    def step(self) -> np.ndarray | None:
        """The size of one integer step in the units of `values`, per tensor or per channel."""
        scale = scale_of(self.node)
        return np.ones_like(scale) if scale is not None and self.quantize is None else scale


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """An add that a convolution could absorb. Both tuples are in the order of the operands.

    `from_conv` tells which operands are a convolution's output that nothing else reads; `quantized`, which come
    from a DQ.
    """

    node: Node
    from_conv: tuple[bool, bool]
    quantized: tuple[bool, bool]


class QdqGraph:
    """A graph seen as layers, quantizers and what lies between. It is never changed."""

    def __init__(self, nodes: Iterable[Node], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.nodes: tuple[Node, ...] = tuple(nodes)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.output_names = frozenset(tensor.name for tensor in outputs)
        self.quantizes = tuple(node for node in self.nodes if node.op == QUANTIZE)
        self.dequantizes = tuple(node for node in self.nodes if node.op == DEQUANTIZE)
        self.layers = tuple(layer for node in self.nodes if (layer := self._layer(node)) is not None)
        self._dequantize_behind: dict[str, Node | None] = {}
        self._sign: dict[str, bool] = {}
        self.weights = tuple(weight for layer in self.layers if (weight := self._weight(layer)) is not None)
        self._weighted = {id(weight.layer.node) for weight in self.weights}

    def is_activation(self, node: Node) -> bool:
        """Tells whether a Q reads a tensor that is computed from the image."""
        return bool(node.inputs) and not self._is_weight(node.inputs[0])

    def scaled(self) -> tuple[Node, ...]:
        """Returns the nodes whose scale and zero point count: every Q, and every DQ that has none before it."""
        return self.quantizes + tuple(node for node in self.dequantizes if source_quantize(node) is None)

    def weight_quantizers(self) -> dict[int, Weight]:
        """Returns the quantized weights by the identity of the node that holds the scale."""
        return {id(weight.node): weight for weight in self.weights}

    def has_quantized_weight(self, layer: Layer) -> bool:
        """Tells whether the layer's weight comes from a DQ."""
        return id(layer.node) in self._weighted

    def is_quantized(self, layer: Layer) -> bool:
        """Tells whether both the layer's activation and its weight come from a DQ."""
        return self.has_quantized_weight(layer) and self.dequantize_behind(layer.activation) is not None

    def is_private(self, tensor: Tensor) -> bool:
        """Tells whether exactly one node reads `tensor` and it is no output of the graph."""
        return len(tensor.outputs) == 1 and tensor.name not in self.output_names

    def dequantize_behind(self, tensor: Tensor) -> Node | None:
        """Returns the DQ a tensor comes from, with commuting operators only between; None if there is none.

        Zero padding commutes, and a concat does if all its operands come from a DQ with one scale.
        """
        if tensor.name not in self._dequantize_behind:
            self._dequantize_behind[tensor.name] = None  # ends the walk on a cycle
            self._dequantize_behind[tensor.name] = self._find_dequantize(tensor)
        return self._dequantize_behind[tensor.name]

    def _find_dequantize(self, tensor: Tensor) -> Node | None:
        _, source = walk_back(tensor, COMMUTING)
        node = producer(source)
        if node is None or node.op == DEQUANTIZE:
            return node
        if is_zero_padding(node):
            return self.dequantize_behind(node.inputs[0])
        if node.op != "Concat":
            return None
        behind = [self.dequantize_behind(operand) for operand in node.inputs]
        found = [one for one in behind if one is not None]
        if not found or len(found) < len(behind):
            return None
        return found[0] if all(same_numbers(scale_of(found[0]), scale_of(one)) for one in found) else None

    def never_negative(self, tensor: Tensor) -> bool:
        """Tells whether the operators before `tensor` prove that none of its numbers is below zero."""
        if tensor.name not in self._sign:
            self._sign[tensor.name] = False  # ends the walk on a cycle
            self._sign[tensor.name] = self._prove_never_negative(tensor)
        return self._sign[tensor.name]

    def _prove_never_negative(self, tensor: Tensor) -> bool:
        values = constant(tensor)
        if values is not None:
            return bool(values.dtype.kind in "fiu" and (values >= 0).all())
        node = producer(tensor)
        if node is None or not node.inputs:
            return False
        if node.op in NEVER_NEGATIVE:
            return True
        if node.op == "Clip":
            lowest = constant(input_at(node, 1))
            return self.never_negative(node.inputs[0]) or (lowest is not None and bool((lowest >= 0).all()))
        if node.op in (QUANTIZE, DEQUANTIZE):
            zero_point = zero_point_of(node)
            at_zero = zero_point is not None and not zero_point.any()
            return at_zero and (zero_point.dtype == np.uint8 or self.never_negative(node.inputs[0]))  # type: ignore[union-attr]
        if node.op in KEEPS_SIGN_OF_ALL:
            return all(self.never_negative(operand) for operand in node.inputs)
        return node.op in KEEPS_SIGN_OF_FIRST and self.never_negative(node.inputs[0])

    def pools_to_quantize(self) -> Iterator[Node]:
        """Yields the pools whose input is quantized: average pools, a mean over an image's two last axes included."""
        for node in self.nodes:
            if node.op in AVERAGE_POOLS and node.inputs:
                yield node
            elif node.op == "ReduceMean" and node.inputs and node.inputs[0].shape and len(node.inputs[0].shape) == 4:
                given = constant(input_at(node, 1))
                axes = node.attrs.get("axes", [] if given is None else given.ravel().tolist())
                if sorted(int(axis) % 4 for axis in axes) == [2, 3]:
                    yield node

    def residual_adds(self) -> Iterator[ResidualAdd]:
        """Yields the adds of two activations that an engine can have in INT8.

        What `rules.residual_adds` decides for a float network is verified here on a file of whatever maker.
        One operand ends in a quantized convolution that nothing else reads: in a MobileNetV2 the identity may be a
        convolution's output too, but the next block reads it as well, so that it is no branch. Or one is the identity,
        from which the other is computed, and a quantized convolution reads it too, as in ConvNeXt.
        """
        for node in self.nodes:
            if node.op != "Add" or len(node.inputs) != 2 or any(self._is_weight(operand) for operand in node.inputs):
                continue
            first, second = (self._ends_in_conv(operand) for operand in node.inputs)
            left, right = node.inputs
            if first or second or self._is_shared_identity(left, right) or self._is_shared_identity(right, left):
                quantized = self.dequantize_behind(left) is not None, self.dequantize_behind(right) is not None
                yield ResidualAdd(node, (first, second), quantized)

    def _is_shared_identity(self, tensor: Tensor, other: Tensor) -> bool:
        """Whether a quantized convolution reads the tensor, and `other` is computed from it."""
        dequantize = producer(tensor)
        quantize = source_quantize(dequantize) if dequantize is not None and dequantize.op == DEQUANTIZE else None
        if quantize is not None and quantize.inputs:
            tensor = quantize.inputs[0]
        readers = {id(reader) for node in tensor.outputs for reader in self._behind_quantizer(node)}
        convolutions = [layer for layer in self.layers if layer.node.op in CONVOLUTIONS]
        if not any(id(layer.node) in readers and self.is_quantized(layer) for layer in convolutions):
            return False
        return tensor.name in reach(other)

    @staticmethod
    def _behind_quantizer(node: Node) -> list[Node]:
        """The readers behind a Q and its DQ; the node itself if it is none."""
        if node.op != QUANTIZE:
            return [node]
        dequantizes = [reader for tensor in node.outputs for reader in tensor.outputs]
        return [reader for dequantize in dequantizes for tensor in dequantize.outputs for reader in tensor.outputs]

    def float_nodes(self) -> list[Node]:
        """Returns the nodes that compute in float, in the order of the graph.

        INT8 are: layers with two quantized inputs, what an engine fuses behind them, pools of quantized tensors, and
        commuting operators whose result is only quantized.
        """
        layers = {id(layer.node): layer for layer in self.layers}
        int8: set[int] = set()
        result = []
        for node in self.nodes:
            if node.op in MOVING or node.op in (QUANTIZE, DEQUANTIZE, "Constant") or not node.inputs:
                continue
            if all(self._is_weight(operand) for operand in node.inputs) or is_integer(node.outputs[:1]):
                continue
            layer = layers.get(id(node))
            if layer is not None:
                runs_int8 = self.is_quantized(layer)
            elif node.op in COMMUTING | AVERAGE_POOLS | {"ReduceMean"} or is_zero_padding(node):
                runs_int8 = self._is_fused(node, int8) or self.dequantize_behind(node.inputs[0]) is not None
                runs_int8 = runs_int8 or (node.op in COMMUTING and self.is_only_quantized(node))
            else:
                runs_int8 = self._is_fused(node, int8)
            if runs_int8:
                int8.add(id(node))
            else:
                result.append(node)
        return result

    def float_islands(self) -> list[list[Node]]:
        """Returns the groups of neighbouring float nodes that take numbers from an INT8 layer and hand them to a Q."""
        remaining = {id(node): node for node in self.float_nodes()}
        floats = set(remaining)
        islands = []
        while remaining:
            _, seed = remaining.popitem()
            group, open_ends = [seed], [seed]
            while open_ends:
                node = open_ends.pop()
                neighbours = [near for tensor in node.inputs for near in tensor.inputs]
                neighbours += [near for tensor in node.outputs for near in tensor.outputs]
                for near in neighbours:
                    if remaining.pop(id(near), None) is not None:
                        group.append(near)
                        open_ends.append(near)
            before = [near for node in group for tensor in node.inputs for near in tensor.inputs]
            fed = any(id(near) not in floats and near.op != "Constant" for near in before)
            if fed and any(near.op == QUANTIZE for node in group for near in self._readers(node)):
                islands.append(group)
        return islands

    def multiply_accumulates(self, layer: Layer) -> int | None:
        """Returns the multiply-accumulates of a layer for one image, None where a shape is unknown."""
        chain, source = walk_back(layer.weight, RESHAPING | {QUANTIZE, DEQUANTIZE})
        values = stored(source)
        sized = layer.activation if layer.node.op == "ConvTranspose" else layer.node.outputs[0]
        if values is None or sized.shape is None:
            return None
        positions = sized.shape[2:] if layer.node.op.startswith("Conv") else sized.shape[1:-1]
        if not all(isinstance(length, int) and length >= 0 for length in positions):
            return None
        return int(values.size) * int(np.prod([int(length) for length in positions if length is not None], initial=1))

    def _is_weight(self, tensor: Tensor) -> bool:
        return stored(walk_back(tensor, RESHAPING | {QUANTIZE, DEQUANTIZE})[1]) is not None

    def _layer(self, node: Node) -> Layer | None:
        first, second = input_at(node, 0), input_at(node, 1)
        if first is None or second is None or not node.outputs:
            return None
        if node.op in CONVOLUTIONS:
            return Layer(node, first, second, input_at(node, 2), 0 if node.op == "Conv" else 1)
        if node.op not in LINEAR or self._is_weight(first) == self._is_weight(second):
            return None
        bias = input_at(node, 2) if node.op == "Gemm" else None
        if self._is_weight(second):
            return Layer(node, first, second, bias, -2 if node.attrs.get("transB", 0) else -1)
        return Layer(node, second, first, bias, -1 if node.attrs.get("transA", 0) else -2)

    def _weight(self, layer: Layer) -> Weight | None:
        chain, source = walk_back(layer.weight, RESHAPING)
        dequantize = producer(source)
        if dequantize is None or dequantize.op != DEQUANTIZE or not dequantize.inputs:
            return None
        quantize = source_quantize(dequantize)
        values = constant(input_at(quantize or dequantize, 0))
        if values is None:
            return None
        axis: int | None = layer.axis % values.ndim if -values.ndim <= layer.axis < values.ndim else None
        for node in chain:
            if node.op == "Transpose" and axis is not None:
                permutation = permutation_of(node, values.ndim)
                axis = None if permutation is None else permutation[axis]
            elif node.op not in ("Identity", "Cast"):
                axis = None
        return Weight(layer, quantize, dequantize, values, axis)

    def _ends_in_conv(self, tensor: Tensor) -> bool:
        """Whether a quantized convolution alone writes `tensor`, and nothing else reads it on the way."""
        chain, source = walk_back(tensor, BRANCH)
        node = producer(source)
        if node is None or node.op not in CONVOLUTIONS or id(node) not in self._weighted:
            return False
        return self.is_private(source) and all(self.is_private(passed.outputs[0]) for passed in chain)

    def _is_fused(self, node: Node, int8: set[int]) -> bool:
        """Whether an operand is written by an INT8 node and read by nodes that an engine fuses behind it alone."""
        if node.op not in EPILOGUE:
            return False
        for operand in node.inputs:
            writer = producer(operand)
            if writer is not None and id(writer) in int8 and operand.name not in self.output_names:
                return all(reader.op in EPILOGUE for reader in operand.outputs)
        return False

    def comes_before_a_layer(self, node: Node) -> bool:
        """Tells whether a layer with weights reads what the node writes, or what is computed from it."""
        layers, seen = {id(layer.node) for layer in self.layers}, set[int]()
        waiting = [reader for tensor in node.outputs for reader in tensor.outputs]
        while waiting:
            reader = waiting.pop()
            if id(reader) in layers:
                return True
            if id(reader) not in seen:
                seen.add(id(reader))
                waiting += [behind for tensor in reader.outputs for behind in tensor.outputs]
        return False

    def is_only_quantized(self, node: Node) -> bool:
        """Tells whether every reader of what the node writes is a Q, with commuting operators only between."""
        readers = list(self._readers(node))
        is_output = any(tensor.name in self.output_names for tensor in node.outputs)
        return bool(readers) and not is_output and all(reader.op == QUANTIZE for reader in readers)

    def _readers(self, node: Node) -> Iterator[Node]:
        """The nodes that read a node's results, through commuting operators."""
        seen: set[int] = set()
        waiting = [reader for tensor in node.outputs for reader in tensor.outputs]
        while waiting:
            reader = waiting.pop()
            if id(reader) in seen:
                continue
            seen.add(id(reader))
            if reader.op in COMMUTING:
                waiting += [behind for tensor in reader.outputs for behind in tensor.outputs]
            else:
                yield reader
