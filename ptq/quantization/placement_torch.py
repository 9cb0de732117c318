"""Where do quantizers go?

Reads the BatchNorm-folded `torch.fx` graph and decides which tensors get a quantizer, which share one, and
which readers see the quantized value. Nothing is changed here; `fake_quant` carries the plan out. The rules
are NVIDIA's for explicit quantization: inputs and weights of weighted layers, one operand of every residual
add (the identity), inputs of average pools, and one scale per tensor however many layers read it. A gate of
squeeze-and-excitation multiplies its pool's input again, and reads it quantized too. What a layer or a residual
add hands to a permutation of axes alone, as in ConvNeXt, is quantized before it, so that it is written and
moved as INT8, unless an addition or the output reads what is moved. A shortcut that is cut from a quantized
tensor, or padded with zeros, needs no quantizer of its own.
"""

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from ptq.errors import UsageError
from ptq.networks.fake_quant import weight_axis
from ptq.records.plan import LayerInput, PlacementPlan, QuantizerSpec

WEIGHTED_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_AVERAGE_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_MAX_POOLS = (nn.MaxPool2d,)
_AVERAGE_POOL_FUNCTIONS = {F.avg_pool2d, F.adaptive_avg_pool2d}
_MAX_POOL_FUNCTIONS = {F.max_pool2d, torch.max_pool2d}
_ADDS = {operator.add, torch.add}
_PERMUTATIONS = (
    torch.permute, "permute", torch.transpose, "transpose", torch.swapaxes, "swapaxes", torch.movedim, "movedim",
)  # fmt: skip
# With the permutations, what moves numbers and computes none.
_RESHAPES = (
    torch.reshape, "reshape", "view", torch.flatten, "flatten", "contiguous", torch.squeeze, "squeeze",
    torch.unsqueeze, "unsqueeze",
)  # fmt: skip
_MULTIPLICATIONS = (operator.mul, torch.mul, "mul")
# What a graph has where adds or average pools stay in float by choice.
_ADD_OPERATORS = ("Add",)
_POOL_OPERATORS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
_NON_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
_NON_NEGATIVE_FUNCTIONS = {
    F.relu,
    F.relu6,
    torch.relu,
    torch.sigmoid,
    F.sigmoid,
    F.hardsigmoid,
    F.softmax,
    torch.softmax,
}
_NON_NEGATIVE_METHODS = {"relu", "sigmoid", "softmax"}
_SIGN_KEEPING_FUNCTIONS = {
    torch.flatten, torch.cat, operator.add, torch.add, operator.mul, torch.mul, operator.getitem, torch.reshape,
    torch.permute,
} | _AVERAGE_POOL_FUNCTIONS | _MAX_POOL_FUNCTIONS  # fmt: skip
_SIGN_KEEPING_METHODS = {"flatten", "view", "reshape", "permute", "transpose", "contiguous", "mean", "add", "mul"}


def place_quantizers(
    module: nn.Module,
    *,
    traced: bool,
    residuals: bool,
    pools: bool,
    commuting_pools: bool,
    first_layer: bool,
    last_layer: bool,
    skip_layers: Collection[str],
) -> PlacementPlan:
    """Returns where quantizers go in a folded model.

    Args:
        module: the folded model; a `GraphModule` if `traced`.
        traced: whether the model could be traced; if not, only weighted layers get quantizers.
        residuals: quantize the identity operand of residual adds.
        pools: quantize the inputs of average pools, for the multiplications of gates too.
        commuting_pools: put a quantizer before a max pool or a permutation of axes rather than behind it.
        first_layer: quantize the first weighted layer.
        last_layer: quantize the last weighted layer.
        skip_layers: module names left in float.

    Raises:
        UsageError: `skip_layers` names a layer that does not exist, or nothing is left to quantize.
    """
    layers = _weighted_layers(module, traced)
    unknown = [name for name in skip_layers if name not in layers]
    if unknown:
        raise UsageError(
            f"quantization.skip_layers names {', '.join(unknown)}; the model has no such layer. Its layers are "
            f"{', '.join(layers[:6])}, ... ({len(layers)} in all)."
        )
    skipped = set(skip_layers)
    if not first_layer:
        skipped.add(layers[0])
    if not last_layer:
        skipped.add(layers[-1])
    quantized = [name for name in layers if name not in skipped]
    if not quantized:
        raise UsageError("No layer is left to quantize; remove names from quantization.skip_layers.")
    weights = [
        QuantizerSpec(
            name=f"{name}.weight", kind="weight", observed="", axis=weight_axis(module.get_submodule(name)),
            never_negative=False, readers=(name,),
        )
        for name in quantized
    ]  # fmt: skip
    if not traced:
        activations = [
            QuantizerSpec(name=name, kind="activation", observed=name, axis=None, never_negative=False, readers=(name,))
            for name in quantized
        ]
        warning = "residual adds and pools stay in float: the model could not be traced"
        return PlacementPlan(
            (*activations, *weights), tuple(quantized), tuple(skipped), 0, 0, False, (warning,),
            float_operators=(*_ADD_OPERATORS, *_POOL_OPERATORS),
        )  # fmt: skip
    assert isinstance(module, fx.GraphModule)
    requests = _Requests(module, commuting_pools)
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target in quantized:
            requests.ask(_tensor_input(node), node)
        elif pools and _is_average_pool(module, node):
            for reader in (node, *_gate_multiplications(node)):
                requests.ask(_tensor_input(node), reader)
    adds = residual_adds(module, quantized)
    calls = {node for node in module.graph.nodes if node.op == "call_module" and node.target in quantized}
    int8 = calls | (set(adds) if residuals else set())
    for node in module.graph.nodes:
        if _is_permutation(node) and _tensor_input(node) in int8 and requests.may_take_moved(node):
            requests.ask(_tensor_input(node), node)
    if residuals:
        for add in adds:
            identity = identity_operand(module, add)
            source, cutter = _cut_from(module, identity)
            if cutter is not None and requests.has(source):
                requests.ask(source, cutter)
            else:
                requests.ask(identity, add)
    for concats in dense_blocks(module):
        requests.ask_for_block(concats)
    return PlacementPlan(
        quantizers=(*requests.specs(), *weights),
        quantized_layers=tuple(quantized),
        float_layers=tuple(name for name in layers if name in skipped),
        residual_adds=len(adds),
        quantized_residual_adds=len(adds) if residuals else 0,
        traced=True,
        warnings=(),
        layer_inputs=_layer_inputs(module, quantized),
        float_operators=(*(() if residuals else _ADD_OPERATORS), *(() if pools else _POOL_OPERATORS)),
    )


def _layer_inputs(module: fx.GraphModule, layers: Collection[str]) -> tuple[LayerInput, ...]:
    """What each layer reads; a quantizer is named after the tensor its readers read, wherever it was moved."""
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            calls.setdefault(node.target, []).append(node)
    # A layer that is called twice reads two tensors: no single mean is its input's.
    return tuple(
        LayerInput(name, _tensor_input(nodes[0]).name, _channel_axis(module.get_submodule(name)))
        for name, nodes in calls.items()
        if len(nodes) == 1
    )


def _channel_axis(layer: nn.Module) -> int:
    """The axis of the input channels: the last for a linear layer, else the second."""
    return -1 if isinstance(layer, nn.Linear) else 1


def _weighted_layers(module: nn.Module, traced: bool) -> list[str]:
    if traced:
        assert isinstance(module, fx.GraphModule)
        names = [
            str(node.target)
            for node in module.graph.nodes
            if node.op == "call_module" and isinstance(module.get_submodule(node.target), WEIGHTED_LAYERS)
        ]
        names = list(dict.fromkeys(names))
    else:
        # The projections inside nn.MultiheadAttention are read by a fused kernel, never called: leave them alone.
        inside_attention = {
            id(child)
            for attention in module.modules()
            if isinstance(attention, nn.MultiheadAttention)
            for child in attention.modules()
        }
        names = [
            name
            for name, child in module.named_modules()
            if isinstance(child, WEIGHTED_LAYERS) and id(child) not in inside_attention
        ]
    if not names:
        raise UsageError("The model has no convolution and no linear layer; there is nothing to quantize.")
    return names


def _tensor_input(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(source, fx.Node)
    return source


def _is_average_pool(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _AVERAGE_POOLS)
    if node.target in (torch.mean, "mean"):
        return _mean_axes(node) in ({2, 3}, {-2, -1})
    return node.op == "call_function" and node.target in _AVERAGE_POOL_FUNCTIONS


def _mean_axes(node: fx.Node) -> set[object]:
    """Over which axes a mean is taken; over height and width it is a global average pool."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return set(axes) if isinstance(axes, list | tuple) else {axes}


def _gate_multiplications(pool: fx.Node) -> list[fx.Node]:
    """What multiplies the pool's input by what follows the pool: the end of a squeeze-and-excitation gate.

    It reads the tensor quantized as the pool does, so that the layer before them writes INT8.
    """
    users = _tensor_input(pool).users
    products = [user for user in users if user.op != "call_module" and user.target in _MULTIPLICATIONS]
    return [product for product in products if pool in _ancestors(product)]


def _is_max_pool(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _MAX_POOLS)
    return node.op == "call_function" and node.target in _MAX_POOL_FUNCTIONS


def _is_permutation(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _PERMUTATIONS


def _is_moving(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.Flatten)
    return _is_permutation(node) or (node.op in ("call_function", "call_method") and node.target in _RESHAPES)


def _cut_from(module: fx.GraphModule, tensor: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The tensor that slices and zero padding alone have made this one from, and who reads it; itself and None else.

    They commute with its quantizer: the shortcut of a CIFAR ResNet is such a tensor.
    """
    reader = None
    while len(tensor.users) == 1 and (_is_slice(tensor) or _is_zero_padding(module, tensor)):
        tensor, reader = _tensor_input(tensor), tensor
    return tensor, reader


def _is_slice(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(isinstance(part, slice) or part is Ellipsis for part in index)


def _is_zero_padding(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        padding = module.get_submodule(str(node.target))
        return isinstance(padding, nn.ConstantPad2d) and not padding.value
    if node.op != "call_function" or node.target not in (F.pad, torch.constant_pad_nd):
        return False
    names = ("input", "pad", "mode", "value") if node.target is F.pad else ("input", "pad", "value")
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return arguments.get("mode", "constant") == "constant" and not arguments.get("value")


def _is_concat(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (torch.cat, torch.concat)


def _operands(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]


def _is_weighted(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), WEIGHTED_LAYERS)


def _is_convolution(module: fx.GraphModule, node: fx.Node) -> bool:
    return _is_weighted(module, node) and not isinstance(module.get_submodule(str(node.target)), nn.Linear)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two different activations."""
    is_add = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target == "add"
    )
    operands = _operands(node) if is_add else []
    return len(set(operands)) == 2 and not any(operand.op == "get_attr" for operand in operands)


def residual_adds(module: fx.GraphModule, quantized: Collection[str]) -> list[fx.Node]:
    """Returns the additions of two activations that share an ancestor and that can be had in INT8.

    At least one operand ends in a convolution: an engine computes such an addition in the convolution's last step. Or a
    convolution among the `quantized` layers reads the identity, as in ConvNeXt: it is quantized already. One between
    linear layers, as transformers have, stays in float: its identity carries the sum of all blocks, which INT8 serves
    badly.
    """
    adds = []
    for node in module.graph.nodes:
        if not _is_sum(node):
            continue
        operands = _operands(node)
        reach = [_ancestors(operand) | {operand} for operand in operands]
        shared = reach[0] & reach[1]
        branches = [operand for operand, nodes in zip(operands, reach, strict=True) if nodes - shared]
        if shared and (
            any(_ends_in_convolution(module, branch) for branch in branches)
            or any(
                _is_convolution(module, reader) and reader.target in quantized
                for reader in identity_operand(module, node).users
            )
        ):
            adds.append(node)
    return adds


def _ends_in_convolution(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the last weighted layer before the tensor is a convolution, with operations of one tensor between."""
    while not _is_weighted(module, node):
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if len(sources) != 1:
            return False
        node = sources[0]
    return _is_convolution(module, node)


def dense_blocks(module: fx.GraphModule) -> list[list[fx.Node]]:
    """Returns the concats that read each other's operands, block by block, the one that reads all of them last.

    In a DenseNet the output of every layer goes into the concats of all layers behind it.
    """
    blocks: list[list[fx.Node]] = []
    for node in module.graph.nodes:
        operands = set(node.all_input_nodes) if _is_concat(node) else set()
        last = next((block for block in blocks if set(block[-1].all_input_nodes) < operands), None)
        if last is not None:
            last.append(node)
        elif operands:
            blocks.append([node])
    return [block for block in blocks if len(block) > 1]


def identity_operand(module: fx.GraphModule, add: fx.Node) -> fx.Node:
    """Returns the operand of a residual add that is quantized: the identity, or the downsample branch.

    An operand from which the other is computed is the identity. Where both are branches, the one with fewer
    weighted layers since they parted is the downsample branch; on a tie the one that is not a bare weighted layer.
    """
    left, right = _operands(add)
    left_reach, right_reach = _ancestors(left), _ancestors(right)
    if left in right_reach:
        return left
    if right in left_reach:
        return right
    shared = left_reach & right_reach

    def weighted(operand: fx.Node, reach: set[fx.Node]) -> int:
        return sum(_is_weighted(module, node) for node in (reach | {operand}) - shared)

    left_weighted, right_weighted = weighted(left, left_reach), weighted(right, right_reach)
    if left_weighted != right_weighted:
        return left if left_weighted < right_weighted else right
    return left if not _is_weighted(module, left) else right


def is_never_negative(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the tensor cannot hold a negative value, proved from the operations that make it."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        if isinstance(child, _NON_NEGATIVE_MODULES):
            return True
        keeps_sign = isinstance(child, (*_AVERAGE_POOLS, *_MAX_POOLS, nn.Flatten))
    elif node.op == "call_function":
        if node.target in _NON_NEGATIVE_FUNCTIONS:
            return True
        keeps_sign = node.target in _SIGN_KEEPING_FUNCTIONS
    elif node.op == "call_method":
        if node.target in _NON_NEGATIVE_METHODS:
            return True
        keeps_sign = node.target in _SIGN_KEEPING_METHODS
    else:
        return False
    if not keeps_sign:
        return False
    # With them `alpha`, by which torch multiplies the second operand of an addition.
    numbers = [argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, int | float)]
    is_arithmetic = node.target in (*_ADDS, *_MULTIPLICATIONS, "add")
    if is_arithmetic and any(number < 0 for number in numbers):
        return False
    return all(is_never_negative(module, source) for source in node.all_input_nodes)


@dataclass
class _Group:
    """One quantizer under construction."""

    tensors: list[fx.Node]
    observed: fx.Node
    readers: list[str] = field(default_factory=list)


class _Requests:
    """Collects who wants to read which tensor quantized, one quantizer per tensor."""

    def __init__(self, module: fx.GraphModule, commuting_pools: bool) -> None:
        self._module = module
        self._commuting_pools = commuting_pools
        self._groups: dict[fx.Node, _Group] = {}

    def ask(self, tensor: fx.Node, reader: fx.Node) -> None:
        """Notes that `reader` is to read `tensor` quantized."""
        group = self._groups.get(tensor)
        if group is None:
            group = _Group(tensors=[tensor], observed=tensor)
            self._groups[tensor] = group
        if reader.name not in group.readers:
            group.readers.append(reader.name)

    def has(self, tensor: fx.Node) -> bool:
        """Whether somebody reads `tensor` quantized."""
        return tensor in self._groups

    def may_take_moved(self, permutation: fx.Node) -> bool:
        """Whether a permutation may be the only reader of its input, and read it quantized.

        What is moved must not be quantized once more, nor be an operand of an addition, which has one quantized operand
        at most, nor be the output.
        """
        pending = [permutation]
        while pending:
            moved = pending.pop()
            if moved in self._groups or any(reader.op == "output" or _is_sum(reader) for reader in moved.users):
                return False
            pending += [reader for reader in moved.users if _is_moving(self._module, reader)]
        return len(_tensor_input(permutation).users) == 1

    def ask_for_block(self, concats: list[fx.Node]) -> None:
        """Notes that the operands of a dense block's concats are to be quantized with the scale of their last concat.

        So the layers write INT8, and what is read again and again is a quarter of the size. A block of which a tensor
        has a quantizer already is left alone.
        """
        operands = list(concats[-1].all_input_nodes)
        if any(tensor in self._groups for tensor in (*operands, *concats)):
            return
        group = _Group(tensors=[], observed=concats[-1], readers=[concat.name for concat in concats])
        for operand in operands:
            tensor = operand
            while self._commuting_pools and _is_max_pool(self._module, tensor):
                source = _tensor_input(tensor)
                if source in self._groups or len(source.users) != 1:
                    break
                group.readers.append(tensor.name)
                tensor = source
            group.tensors.append(tensor)
        for tensor in group.tensors:
            self._groups[tensor] = group

    def specs(self) -> Iterable[QuantizerSpec]:
        """Returns the specs in the order of the graph, with quantizers moved before operations that commute."""
        if self._commuting_pools:
            for tensor in list(self._groups):
                self._move_before_commuting(tensor)
        for tensor in list(self._groups):
            self._move_before_concat(tensor)
        order = {node: position for position, node in enumerate(self._module.graph.nodes)}
        unique = {id(group): group for group in self._groups.values()}
        for group in sorted(unique.values(), key=lambda group: order[group.observed]):
            yield QuantizerSpec(
                name=group.observed.name,
                kind="activation",
                observed=group.observed.name,
                axis=None,
                never_negative=all(is_never_negative(self._module, tensor) for tensor in group.tensors),
                readers=tuple(group.readers),
                tensors=tuple(tensor.name for tensor in group.tensors),
            )

    def _move_before_commuting(self, tensor: fx.Node) -> None:
        """max(Q(x)) = Q(max(x)), and so for permutations: the quantizer before it lets the operation run in INT8."""
        behind = tensor
        while self._commutes(behind):
            source = _tensor_input(behind)
            group = self._groups[behind]
            if source in self._groups or len(source.users) != 1 or group.tensors != [behind]:
                return
            if any(reader.name not in group.readers and not self._hands_on(reader) for reader in behind.users):
                return
            del self._groups[behind]
            group.tensors, group.readers = [source], [behind.name]
            self._groups[source] = group
            behind = source

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether a node moves or compares numbers that it hands to a quantizer."""
        return node in self._groups and self._commutes(node)

    def _commutes(self, node: fx.Node) -> bool:
        """Whether a quantizer behind the node may as well stand before it."""
        return _is_max_pool(self._module, node) or _is_permutation(node)

    def _move_before_concat(self, tensor: fx.Node) -> None:
        """The operands of a concat, where nothing else reads them, are quantized with one scale before it."""
        concat = tensor
        group = self._groups.get(tensor)
        if group is None or not _is_concat(concat) or group.tensors != [concat]:
            return
        operands = list(concat.all_input_nodes)
        if any(len(operand.users) != 1 or operand in self._groups for operand in operands):
            return
        del self._groups[concat]
        group.tensors, group.readers = operands, [concat.name]
        for operand in operands:
            self._groups[operand] = group
