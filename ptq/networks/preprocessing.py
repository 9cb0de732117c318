"""How were the images prepared that a network was trained on?

timm states it for each of its networks, torchvision for each file of weights that it offers, and transformers in a file
beside the weights. A wrong mean is the commonest mistake of all, so that what nobody set is taken from there.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ptq.config import ModelConfig, PreprocessingConfig, PtqConfig
from ptq.config_file import config_from_mapping
from ptq.errors import UsageError
from ptq.extras import extra
from ptq.graph.source import reads_pixels
from ptq.networks.factory import TIMM, TRANSFORMERS, torchvision

_GEOMETRY = ("resize", "crop")
# Pillow's numbers of filters, as transformers writes them.
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_BESIDE = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class OwnPreprocessing:
    """Fields of a `PreprocessingConfig` as a network's own source states them.

    Attributes:
        fields: their values by name; what the source leaves open is not there.
        source: who states them.
        top1_percent: top-1 accuracy that the source states for the weights on ImageNet-1K; None where it states none.
    """

    fields: Mapping[str, Any]
    source: str
    top1_percent: float | None = None


def own_preprocessing(model: ModelConfig) -> OwnPreprocessing | None:
    """Returns how the images of a network were prepared, None where nobody states it.

    Raises:
        UsageError: timm is not installed, or a file that states it cannot be read.
    """
    if model.name.startswith(TIMM):
        return _of_timm(model.name.removeprefix(TIMM))
    if model.is_onnx:
        return _of_onnx(Path(model.checkpoint))
    if model.name.startswith(TRANSFORMERS):
        return _of_transformers(Path(model.name.removeprefix(TRANSFORMERS)) / _BESIDE)
    return _of_torchvision(model.name, PurePosixPath(model.checkpoint).name)


def with_own_preprocessing(config: PtqConfig) -> tuple[PtqConfig, OwnPreprocessing | None]:
    """Returns a config whose preprocessing is the network's own wherever nobody set it, and what states that.

    Who set one of resize and crop has set both: they belong together.

    Raises:
        UsageError: as `own_preprocessing`, or what is stated cannot be done here.
    """
    given = config.data.preprocessing.model_fields_set
    own = own_preprocessing(config.model)
    if own is None:
        return config, None
    kept = {*given, *(_GEOMETRY if given.intersection(_GEOMETRY) else ())}
    taken = {name: value for name, value in own.fields.items() if name not in kept}
    if config.data.preprocessing.channels != 3:
        taken = {name: value for name, value in taken.items() if name not in ("mean", "std")}
    if not taken:
        return config, None
    content = {**config.data.preprocessing.model_dump(), **taken}
    preprocessing = config_from_mapping(PreprocessingConfig, content, source=f"The preprocessing of {own.source}")
    data = config.data.model_copy(update={"preprocessing": preprocessing})
    return config.model_copy(update={"data": data}), own


def _of_timm(name: str) -> OwnPreprocessing | None:
    with extra("timm", needed_by=f"model.name '{TIMM}{name}'"):
        from timm.data import resolve_data_config
        from timm.models import get_pretrained_cfg, is_model
    if not is_model(name):
        return None  # `create_model` says which there are
    found = get_pretrained_cfg(name)
    stated = resolve_data_config(pretrained_cfg=found.to_dict() if found else {})
    _, height, width = stated["input_size"]
    fields = {"interpolation": stated["interpolation"], "mean": stated["mean"], "std": stated["std"]}
    if height == width:
        fields |= {"crop": height, "resize": math.floor(height / stated["crop_pct"])}
    return OwnPreprocessing(fields, f"timm for {name}")


def _of_torchvision(name: str, file: str) -> OwnPreprocessing | None:
    """What torchvision states for a file that it offers under this name, such as resnet50-11ad3fa6.pth."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        return None
    for weights in torchvision.models.get_model_weights(name):
        if PurePosixPath(weights.url).name == file:
            stated = weights.transforms()
            fields = {
                "resize": stated.resize_size[0],
                "crop": stated.crop_size[0],
                "interpolation": stated.interpolation.value,
                "mean": tuple(stated.mean),
                "std": tuple(stated.std),
            }
            top1 = weights.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1")
            return OwnPreprocessing(fields, f"torchvision for {weights}", top1)
    return None


def _of_onnx(path: Path) -> OwnPreprocessing | None:
    """What lies beside an ONNX file, or its input says: who takes pixels from 0 to 255 normalises them itself."""
    stated = _of_transformers(path.with_name(_BESIDE))
    if path.is_file() and reads_pixels(path):
        fields = dict(stated.fields) if stated else {}
        return OwnPreprocessing({**fields, "mean": (0.0,) * 3, "std": (1 / 255,) * 3}, f"{path}, which reads pixels")
    return stated


def _of_transformers(path: Path) -> OwnPreprocessing | None:
    """What a preprocessor_config.json of transformers states, None where there is none."""
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = {"interpolation": _FILTERS[stated.get("resample", 2)]}
        if stated.get("do_normalize", True):
            fields |= {"mean": tuple(stated["image_mean"]), "std": tuple(stated["image_std"])}
        else:
            fields |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        size = _side(stated["size"])
        cropped = stated.get("crop_size")
        if cropped is not None and stated.get("do_center_crop", True):
            fields |= {"resize": size, "crop": _side(cropped)}
        else:  # ConvNeXT's crop_pct: the image is resized to more, and cropped
            fields |= {"resize": math.floor(size / (stated.get("crop_pct") or 1)), "crop": size}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read as the preprocessing of a classifier: {type(error).__name__} {error}. Expected "
            "size, image_mean and image_std, as transformers writes them. Set data.preprocessing and remove the file."
        ) from error
    return OwnPreprocessing(fields, str(path))


def _side(size: int | Mapping[str, int]) -> int:
    """The side in pixels, of which transformers writes {"height": h, "width": w}, {"shortest_edge": s}, or s."""
    if isinstance(size, int):
        return size
    return int(size["shortest_edge"] if "shortest_edge" in size else size["height"])
