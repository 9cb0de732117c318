"""What does a network look like once BatchNorm is folded and nothing happens in place?"""

import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ptq.errors import ExportError
from ptq.networks.attention import explicit_attention_
from ptq.networks.constants import fold_constant_layers_
from ptq.networks.factory import torchvision
from ptq.networks.padding import pad_before_
from ptq.wording import first_line

_IN_PLACE: dict[object, Callable[..., object]] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
}
# Methods and functions that change a tensor, as torch names them.
_IN_PLACE_NAME = re.compile(r"[a-z]\w*[a-z0-9]_")


@dataclass(frozen=True, slots=True)
class FoldedModel:
    """A network ready for placement. `traced` is False where `torch.fx` cannot follow it: `module` is then as built.

    `constant_layers` are gone, since they compute the same for every image; `norms` tells into which layer each
    BatchNorm was folded.
    """

    module: nn.Module
    traced: bool
    warning: str
    constant_layers: tuple[str, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)


def fold_model(model: nn.Module, *, input_shape: tuple[int, int, int] | None = None) -> FoldedModel:
    """Returns a copy of `model` as a flat graph: BatchNorm folded, dropout gone, nothing in place.

    The input model is not changed. A model that cannot be traced, or that computes something else once it was
    (a tensor changed in place that another layer still reads), is returned as it is, with a warning.

    Args:
        model: the network, in `eval()`.
        input_shape: (c, h, w) of a random image on which the two are compared; None leaves that out.
    """
    try:
        graph_module = _traced(model)
    except Exception as error:  # tracing runs the user's own forward, which may raise anything
        return FoldedModel(
            module=_detached_copy(model),
            traced=False,
            warning=f"{type(model).__name__} cannot be traced by torch.fx ({first_line(error)}.) Only its "
            "convolutions and linear layers are quantized: residual adds and pools stay in float, which costs speed.",
        )
    _make_functional_(graph_module)
    pad_before_(graph_module)
    constant_layers = fold_constant_layers_(graph_module)
    _remove_inference_identities_(graph_module)
    norms = _fold_batchnorm_(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.eval()
    if input_shape is not None and not _is_same_function(model, graph_module, input_shape):
        return FoldedModel(
            module=_detached_copy(model),
            traced=False,
            warning=f"{type(model).__name__} computes something else once its in-place operations are "
            "replaced. Only its convolutions and linear layers are quantized: residual adds and pools stay in float.",
        )
    return FoldedModel(module=graph_module, traced=True, warning="", constant_layers=constant_layers, norms=norms)


def _traced(model: nn.Module) -> fx.GraphModule:
    """A traced copy whose attention blocks call their projections, where they can."""
    windowed = (torchvision.models.swin_transformer.ShiftedWindowAttention,)
    try:
        return _traced_by_position(explicit_attention_(_detached_copy(model), windowed=windowed))
    except NotImplementedError:  # attention with a mask, or between two sequences
        return _traced_by_position(_detached_copy(model))


def _traced_by_position(model: nn.Module) -> fx.GraphModule:
    """Returns a traced network in which modules that are called by keyword are called by position.

    Raises:
        Exception: whatever the network's own forward raises when it is traced.
    """
    module = fx.symbolic_trace(model)
    for node in module.graph.nodes:
        if node.op == "call_module" and node.kwargs:
            signature = inspect.signature(module.get_submodule(str(node.target)).forward)
            bound = signature.bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
    return module


def _is_same_function(model: nn.Module, folded: nn.Module, input_shape: tuple[int, int, int]) -> bool:
    """Whether both give the same logits for a random image, up to float rounding; true where neither can run."""
    image = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        with torch.inference_mode():
            expected, found = _detached_copy(model)(image), folded(image)
    except Exception:  # `check_runs` says what is wrong
        return True
    return bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())))


def _detached_copy(model: nn.Module) -> nn.Module:
    # Via the state dict: a deep copy fails on modules that keep non-leaf tensors.
    import copy

    duplicate = copy.deepcopy(model).eval()
    for parameter in duplicate.parameters():
        parameter.requires_grad_(False)
    return duplicate


def _make_functional_(module: fx.GraphModule) -> None:
    """Replaces operations that change a tensor in place, whose later readers read the result instead.

    A quantizer or an observer copies a tensor, so that a change of the one is no change of the other. What changes a
    part of a tensor, or one that shares its memory with another, is found by `_is_same_function`.
    """
    in_place = {name for name, child in module.named_modules() if getattr(child, "inplace", False)}
    for name in in_place:
        module.get_submodule(name).inplace = False
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        if (node.op == "call_module" and node.target in in_place) or _made_functional_(node):
            changed = node.args[0] if node.args else node.kwargs.get("input")
            if isinstance(changed, fx.Node):
                for reader in [each for each in changed.users if order[each] > order[node]]:
                    reader.replace_input_with(changed, node)


def _made_functional_(node: fx.Node) -> bool:
    """Replaces a call that changes its first argument by one that does not; tells whether it was such a call."""
    if node.op == "call_method" and isinstance(node.target, str) and _IN_PLACE_NAME.fullmatch(node.target):
        node.target = node.target[:-1]
        return True
    if node.op != "call_function":
        return False
    if node.target in _IN_PLACE:
        node.target = _IN_PLACE[node.target]
        return True
    name = getattr(node.target, "__name__", "")
    if _IN_PLACE_NAME.fullmatch(name):
        homes = (torch.nn.functional, torch)
        node.target = next((getattr(home, name[:-1]) for home in homes if hasattr(home, name[:-1])), node.target)
        return True
    try:
        parameters = list(inspect.signature(node.target).parameters)
    except (TypeError, ValueError):  # a builtin tells no signature, and none of them has such an argument
        return False
    place = parameters.index("inplace") if "inplace" in parameters else len(node.args)
    if place < len(node.args) and node.args[place]:
        node.args = (*node.args[:place], False, *node.args[place + 1 :])
        return True
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    return False


def _remove_inference_identities_(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        if _is_identity(module, node) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()


def _is_identity(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return isinstance(child, nn.Identity | nn.Dropout | nn.Dropout2d | nn.AlphaDropout)
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return name == "stochastic_depth" or (name == "dropout" and not node.kwargs.get("training", False))
    return False


_FUSERS: dict[type, Callable[[nn.Module, nn.Module], nn.Module]] = {
    nn.Conv2d: fuse_conv_bn_eval,
    nn.Linear: fuse_linear_bn_eval,
}


def _fold_batchnorm_(module: fx.GraphModule) -> dict[str, str]:
    """Makes each BatchNorm part of the layer before it; returns the layer of each, by their names."""
    folded: dict[str, str] = {}
    calls = Counter(node.target for node in module.graph.nodes if node.op == "call_module")
    for node in list(module.graph.nodes):
        if node.op != "call_module" or not isinstance(
            module.get_submodule(node.target), nn.BatchNorm1d | nn.BatchNorm2d
        ):
            continue
        source = node.args[0]
        if source.op != "call_module" or len(source.users) != 1:
            continue
        if calls[node.target] > 1 or calls[source.target] > 1:
            continue  # a module that is called twice would be folded twice
        layer = module.get_submodule(source.target)
        fuse = _FUSERS.get(type(layer))
        if fuse is None:
            continue
        parent, _, leaf = source.target.rpartition(".")
        setattr(module.get_submodule(parent), leaf, fuse(layer, module.get_submodule(node.target)))
        folded[node.target] = source.target
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    return folded


def require_statistics(model: nn.Module) -> None:
    """Refuses BatchNorm without running statistics, which normalises each image by those that it is given with.

    Raises:
        ExportError: the network has one.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ExportError(
                f"The BatchNorm {name} keeps no running statistics, so that what the model says of an image depends on "
                "the others of its batch. Expected track_running_stats=True; train so, or use GroupNorm."
            )


def check_runs(module: nn.Module, *, input_shape: tuple[int, int, int], num_classes: int) -> None:
    """Runs one zero image through `module`.

    Raises:
        ExportError: it fails, or does not return one row of `num_classes` logits.
    """
    try:
        with torch.inference_mode():
            output = module(torch.zeros(1, *input_shape))
    except Exception as error:
        raise ExportError(
            f"The model cannot read an image of shape {input_shape}: {first_line(error)}. Check crop and channels."
        ) from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (1, num_classes):
        raise ExportError(f"The model returns {shape} for one image; expected (1, {num_classes}), one logit per class.")
