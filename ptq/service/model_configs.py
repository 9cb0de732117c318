"""Which models are kept up to date, and how is each of them quantized?

A folder holds one YAML file a model, a whole `PtqConfig`, named as the model is in events: `digits.yaml` for
`checkpoints/digits/epoch7.pth`.
"""

from pathlib import Path
from typing import Any

from ptq.config import PtqConfig
from ptq.config_file import config_from_mapping, load_yaml
from ptq.errors import UsageError


def model_names(folder: Path) -> tuple[str, ...]:
    """Returns the names of the models that have a config in `folder`, in order.

    Raises:
        UsageError: there is no such folder, or no config in it.
    """
    names = tuple(sorted(path.stem for path in folder.glob("*.yaml")))
    if not names:
        raise UsageError(
            f"The folder of model configs {folder} {'holds no .yaml file' if folder.is_dir() else 'does not exist'}. "
            "Expected one file a model; set the parameter models."
        )
    return names


def model_config(folder: Path, model: str, *, checkpoint: str = "") -> PtqConfig:
    """Returns the config of a model, with another checkpoint where one is given.

    Raises:
        UsageError: the model has no config; the message lists those that have. Or the config cannot be used.
    """
    names = model_names(folder)
    if model not in names:
        raise UsageError(
            f"There is no config for the model {model!r} in {folder}; there are configs for {', '.join(names)}. Put "
            f"the checkpoint where one of these is watched, or write {folder / model}.yaml."
        )
    path = folder / f"{model}.yaml"
    content: dict[str, Any] = load_yaml(path)
    if checkpoint:
        content = {**content, "model": {**(content.get("model") or {}), "checkpoint": checkpoint}}
    return config_from_mapping(PtqConfig, content, source=f"Model config {path}")
