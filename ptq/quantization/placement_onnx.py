"""Where do quantizers go in an ONNX graph?

The rules of `placement`, read from the operators of a graph in canonical form (`onnx_canonical`) instead of a
`torch.fx` graph: the same network gets the same quantizers either way. Nothing is changed here; `onnx_insertion`
carries the plan out.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ptq.errors import UsageError
from ptq.graph.names import bias_add
from ptq.graph.nodes import RESHAPING, Node, Tensor, constant, is_zero_padding, producer, reach
from ptq.graph.qdq_graph import Layer, QdqGraph
from ptq.records.plan import LayerInput, PlacementPlan, QuantizerSpec

_WEIGHT_ENDING = ".weight"
_CONVOLUTIONS = ("Conv", "ConvTranspose")
# A quantizer behind them may as well stand before them.
_COMMUTING = ("MaxPool", "Transpose")
# What stays in float where adds or average pools are left alone by choice.
_ADD_OPERATORS = ("Add",)
_POOL_OPERATORS = ("AveragePool", "GlobalAveragePool", "ReduceMean")


def place_quantizers(
    graph: QdqGraph,
    layers: Sequence[Layer],
    *,
    residuals: bool,
    pools: bool,
    commuting_pools: bool,
    first_layer: bool,
    last_layer: bool,
    skip_layers: Collection[str],
) -> PlacementPlan:
    """Returns where quantizers go in a float graph in canonical form, its shapes inferred.

    Args:
        graph: the graph, its shapes inferred.
        layers: its layers with a stored weight, as `onnx_names.layers_of` yields them.
        residuals: quantize the identity operand of residual adds.
        pools: quantize the inputs of average pools, for the multiplications of gates too.
        commuting_pools: put a quantizer before a max pool or a permutation of axes rather than behind it.
        first_layer: quantize the first weighted layer.
        last_layer: quantize the last weighted layer.
        skip_layers: layers left in float.

    Raises:
        UsageError: `skip_layers` names a layer that does not exist, or nothing is left to quantize.
    """
    by_name: dict[str, list[Layer]] = {}
    for layer in layers:
        by_name.setdefault(layer_name(layer), []).append(layer)
    skipped = _skipped(list(by_name), first_layer=first_layer, last_layer=last_layer, skip_layers=skip_layers)
    quantized = [name for name in by_name if name not in skipped]
    if not quantized:
        raise UsageError("No layer is left to quantize; remove names from quantization.skip_layers.")
    requests = _Requests(graph, commuting_pools)
    for name in quantized:
        for layer in by_name[name]:
            requests.ask(layer.activation, layer.node)
    for pool in graph.average_pools() if pools else ():
        for reader in (pool, *_gate_multiplications(pool)):
            requests.ask(pool.inputs[0], reader)
    nodes = [layer.node for name in quantized for layer in by_name[name]]
    adds = residual_adds(graph, layers, nodes)
    for node in (*nodes, *(adds if residuals else ())):
        written = (bias_add(graph, node) or node).outputs[0]
        if [reader.op for reader in written.outputs] == ["Transpose"] and requests.may_take_moved(written.outputs[0]):
            requests.ask(written, written.outputs[0])
    for add in adds if residuals else ():
        identity = identity_operand(add, layers)
        source, cutter = _cut_from(graph, identity)
        if cutter is not None and requests.has(source):
            requests.ask(source, cutter)
        else:
            requests.ask(identity, add)
    weights = [_weight_quantizer(name, by_name[name][0]) for name in quantized]
    others = [layer for layer in graph.layers if id(layer.node) not in {id(known.node) for known in layers}]
    return PlacementPlan(
        quantizers=(*requests.specs(), *weights),
        quantized_layers=tuple(quantized),
        float_layers=(*(name for name in by_name if name in skipped), *(layer.node.name for layer in others)),
        residual_adds=len(adds),
        quantized_residual_adds=len(adds) if residuals else 0,
        traced=True,
        warnings=_warnings(others),
        layer_inputs=tuple(
            LayerInput(name, by_name[name][0].activation.name, _channel_axis(by_name[name][0].node))
            for name in quantized
            if len(by_name[name]) == 1
        ),
        float_operators=(*(() if residuals else _ADD_OPERATORS), *(() if pools else _POOL_OPERATORS)),
    )


def layer_name(layer: Layer) -> str:
    """Returns the name of a layer of a canonical graph: its weight is `<name>.weight`."""
    return layer.weight.name.removesuffix(_WEIGHT_ENDING)


def _skipped(
    names: Sequence[str], *, first_layer: bool, last_layer: bool, skip_layers: Collection[str]
) -> Collection[str]:
    if not names:
        raise UsageError("The model has no convolution and no linear layer with stored weights; nothing to quantize.")
    unknown = [name for name in skip_layers if name not in names]
    if unknown:
        raise UsageError(
            f"quantization.skip_layers names {', '.join(unknown)}; the model has no such layer. Its layers are "
            f"{', '.join(names[:6])}, ... ({len(names)} in all)."
        )
    return {*skip_layers, *([] if first_layer else names[:1]), *([] if last_layer else names[-1:])}


def _weight_quantizer(name: str, layer: Layer) -> QuantizerSpec:
    rank = 2 if layer.node.op in ("Gemm", "MatMul") else 0
    axis = layer.axis % rank if rank else layer.axis
    return QuantizerSpec(
        name=f"{name}{_WEIGHT_ENDING}", kind="weight", observed="", axis=axis, never_negative=False, readers=(name,)
    )


def _warnings(others: Sequence[Layer]) -> tuple[str, ...]:
    if not others:
        return ()
    names = ", ".join(layer.node.name for layer in others[:3])
    return (f"{len(others)} layers stay in float, for their weights are computed or stored unusually: {names}.",)


def _channel_axis(node: Node) -> int:
    """The axis of the input channels: the last for a linear layer, else the second."""
    return -1 if node.op in ("Gemm", "MatMul") else 1


def _gate_multiplications(pool: Node) -> list[Node]:
    """What multiplies the pool's input by what follows the pool: the end of a squeeze-and-excitation gate."""
    products = [reader for reader in pool.inputs[0].outputs if reader.op == "Mul"]
    return [product for product in products if pool.outputs[0].name in _reach(product.outputs[0])]


def _operands(node: Node) -> list[Tensor]:
    """What a node reads of the image; integers are sizes and positions, from which masks are made."""
    return [
        tensor
        for tensor in node.inputs
        if tensor.name and constant(tensor) is None and getattr(tensor.dtype, "kind", "f") not in "iub"
    ]


def _reach(tensor: Tensor) -> dict[str, Tensor]:
    """The tensor and every computed tensor whose values it depends on, by name."""
    return reach(tensor, _operands)


def _is_sum(node: Node) -> bool:
    """Whether a node adds two different activations."""
    operands = _operands(node) if node.op == "Add" else []
    return len(operands) == 2 and operands[0] is not operands[1]


def residual_adds(graph: QdqGraph, layers: Sequence[Layer], quantized: Sequence[Node]) -> list[Node]:
    """Returns the additions of two activations that share an ancestor and that can be had in INT8.

    At least one operand ends in a convolution, or a convolution among the nodes of `quantized` layers reads the
    identity: see `placement.residual_adds`.
    """
    convolutions = {id(node) for node in quantized if node.op in _CONVOLUTIONS}
    adds = []
    for node in graph.nodes:
        if not _is_sum(node):
            continue
        operands = _operands(node)
        reach = [set(_reach(operand)) for operand in operands]
        shared = reach[0] & reach[1]
        branches = [operand for operand, names in zip(operands, reach, strict=True) if names - shared]
        if shared and (
            any(_ends_in_convolution(branch, layers) for branch in branches)
            or any(id(reader) in convolutions for reader in identity_operand(node, layers).outputs)
        ):
            adds.append(node)
    return adds


def _ends_in_convolution(tensor: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether the last weighted layer before the tensor is a convolution, with operations of one tensor between."""
    weighted = {id(layer.node) for layer in layers}
    node = producer(tensor)
    while node is not None and id(node) not in weighted:
        sources = _operands(node)
        node = producer(sources[0]) if len(sources) == 1 else None
    return node is not None and node.op in _CONVOLUTIONS


def identity_operand(add: Node, layers: Sequence[Layer]) -> Tensor:
    """Returns the operand of a residual add that is quantized: the identity, or the downsample branch.

    An operand from which the other is computed is the identity. Where both are branches, the one with fewer
    weighted layers since they parted is the downsample branch; on a tie the one that is not a bare weighted layer.
    """
    weighted = {layer.node.outputs[0].name for layer in layers}
    left, right = _operands(add)
    left_reach, right_reach = set(_reach(left)), set(_reach(right))
    if left.name in right_reach:
        return left
    if right.name in left_reach:
        return right
    shared = left_reach & right_reach
    left_weighted, right_weighted = len((left_reach - shared) & weighted), len((right_reach - shared) & weighted)
    if left_weighted != right_weighted:
        return left if left_weighted < right_weighted else right
    return left if left.name not in weighted else right


def _cut_from(graph: QdqGraph, tensor: Tensor) -> tuple[Tensor, Node | None]:
    """The tensor that slices and zero padding alone have made this one from, and who reads it; itself and None else."""
    reader = None
    while graph.is_private(tensor):
        node = producer(tensor)
        if node is None or not (node.op == "Slice" or is_zero_padding(node)):
            break
        tensor, reader = node.inputs[0], node
    return tensor, reader


@dataclass
class _Group:
    """One quantizer under construction."""

    tensors: list[Tensor]
    observed: Tensor
    readers: list[str] = field(default_factory=list)


class _Requests:
    """Collects who wants to read which tensor quantized, one quantizer per tensor."""

    def __init__(self, graph: QdqGraph, commuting_pools: bool) -> None:
        self._graph = graph
        self._commuting_pools = commuting_pools
        self._groups: dict[str, _Group] = {}

    def ask(self, tensor: Tensor, reader: Node) -> None:
        """Notes that `reader` is to read `tensor` quantized."""
        group = self._groups.setdefault(tensor.name, _Group(tensors=[tensor], observed=tensor))
        if reader.name not in group.readers:
            group.readers.append(reader.name)

    def has(self, tensor: Tensor) -> bool:
        """Whether somebody reads `tensor` quantized."""
        return tensor.name in self._groups

    def may_take_moved(self, permutation: Node) -> bool:
        """Whether a permutation may read its input quantized: see the method of this name in `placement`."""
        pending = [permutation]
        while pending:
            moved = pending.pop().outputs[0]
            is_output = any(moved is output for output in self._graph.outputs)
            if is_output or moved.name in self._groups or any(_is_sum(reader) for reader in moved.outputs):
                return False
            pending += [reader for reader in moved.outputs if reader.op in RESHAPING]
        return self._graph.is_private(permutation.inputs[0])

    def specs(self) -> Iterable[QuantizerSpec]:
        """Returns the specs in the order of the graph, with quantizers moved before operations that commute."""
        for name in list(self._groups) if self._commuting_pools else ():
            self._move_before_commuting(name)
        for name in list(self._groups):
            self._move_before_concat(name)
        order = {tensor.name: position for position, tensor in enumerate(self._graph.inputs)}
        for node in self._graph.nodes:
            for tensor in node.outputs:
                order.setdefault(tensor.name, len(order))
        unique = {id(group): group for group in self._groups.values()}
        for group in sorted(unique.values(), key=lambda group: order[group.observed.name]):
            yield QuantizerSpec(
                name=group.observed.name,
                kind="activation",
                observed=group.observed.name,
                axis=None,
                never_negative=all(self._graph.never_negative(tensor) for tensor in group.tensors),
                readers=tuple(group.readers),
                tensors=tuple(tensor.name for tensor in group.tensors),
            )

    def _move_before_commuting(self, name: str) -> None:
        """max(Q(x)) = Q(max(x)), and so for permutations: the quantizer before it lets the operation run in INT8."""
        node = producer(self._groups[name].tensors[0])
        while node is not None and node.op in _COMMUTING and len(node.outputs) == 1:
            source, result = node.inputs[0], node.outputs[0]
            group = self._groups[result.name]
            if source.name in self._groups or not self._graph.is_private(source) or group.tensors != [result]:
                return
            if any(reader.name not in group.readers and not self._hands_on(reader) for reader in result.outputs):
                return
            del self._groups[result.name]
            group.tensors, group.readers = [source], [node.name]
            self._groups[source.name] = group
            node = producer(source)

    def _hands_on(self, node: Node) -> bool:
        """Whether a node moves or compares numbers that it hands to a quantizer."""
        return node.op in _COMMUTING and node.outputs[0].name in self._groups

    def _move_before_concat(self, name: str) -> None:
        """The operands of a concat, where nothing else reads them, are quantized with one scale before it."""
        group = self._groups.get(name)
        concat = producer(group.tensors[0]) if group is not None else None
        if group is None or concat is None or concat.op != "Concat" or [t.name for t in group.tensors] != [name]:
            return
        operands = _operands(concat)
        if len(operands) != len(concat.inputs):
            return
        if any(not self._graph.is_private(operand) or operand.name in self._groups for operand in operands):
            return
        del self._groups[name]
        group.tensors, group.readers = operands, [concat.name]
        for operand in operands:
            self._groups[operand.name] = group
