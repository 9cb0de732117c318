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

from ptq.config import DataConfig, ModelConfig, PreprocessingConfig
from ptq.config_file import config_from_mapping
from ptq.errors import UsageError
from ptq.extras import extra
from ptq.graph.source import reads_pixels
from ptq.networks.factory import TIMM, TRANSFORMERS, torchvision

_GEOMETRY = ("resize", "crop")
# Pillow's numbers of filters, as transformers writes them.
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_BESIDE = "preprocessor_config.json"
# What reads whole numbers of 8 bits normalises them itself.
_PIXELS = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}


@dataclass(frozen=True, slots=True)
class OwnPreprocessing:
    """Fields of a `PreprocessingConfig` as a network's own source states them.

    Attributes:
        fields: their values by name; what the source leaves open is not there.
        source: who states them.
        top1_percent: top-1 accuracy that the source states for the weights on ImageNet-1K; None where it states none.
        reads_pixels: whether the network reads pixels from 0 to 255, so that no other mean and std can be right.
    """

    fields: Mapping[str, Any]
    source: str
    top1_percent: float | None = None
    reads_pixels: bool = False


def own_preprocessing(model: ModelConfig) -> OwnPreprocessing | None:
    """Returns how the images of a network were prepared, None where nobody states it.

    Args:
        model: the network; an ONNX file, and what lies beside it, is looked for on this machine.

    Raises:
        CheckpointError: the ONNX file is damaged.
        UsageError: timm is not installed, or a file that states it cannot be read or done here.
    """
    if model.name.startswith(TIMM):
        return _of_timm(model.name.removeprefix(TIMM))
    if model.is_onnx:
        return _of_onnx(Path(model.checkpoint))
    if model.name.startswith(TRANSFORMERS):
        return _of_transformers(Path(model.name.removeprefix(TRANSFORMERS)) / _BESIDE)
    return _of_torchvision(model.name, PurePosixPath(model.checkpoint).name)


def with_own_preprocessing(data: DataConfig, own: OwnPreprocessing | None) -> DataConfig:
    """Returns data whose preprocessing is the network's own wherever nobody set it.

    Who set one of resize and crop has set both: they belong together.

    Raises:
        UsageError: what is stated cannot be done here, or what was set cannot be right.
    """
    if own is None:
        return data
    given = data.preprocessing.model_fields_set
    kept = {*given, *(_GEOMETRY if given.intersection(_GEOMETRY) else ())}
    channels = data.preprocessing.channels
    stated = {name: value[:channels] if name in _PIXELS else value for name, value in own.fields.items()}
    taken = {name: value for name, value in stated.items() if name not in kept}
    if channels != 3 and not own.reads_pixels:
        taken = {name: value for name, value in taken.items() if name not in _PIXELS}
    content = {**data.preprocessing.model_dump(), **taken}
    used = config_from_mapping(PreprocessingConfig, content, source=f"The preprocessing of {own.source}")
    if own.reads_pixels and any(
        abs(found - wanted[0]) > 1e-6 for name, wanted in _PIXELS.items() for found in getattr(used, name)
    ):
        raise UsageError(
            f"{own.source} normalises them itself, and mean is {list(used.mean)}, std {list(used.std)}. Expected mean "
            "0 and std 0.00392157 (1/255), which give it pixels from 0 to 255; leave both out."
        )
    return data.model_copy(update={"preprocessing": used})


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
        fields = {**(stated.fields if stated else {}), **_PIXELS}
        return OwnPreprocessing(fields, f"{path.name}, which reads pixels,", reads_pixels=True)
    return stated


def _of_transformers(path: Path) -> OwnPreprocessing | None:
    """What a preprocessor_config.json of transformers states, None where there is none."""
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        fields = {**_geometry(stated), **_normalization(stated)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} cannot be done as the preprocessing of a classifier: {type(error).__name__} {error}. Expected "
            "size, image_mean and image_std as transformers writes them, for pixels from 0 to 255 in the order RGB. "
            "Set data.preprocessing and remove the file."
        ) from error
    return OwnPreprocessing(fields, str(path))


def _normalization(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and std, raising ValueError for what changes pixels otherwise."""
    if stated.get("do_flip_channel_order"):
        raise ValueError("do_flip_channel_order is true")
    if stated.get("do_rescale") is False or stated.get("rescale_offset"):
        raise ValueError("pixels are not rescaled to 0 to 1")
    if abs(stated.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(f"rescale_factor is {stated['rescale_factor']}")
    if stated.get("do_normalize") is False:
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    std = tuple(stated["image_std"])
    if stated.get("include_top"):  # EfficientNet of transformers divides twice
        return {"mean": tuple(stated["image_mean"]), "std": tuple(value**2 for value in std)}
    return {"mean": tuple(stated["image_mean"]), "std": std}


def _geometry(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Resize, crop and filter; the side of the image is that of the crop, or of the size where nothing is cropped."""
    filters = stated.get("resample", 2)
    if filters not in _FILTERS:
        raise ValueError(f"resample is {filters}, none of {', '.join(f'{n} ({name})' for n, name in _FILTERS.items())}")
    kind = str(stated.get("image_processor_type") or stated.get("feature_extractor_type") or "")
    size = _side(stated["size"])
    cropped = stated.get("crop_size")
    if kind.startswith("Levit"):
        size = int(256 / 224 * size)
    if kind.startswith("ConvNext") and size < 384:
        resize, crop = int(size / (stated.get("crop_pct") or 224 / 256)), size
    elif cropped is not None and stated.get("do_center_crop", True):
        resize, crop = int(size / (stated.get("crop_pct") or 1)), _side(cropped)
    else:
        resize = crop = size
    return {"interpolation": _FILTERS[filters], "resize": resize, "crop": crop}


def _side(size: int | Mapping[str, int]) -> int:
    """The side in pixels, of which transformers writes {"height": h, "width": w}, {"shortest_edge": s}, or s."""
    if isinstance(size, int):
        return size
    if size.get("height") != size.get("width"):
        raise ValueError(f"size is {dict(size)}, and images here are square")
    return int(size["shortest_edge"] if "shortest_edge" in size else size["height"])
