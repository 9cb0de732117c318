"""Which network does a checkpoint hold, and what does it look like once BatchNorm is folded?

Builds torchvision classifiers and a user's own `package.module:factory`, reads weights without unpickling
code, and traces the network into a flat `torch.fx` graph without in-place operations, BatchNorm or dropout.
Quantizers are placed elsewhere. The only importer of torchvision.
"""

import hashlib
import importlib.util
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ptq.attention import explicit_attention_
from ptq.errors import CheckpointError, ExportError, UsageError
from ptq.files import file_sha256

try:
    # A build of torch without CUDA beside the index's torchvision fails at import: the operators it registers
    # kernels for do not exist. Their schemas are all it needs.
    _SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
finally:
    import torchvision

_IN_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul}
_STATE_KEYS = ("model_state_dict", "state_dict", "model")


@dataclass(frozen=True, slots=True)
class FoldedModel:
    """A network ready for placement. `traced` is False where `torch.fx` cannot follow it: `module` is then as built."""

    module: nn.Module
    traced: bool
    warning: str


def create_model(name: str, *, num_classes: int, channels: int, seed: int = 0) -> nn.Module:
    """Returns the network `name` with random weights, in `eval()`.

    With 1 channel the first convolution is replaced by a 1-channel one of the same shape.

    Args:
        name: a torchvision classifier, or `package.module:factory`; a factory is called with
            `num_classes` if it takes that argument.
        num_classes: outputs of the last layer, at least 1.
        channels: channels of the input, 1 or 3.
        seed: decides the random weights; torch's own generator is left as it was.

    Raises:
        UsageError: there is no such network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(name, num_classes, channels)


def _built(name: str, num_classes: int, channels: int) -> nn.Module:
    if ":" in name:
        model = _from_factory(name, num_classes)
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            close = [other for other in known if other[:6] == name[:6]] or known
            raise UsageError(
                f"model.name is {name!r}; torchvision has no such classifier. Close to it: {', '.join(close[:12])}. "
                "Give one of torchvision's names or package.module:factory."
            )
        keywords = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **keywords)
    if channels != 3:
        _replace_stem_(model, channels)
    return model.eval()


def _from_factory(name: str, num_classes: int) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"model.name is {name!r}, which cannot be imported: {error}. Expected package.module:factory with the "
            "package on PYTHONPATH."
        ) from error
    try:
        model = factory(num_classes=num_classes)
    except TypeError:
        model = factory()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} returned a {type(model).__name__}; expected a torch.nn.Module.")
    return model


def _replace_stem_(model: nn.Module, channels: int) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels == channels:
                return
            stem = nn.Conv2d(
                channels,
                module.out_channels,
                module.kernel_size,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                bias=module.bias is not None,
            )
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, stem)
            return


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Returns the weights in a checkpoint, in float32 where they are floating.

    Accepts `.safetensors`, and what `torch.save` wrote: a plain state dict, or a dict that has one under
    `model_state_dict`, `state_dict` or `model`. The prefix `module.` of DataParallel is removed. Nothing is
    unpickled but tensors (`weights_only=True`).

    Raises:
        CheckpointError: the file is absent, is no checkpoint, or holds something else than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {path} does not exist. Give the path of a .pth, .pt or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two libraries raise a dozen kinds, all meaning: not a checkpoint
        raise CheckpointError(
            f"Checkpoint {path} ({path.stat().st_size:,} bytes) holds no weights that can be read safely: "
            f"{_first_line(error)} Expected a state dict written by torch.save(model.state_dict(), ...) or a "
            ".safetensors file."
        ) from error
    for key in _STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, torch.Tensor) for v in content.values())
    ):
        found = f"a dict with the keys {list(content)[:5]}" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"Checkpoint {path} holds {found}, not a state dict. Expected tensors by name, plain or under "
            f"{', '.join(_STATE_KEYS)}. Save model.state_dict()."
        )
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:160]
    return line if line.endswith(".") else line + "."


def head_size(state: Mapping[str, torch.Tensor], *, name: str, channels: int) -> int:
    """Returns the number of outputs that a checkpoint gives the network `name`: the rows of its last weight.

    The order of the weights is the network's: a checkpoint may name them in any order.

    Raises:
        CheckpointError: the checkpoint lacks the network's last weight.
    """
    weights = [key for key, value in create_model(name, num_classes=2, channels=channels).state_dict().items()
               if value.ndim in (2, 4)]  # fmt: skip
    if not weights or weights[-1] not in state:
        found = ", ".join(list(state)[:3])
        raise CheckpointError(
            f"The checkpoint has no {weights[-1] if weights else 'weight'}, the last weight of {name}; it has "
            f"{found}, ... ({len(state)} tensors). Give the weights of {name}, or name their network with --model."
        )
    return int(state[weights[-1]].shape[0])


def factory_digest(name: str) -> str:
    """Returns the SHA-256 of the sources of a `package.module:factory`; empty for torchvision's networks.

    All Python files of the factory's top-level package count, or the one file of a top-level module.
    """
    if ":" not in name:
        return ""
    specification = importlib.util.find_spec(name.split(":")[0].split(".")[0])
    if specification is None:
        return ""
    folders = list(specification.submodule_search_locations or [])
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    if specification.origin and Path(specification.origin).is_file() and not folders:
        files = [Path(specification.origin)]
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


def load_weights_(model: nn.Module, state: Mapping[str, torch.Tensor], *, name: str, source: str) -> None:
    """Loads `state` into `model`, strictly.

    Raises:
        CheckpointError: keys or shapes differ; the message names the first of them and the likeliest cause.
    """
    expected = model.state_dict()
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = [key for key in expected if key not in state and key not in optional]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, the model has {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or unexpected or shapes:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} keys ({', '.join(missing[:3])})")
        if unexpected:
            parts.append(f"has {len(unexpected)} unknown keys ({', '.join(unexpected[:3])})")
        if shapes:
            parts.append(f"differs in {len(shapes)} shapes ({'; '.join(shapes[:2])})")
        raise CheckpointError(
            f"Checkpoint {source} does not fit {name}: it {', '.join(parts)}. Expected the weights of {name} with "
            f"this data's classes and channels. Check --model, --channels and the number of class folders."
        )
    incomplete = {**{key: expected[key] for key in optional}, **state}
    model.load_state_dict(incomplete, strict=True)
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"Checkpoint {source} holds NaN or infinity in {len(bad)} tensors ({', '.join(bad[:3])}). Expected finite "
            "weights. The training run that wrote it has probably diverged."
        )


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
            warning=f"{type(model).__name__} cannot be traced by torch.fx ({_first_line(error)}) Only its "
            "convolutions and linear layers are quantized: residual adds and pools stay in float, which costs speed.",
        )
    _make_functional_(graph_module)
    _remove_inference_identities_(graph_module)
    _fold_batchnorm_(graph_module)
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
    return FoldedModel(module=graph_module, traced=True, warning="")


def _traced(model: nn.Module) -> fx.GraphModule:
    """A traced copy whose attention blocks call their projections, where they can."""
    windowed = (torchvision.models.swin_transformer.ShiftedWindowAttention,)
    try:
        return fx.symbolic_trace(explicit_attention_(_detached_copy(model), windowed=windowed))
    except NotImplementedError:  # attention with a mask, or between two sequences
        return fx.symbolic_trace(_detached_copy(model))


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
    """Replaces in-place operations: a tensor that is observed must keep its value."""
    for child in module.modules():
        if getattr(child, "inplace", False):
            child.inplace = False
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_method" and node.target in ("add_", "mul_", "relu_", "clamp_"):
            node.target = node.target.rstrip("_")


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


def _fold_batchnorm_(module: fx.GraphModule) -> None:
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
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()


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
            f"The model cannot read an image of shape {input_shape}: {_first_line(error)} Check crop and channels."
        ) from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (1, num_classes):
        raise ExportError(f"The model returns {shape} for one image; expected (1, {num_classes}), one logit per class.")
