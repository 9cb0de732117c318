"""Where do quantizers go?

Decides which tensors get a quantizer, which share one, and which readers see the quantized value, for a network of
either way in (`view`). The rules are NVIDIA's for explicit quantization: inputs and weights of weighted layers, one
operand of every residual add (the identity), inputs of average pools, and one scale per tensor however many layers
read it. Each is a function of `RULES`, in the order in which they ask. Nothing is changed here; `fake_quant` and
`insertion` carry the plan out.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from ptq.config import Dialect
from ptq.errors import UsageError
from ptq.quantization.view import GraphView, Kind, Operation, Tensor, reach
from ptq.records.plan import LayerInput, PlacementPlan, QuantizerSpec

# A quantizer behind them may as well stand before them: max(Q(x)) = Q(max(x)), and so for permutations.
_COMMUTING: tuple[Kind, ...] = ("max_pool", "permutation")
# They move numbers and compute none.
_MOVING: tuple[Kind, ...] = ("permutation", "reshape")
# What a graph has where adds or average pools stay in float by choice.
_ADD_OPERATORS = ("Add",)
_POOL_OPERATORS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
_NOT_TRACED = "residual adds and pools stay in float: the model could not be traced"


def place_quantizers(
    view: GraphView,
    *,
    residuals: bool,
    pools: bool,
    commuting_pools: bool,
    first_layer: bool,
    last_layer: bool,
    skip_layers: Collection[str],
    whole_operators: bool = False,
) -> PlacementPlan:
    """Returns where quantizers go in a network whose BatchNorm is folded.

    Args:
        view: the network; where it is not traced, only weighted layers get quantizers.
        residuals: quantize the identity operand of residual adds.
        pools: quantize the inputs of average pools, for the multiplications of gates too.
        commuting_pools: put a quantizer before a max pool or a permutation of axes rather than behind it.
        first_layer: quantize the first weighted layer.
        last_layer: quantize the last weighted layer.
        skip_layers: layers left in float, or modules all of whose layers are.
        whole_operators: add the quantizers of the onnxruntime dialect, whose operators compute in INT8 where all that
            they read and write is quantized.

    Raises:
        UsageError: `skip_layers` names a layer that does not exist, or nothing is left to quantize.
    """
    skipped = _skipped(list(view.layers), first_layer=first_layer, last_layer=last_layer, skip_layers=skip_layers)
    quantized = tuple(name for name in view.layers if name not in skipped)
    if not quantized:
        raise UsageError("No layer is left to quantize; remove names from quantization.skip_layers.")
    residuals, pools = residuals and view.is_traced, pools and view.is_traced
    adds = residual_adds(view, quantized)
    placement = _Placement(
        view, quantized, residual_adds=adds if residuals else [], quantize_pools=pools, commute=commuting_pools
    )
    for rule in RULES if view.is_traced else ():
        rule(placement)
    specs = placement.specs(whole_operators=whole_operators)
    activations = specs if view.is_traced else (_spec(name, (name,)) for name in quantized)
    return PlacementPlan(
        quantizers=(*activations, *(_weight_spec(name, view.layers[name].axis) for name in quantized)),
        quantized_layers=quantized,
        float_layers=(*(name for name in view.layers if name in skipped), *view.float_layers),
        residual_adds=len(adds),
        quantized_residual_adds=len(adds) if residuals else 0,
        traced=view.is_traced,
        warnings=view.warnings if view.is_traced else (*view.warnings, _NOT_TRACED),
        layer_inputs=_layer_inputs(view, quantized),
        chosen_float_layers=tuple(name for name in view.layers if name in skipped),
        float_operators=(*(() if residuals else _ADD_OPERATORS), *(() if pools else _POOL_OPERATORS)),
    )


def is_within(layer: str, given: str) -> bool:
    """Whether a layer is the one that is named, or in the module that is."""
    return layer == given or layer.startswith(f"{given}.")


def _skipped(names: list[str], *, first_layer: bool, last_layer: bool, skip_layers: Collection[str]) -> Collection[str]:
    within = {name: [each for each in names if is_within(each, name)] for name in skip_layers}
    unknown = [name for name, found in within.items() if not found]
    if unknown:
        raise UsageError(
            f"quantization.skip_layers names {', '.join(unknown)}; the model has no such layer. Its layers are "
            f"{', '.join(names[:6])}, ... ({len(names)} in all)."
        )
    skipped = {each for found in within.values() for each in found}
    return {*skipped, *([] if first_layer else names[:1]), *([] if last_layer else names[-1:])}


def _layer_inputs(view: GraphView, quantized: Collection[str]) -> tuple[LayerInput, ...]:
    """What each layer reads; a quantizer is named after the tensor its readers read, wherever it was moved."""
    calls: dict[str, list[Operation]] = {}
    for operation in view.of_kind("convolution", "linear"):
        if operation.layer in quantized:
            calls.setdefault(operation.layer, []).append(operation)
    # A layer that is called twice reads two tensors: no single mean is its input's. The channels are the last axis of
    # what a linear layer reads, else the second.
    return tuple(
        LayerInput(name, found[0].inputs[0].name, -1 if found[0].kind == "linear" else 1)
        for name, found in calls.items()
        if len(found) == 1
    )


def _weight_spec(layer: str, axis: int) -> QuantizerSpec:
    return QuantizerSpec(
        name=f"{layer}.weight", kind="weight", observed="", axis=axis, never_negative=False, readers=(layer,)
    )


def _spec(
    name: str, readers: tuple[str, ...], tensors: tuple[str, ...] = (), *, never_negative: bool = False
) -> QuantizerSpec:
    return QuantizerSpec(
        name=name,
        kind="activation",
        observed=name,
        axis=None,
        never_negative=never_negative,
        readers=readers,
        tensors=tensors,
    )


# What counts as what


def is_sum(operation: Operation) -> bool:
    """Whether an operation adds two different activations."""
    return operation.kind == "add" and len(operation.inputs) == 2 and operation.inputs[0] is not operation.inputs[1]


def residual_adds(view: GraphView, quantized: Collection[str]) -> list[Operation]:
    """Returns the additions of two activations that share an ancestor and that can be had in INT8.

    At least one operand ends in a convolution: an engine computes such an addition in the convolution's last step. Or a
    convolution among the `quantized` layers reads the identity, as in ConvNeXt: it is quantized already. One between
    linear layers, as transformers have, stays in float: its identity carries the sum of all blocks, which INT8 serves
    badly.
    """
    adds = []
    for add in filter(is_sum, view.operations):
        left, right = add.inputs
        left_reach, right_reach = reach(left), reach(right)
        branches = [*([] if left in right_reach else [left]), *([] if right in left_reach else [right])]
        if left_reach & right_reach and (
            any(_ends_in_convolution(branch) for branch in branches)
            or any(
                reader.kind == "convolution" and reader.layer in quantized for reader in identity_operand(add).readers
            )
        ):
            adds.append(add)
    return adds


def _ends_in_convolution(tensor: Tensor) -> bool:
    """Whether the last weighted layer before the tensor is a convolution, with operations of one tensor between."""
    operation = tensor.producer
    while operation is not None and not operation.layer:
        operation = operation.inputs[0].producer if len(operation.inputs) == 1 else None
    return operation is not None and operation.kind == "convolution"


def identity_operand(add: Operation) -> Tensor:
    """Returns the operand of a residual add that is quantized: the identity, or the downsample branch.

    An operand from which the other is computed is the identity. Where both are branches, the one with fewer
    weighted layers since they parted is the downsample branch; on a tie the one that is not a bare weighted layer.
    """
    left, right = add.inputs
    left_reach, right_reach = reach(left), reach(right)
    if left in right_reach:
        return left
    if right in left_reach:
        return right
    left_weighted = sum(map(_is_weighted, left_reach - right_reach))
    right_weighted = sum(map(_is_weighted, right_reach - left_reach))
    if left_weighted != right_weighted:
        return left if left_weighted < right_weighted else right
    return right if _is_weighted(left) else left


def _is_weighted(tensor: Tensor) -> bool:
    return tensor.producer is not None and bool(tensor.producer.layer)


def _gate_multiplications(pool: Operation) -> list[Operation]:
    """What multiplies the pool's input by what follows the pool: the end of a squeeze-and-excitation gate.

    It reads the tensor quantized as the pool does, so that the layer before them writes INT8.
    """
    products = [reader for reader in pool.inputs[0].readers if reader.kind == "multiply"]
    return [product for product in products if pool.outputs[0] in reach(product.outputs[0])]


def _cut_from(tensor: Tensor) -> tuple[Tensor, Operation | None]:
    """The tensor that slices and zero padding alone have made this one from, and who reads it; itself and None else.

    They commute with its quantizer: the shortcut of a CIFAR ResNet is such a tensor.
    """
    reader = None
    while tensor.is_private and tensor.producer is not None and tensor.producer.kind == "cut":
        reader = tensor.producer
        tensor = reader.inputs[0]
    return tensor, reader


def dense_blocks(view: GraphView) -> list[list[Operation]]:
    """Returns the concats that read each other's operands, block by block, the one that reads all of them last.

    In a DenseNet the output of every layer goes into the concats of all layers behind it.
    """
    blocks: list[list[Operation]] = []
    for concat in view.of_kind("concat"):
        last = next((block for block in blocks if set(block[-1].inputs) < set(concat.inputs)), None)
        if last is None:
            blocks.append([concat])
        else:
            last.append(concat)
    return [block for block in blocks if len(block) > 1]


# The quantizers


@dataclass
class _Group:
    """One quantizer under construction."""

    tensors: list[Tensor]
    observed: Tensor
    readers: list[str] = field(default_factory=list)
    dialect: Dialect | None = None


@dataclass
class _Placement:
    """Collects who wants to read which tensor quantized, one quantizer per tensor."""

    view: GraphView
    quantized: Collection[str]
    residual_adds: list[Operation]
    quantize_pools: bool
    commute: bool
    groups: dict[Tensor, _Group] = field(default_factory=dict)

    def ask(self, tensor: Tensor, reader: Operation) -> None:
        """Notes that `reader` is to read `tensor` quantized."""
        group = self.groups.setdefault(tensor, _Group(tensors=[tensor], observed=tensor))
        if reader.name not in group.readers:
            group.readers.append(reader.name)

    def specs(self, *, whole_operators: bool) -> Iterator[QuantizerSpec]:
        """Yields the specs in the order of the graph, with quantizers moved before operations that commute."""
        for tensor in list(self.groups) if self.commute else ():
            self._move_before_commuting(tensor)
        for tensor in list(self.groups):
            self._move_before_concat(tensor)
        if whole_operators:
            self._quantize_whole_operators()
        order = {tensor: position for position, tensor in enumerate(self.view.tensors.values())}
        unique = {id(group): group for group in self.groups.values()}
        assert len({group.observed for group in unique.values()}) == len(unique)
        for group in sorted(unique.values(), key=lambda group: order[group.observed]):
            never_negative = all(tensor.never_negative for tensor in group.tensors)
            tensors = tuple(tensor.name for tensor in group.tensors)
            found = _spec(group.observed.name, tuple(group.readers), tensors, never_negative=never_negative)
            yield replace(found, dialect=group.dialect)

    def _quantize_whole_operators(self) -> None:
        """What the operators of the onnxruntime dialect need besides is read quantized by all that reads it."""
        for tensor in dict.fromkeys(_tensors_of_whole_operators(self)):
            if not _ends_the_network(tensor) and not self._is_quantized(tensor):
                readers = list(dict.fromkeys(reader.name for reader in tensor.readers))
                self.groups[tensor] = _Group([tensor], tensor, readers, "onnxruntime")

    def _is_quantized(self, tensor: Tensor) -> bool:
        """Whether a tensor has a quantizer, or what it is moved from has, or all that it joins have the same one."""
        while tensor not in self.groups and tensor.producer is not None and tensor.producer.kind in _COMMUTING:
            tensor = tensor.producer.inputs[0]
        if tensor in self.groups or tensor.producer is None or tensor.producer.kind != "concat":
            return tensor in self.groups
        joined = [self.groups.get(operand) for operand in tensor.producer.inputs]
        return joined[0] is not None and all(group is joined[0] for group in joined)

    def _move_before_commuting(self, behind: Tensor) -> None:
        """A quantizer before a max pool or a permutation lets it run in INT8."""
        while behind.producer is not None and behind.producer.kind in _COMMUTING:
            source, group = behind.producer.inputs[0], self.groups[behind]
            if source in self.groups or not source.is_private or group.tensors != [behind] or behind.is_output:
                return
            if any(reader.name not in group.readers and not self._hands_on(reader) for reader in behind.readers):
                return
            del self.groups[behind]
            group.tensors, group.readers = [source], [behind.producer.name]
            self.groups[source] = group
            behind = source

    def _hands_on(self, operation: Operation) -> bool:
        """Whether an operation moves or compares numbers that it hands to a quantizer."""
        return operation.kind in _COMMUTING and operation.outputs[0] in self.groups

    def _move_before_concat(self, tensor: Tensor) -> None:
        """The operands of a concat, where nothing else reads them, are quantized with one scale before it."""
        group, concat = self.groups.get(tensor), tensor.producer
        if group is None or concat is None or concat.kind != "concat" or group.tensors != [tensor]:
            return
        if any(not operand.is_private or operand in self.groups for operand in concat.inputs):
            return
        # An addition that reads it in float would find both of its operands quantized.
        if any(is_sum(reader) and reader.name not in group.readers for reader in tensor.readers):
            return
        del self.groups[tensor]
        group.tensors, group.readers = list(concat.inputs), [concat.name]
        self.groups |= dict.fromkeys(concat.inputs, group)


# The rules


def _quantize_layer_inputs(placement: _Placement) -> None:
    for operation in placement.view.of_kind("convolution", "linear"):
        if operation.layer in placement.quantized:
            placement.ask(operation.inputs[0], operation)


def _quantize_pool_inputs(placement: _Placement) -> None:
    """An average pool reads INT8, and so does what ends the gate that it belongs to."""
    for pool in placement.view.of_kind("quantized_pool") if placement.quantize_pools else ():
        for reader in (pool, *_gate_multiplications(pool)):
            placement.ask(pool.inputs[0], reader)


def _quantize_before_permutations(placement: _Placement) -> None:
    """What a layer or a residual add hands to a permutation alone, as in ConvNeXt, is written and moved as INT8."""
    adds = set(placement.residual_adds)
    for permutation in placement.view.of_kind("permutation"):
        source = permutation.inputs[0]
        is_int8 = source.producer in adds or (source.producer and source.producer.layer in placement.quantized)
        if is_int8 and source.is_private and not _is_needed_in_float(placement, permutation):
            placement.ask(source, permutation)


def _is_needed_in_float(placement: _Placement, permutation: Operation) -> bool:
    """Whether what is moved is quantized once more, is the output, or is an operand of an addition.

    An addition has one quantized operand at most.
    """
    pending = [permutation]
    while pending:
        moved = pending.pop().outputs[0]
        if moved.is_output or moved in placement.groups or any(is_sum(reader) for reader in moved.readers):
            return True
        pending += [reader for reader in moved.readers if reader.kind in _MOVING]
    return False


def _quantize_identities(placement: _Placement) -> None:
    """A shortcut that is cut from a quantized tensor, or padded with zeros, needs no quantizer of its own."""
    for add in placement.residual_adds:
        identity = identity_operand(add)
        source, cutter = _cut_from(identity)
        if cutter is not None and source in placement.groups:
            placement.ask(source, cutter)
        else:
            placement.ask(identity, add)


def _quantize_dense_blocks(placement: _Placement) -> None:
    """The operands of a dense block's concats are quantized with the scale of their last concat.

    So the layers write INT8, and what is read again and again is a quarter of the size. A block of which a tensor has a
    quantizer already is left alone.
    """
    groups = placement.groups
    for concats in dense_blocks(placement.view) if placement.view.shares_dense_blocks else ():
        last = concats[-1]
        if any(tensor in groups for tensor in (*last.inputs, *(concat.outputs[0] for concat in concats))):
            continue
        group = _Group(tensors=[], observed=last.outputs[0], readers=[concat.name for concat in concats])
        for tensor in last.inputs:
            pool = tensor.producer
            while placement.commute and pool is not None and pool.kind == "max_pool":
                if pool.inputs[0] in groups or not pool.inputs[0].is_private:
                    break
                group.readers.append(pool.name)
                tensor = pool.inputs[0]
                pool = tensor.producer
            group.tensors.append(tensor)
        groups |= dict.fromkeys(group.tensors, group)


def _tensors_of_whole_operators(placement: _Placement) -> Iterator[Tensor]:
    """What the convolutions, residual adds, average pools and gates that are quantized read and write besides."""
    for operation in placement.view.operations:
        if operation.kind == "convolution" and operation.layer in placement.quantized:
            yield _behind_relu(operation.outputs[0])
        elif operation in placement.residual_adds:
            yield from (*operation.inputs, _behind_relu(operation.outputs[0]))
        elif operation.kind == "quantized_pool" and placement.quantize_pools:
            yield operation.outputs[0]
            for product in _gate_multiplications(operation):
                yield from product.inputs


def _ends_the_network(tensor: Tensor) -> bool:
    """Whether no layer comes behind a tensor: the output does, or a softmax before it, which stay in float."""
    seen: set[Operation] = set()
    pending = list(tensor.readers)
    while pending:
        operation = pending.pop()
        if operation.layer:
            return False
        if operation not in seen:
            seen.add(operation)
            pending += [reader for output in operation.outputs for reader in output.readers]
    return True


def _behind_relu(tensor: Tensor) -> Tensor:
    """The tensor once a ReLU has clipped it, which is a quantizer's part where the ReLU alone reads it."""
    if not tensor.is_private or tensor.never_negative:
        return tensor
    (reader,) = tensor.readers
    clips = reader.channels.how in ("kept", "clipped") and reader.outputs[0].never_negative
    return reader.outputs[0] if reader.kind == "other" and clips else tensor


RULES = (
    _quantize_layer_inputs,
    _quantize_pool_inputs,
    _quantize_before_permutations,
    _quantize_identities,
    _quantize_dense_blocks,
)
