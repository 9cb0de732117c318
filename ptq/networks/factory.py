"""Which network is meant by a name?

Builds the classifiers of torchvision, timm and transformers, and a user's own `package.module:factory`. Weights are
read and quantizers placed elsewhere. The only importer of torchvision.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import nn

from ptq.errors import UsageError
from ptq.extras import extra
from ptq.files import file_sha256
from ptq.wording import first_line

try:
    # A build of torch without CUDA beside the index's torchvision fails at import: the operators it registers
    # kernels for do not exist. Their schemas are all it needs.
    _SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
finally:
    import torchvision


TIMM, TRANSFORMERS = "timm/", "hf/"


def create_model(name: str, *, num_classes: int, channels: int, seed: int = 0) -> nn.Module:
    """Returns the network `name` with random weights, in `eval()`.

    With 1 channel the first convolution is replaced by a 1-channel one of the same shape.

    Args:
        name: a torchvision classifier, `timm/NAME`, `hf/FOLDER` with the config.json of transformers, or
            `package.module:factory`; a factory is called with `num_classes` if it takes that argument.
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
    if name.startswith(TIMM):
        return _from_timm(name, num_classes, channels).eval()
    if name.startswith(TRANSFORMERS):
        return _from_transformers(name, num_classes, channels).eval()
    if ":" in name:
        model = _from_factory(name, num_classes)
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            close = [other for other in known if other[:6] == name[:6]] or known
            raise UsageError(
                f"model.name is {name!r}; torchvision has no such classifier. Close to it: {', '.join(close[:12])}. "
                "Give one of torchvision's names, timm/NAME, hf/FOLDER or package.module:factory."
            )
        keywords = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **keywords)
    if channels != 3:
        _replace_stem_(model, channels)
    return model.eval()


def _from_timm(name: str, num_classes: int, channels: int) -> nn.Module:
    """A network of timm, which fits its own stem to the channels."""
    with extra("timm", needed_by=f"model.name {name!r}"):
        import timm
    wanted = name.removeprefix(TIMM)
    if not timm.is_model(wanted):
        close = timm.list_models(f"{wanted[:6]}*") or timm.list_models()
        raise UsageError(
            f"model.name is {name!r}; timm {timm.__version__} has no such network. Close to it: "
            f"{', '.join(close[:12])}. Give one of timm's names behind timm/."
        )
    model: nn.Module = timm.create_model(wanted, pretrained=False, num_classes=num_classes, in_chans=channels)
    return model


def _from_transformers(name: str, num_classes: int, channels: int) -> nn.Module:
    """A classifier of transformers, built from a local config.json; nothing is fetched, and no code beside it runs."""
    with extra("hf", needed_by=f"model.name {name!r}"):
        import transformers
    folder = Path(name.removeprefix(TRANSFORMERS))
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"model.name is {name!r}, and {folder} holds no config.json. Expected a local folder that "
            "save_pretrained() of transformers wrote, or one downloaded from a hub."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.num_labels = num_classes
        if getattr(config, "num_channels", channels) != channels:
            config.num_channels = channels
        model: nn.Module = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UsageError(
            f"model.name is {name!r}, of which transformers {transformers.__version__} makes no image classifier: "
            f"{first_line(error)}. Expected the config.json of one."
        ) from error
    return model.float()


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


def factory_digest(name: str) -> str:
    """Returns the SHA-256 of the sources of a `package.module:factory`; empty for torchvision's networks.

    All Python files of the factory's top-level package count, or the one file of a top-level module. For a network of
    timm it is timm's version, of one of transformers the version and the config.
    """
    if name.startswith(TIMM):
        with extra("timm", needed_by=f"model.name {name!r}"):
            import timm
        return f"timm {timm.__version__}"
    if name.startswith(TRANSFORMERS):
        with extra("hf", needed_by=f"model.name {name!r}"):
            import transformers
        config = Path(name.removeprefix(TRANSFORMERS)) / "config.json"
        return f"transformers {transformers.__version__} {file_sha256(config) if config.is_file() else ''}"
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
