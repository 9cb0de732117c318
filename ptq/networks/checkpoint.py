"""Which weights does a checkpoint hold, and do they fit the network?"""

import argparse
import json
import pathlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ptq.errors import CheckpointError
from ptq.files import files_sha256
from ptq.networks.factory import create_model, factory_digest
from ptq.wording import first_line, first_names

# Where trainers keep the weights, the first that is there; an average of them only where nothing else is.
_STATE_KEYS = (
    "model_state_dict",
    "state_dict",
    "model_state",
    "model",
    "network",
    "net",
    "weights",
    "params",
    "module",
)
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# What transformers looks for in a folder, in its order.
_IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# What wrappers put before every name.
_WRAPPERS = ("module.", "_orig_mod.")
# What profilers leave in a network, and BatchNorm counts for its training.
_COUNTERS = ("total_ops", "total_params", "num_batches_tracked")
# What torchvision called layers before, and calls them now.
_RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(\.mlp)\.linear_2\."), r"\1.3."),
)
# Beside tensors, what training scripts keep: options, and numbers of numpy. None of them runs anything.
_PLAIN = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    np.ndarray,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type)),
]


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a checkpoint by their names, and what a person should know of how they were taken."""

    state: dict[str, torch.Tensor]
    notes: tuple[str, ...] = ()


def read_weights(path: Path) -> Weights:
    """Returns the weights in a checkpoint, in float32 where they are floating.

    Accepts `.safetensors`, in one file or, by the index beside them, in several; what `torch.save` wrote: a plain state
    dict, or a dict that has one under one of the names that trainers use; and a folder of transformers. The prefixes
    `module.` of DataParallel and `_orig_mod.` of torch.compile are removed.
    Nothing is unpickled but tensors, options and numbers (`weights_only=True`).

    Raises:
        CheckpointError: the file is absent, is no checkpoint, or holds something else than tensors.
    """
    path, *shards = _files_of(path)
    try:
        if path.suffix in (".safetensors", ".json"):
            parts = [safetensors.torch.load_file(each) for each in shards or [path]]
            content: object = {key: value for part in parts for key, value in part.items()}
        else:
            with torch.serialization.safe_globals(_PLAIN):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two libraries raise a dozen kinds, all meaning: not a checkpoint
        raise CheckpointError(
            f"Checkpoint {path} ({path.stat().st_size:,} bytes) holds no weights that can be read safely: "
            f"{first_line(error)}. Expected a state dict written by torch.save(model.state_dict(), ...) or a "
            ".safetensors file."
        ) from error
    notes = []
    while isinstance(content, Mapping):
        held = [key for key in (*_STATE_KEYS, *_AVERAGES) if isinstance(content.get(key), Mapping)]
        if not held:
            break
        averages = [key for key in held if key in _AVERAGES]
        if averages:
            other = "The weights themselves are not there" if averages[0] == held[0] else f"{averages[0]} was not used"
            notes.append(
                f"The checkpoint keeps an average of the weights (EMA) under {averages[0]}: {held[0]} was taken. "
                f"{other}; to choose, save the state dict alone."
            )
        content = content[held[0]]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, torch.Tensor) for v in content.values())
    ):
        found = f"a dict with the keys {list(content)[:5]}" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"Checkpoint {path} holds {found}, not a state dict. Expected tensors by name, plain or under "
            f"{', '.join((*_STATE_KEYS, *_AVERAGES))}. Save model.state_dict()."
        )
    state = {_unwrapped(str(key)): value.detach() for key, value in content.items()}
    return Weights(
        {key: value.float() if value.is_floating_point() else value for key, value in state.items()}, tuple(notes)
    )


def _files_of(path: Path) -> list[Path]:
    """The file of a checkpoint: of a folder the one that transformers reads, and behind an index what it names."""
    if path.is_dir():
        path = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), path / _IN_FOLDERS[0])
    if not path.is_file():
        raise CheckpointError(
            f"Checkpoint {path} does not exist. Give the path of a .pth, .pt or .safetensors file, of a "
            ".safetensors.index.json, or of a folder of transformers."
        )
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
            raise ValueError(f"it names {first_names(names)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"Checkpoint {path} is no index of safetensors files: {type(error).__name__} {error}. Expected a "
            "weight_map of tensors to .safetensors files beside it."
        ) from error
    shards = [path.with_name(name) for name in names]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise CheckpointError(
            f"Checkpoint {path} names {len(shards)} files, of which {len(absent)} are absent ({first_names(absent)}). "
            "Put them beside it."
        )
    return [path, *shards]


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = next(name.removeprefix(wrapper) for wrapper in _WRAPPERS if name.startswith(wrapper))
    return name


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Returns the weights in a checkpoint; see `read_weights`."""
    return read_weights(path).state


def weights_for(path: Path, *, name: str, channels: int) -> Weights:
    """Returns the weights of a checkpoint under the names that a network gives them.

    Where they stand below another module, as Lightning's `model.`, what that module has beside is left out, and so are
    counters of profilers. Names that torchvision gave layers in older releases become today's.

    Raises:
        CheckpointError: the file cannot be read; whether the weights fit is asked by `load_weights_`.
        UsageError: there is no such network.
    """
    found = read_weights(path)
    expected = create_model(name, num_classes=2, channels=channels).state_dict()
    state, notes = found.state, list(found.notes)
    weights = [key for key in expected if not key.endswith(_COUNTERS)]
    if weights and weights[0] not in state:
        prefixes = [key.removesuffix(weights[0]) for key in state if key.endswith(f".{weights[0]}")]
        fitting = [each for each in prefixes if all(f"{each}{key}" in state for key in weights)]
        if fitting:
            prefix = min(fitting, key=len)
            others = [key for key in state if not key.startswith(prefix)]
            if others:
                notes.append(
                    f"Of the checkpoint the weights under {prefix} were taken; {len(others)} others "
                    f"({first_names(others)}) belong to no layer of {name}."
                )
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    for pattern, now in _RENAMED:
        state = {key if key in expected else pattern.sub(now, key): value for key, value in state.items()}
    kept = {key: value for key, value in state.items() if key in expected or not key.endswith(_COUNTERS)}
    return Weights(kept, tuple(notes))


def head_size(state: Mapping[str, torch.Tensor], *, name: str, channels: int) -> int:
    """Returns the number of outputs that a checkpoint gives the network `name`: the rows of its last weight.

    The order of the weights is the network's: a checkpoint may name them in any order.

    Raises:
        CheckpointError: the checkpoint lacks the network's last weight.
    """
    weights = [
        key
        for key, value in create_model(name, num_classes=2, channels=channels).state_dict().items()
        if value.ndim in (2, 4)
    ]
    if not weights or weights[-1] not in state:
        found = ", ".join(list(state)[:3])
        raise CheckpointError(
            f"The checkpoint has no {weights[-1] if weights else 'weight'}, the last weight of {name}; it has "
            f"{found}, ... ({len(state)} tensors). Give the weights of {name}, or name their network with --model."
        )
    return int(state[weights[-1]].shape[0])


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
    put_weights_(model, {**{key: expected[key] for key in optional}, **state})
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"Checkpoint {source} holds NaN or infinity in {len(bad)} tensors ({', '.join(bad[:3])}). Expected finite "
            "weights. The training run that wrote it has probably diverged."
        )


def put_weights_(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Loads weights that fit, as those of the model's own version, which some modules ask for."""
    complete = OrderedDict(state)
    complete._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    model.load_state_dict(complete, strict=True)


def checkpoint_digest(checkpoint: Path) -> str:
    """Returns the SHA-256 of a checkpoint; of several files, that of their digests.

    Raises:
        CheckpointError: there is no such file.
    """
    return files_sha256(_files_of(checkpoint))


def model_sources(name: str, checkpoint: Path) -> list[str]:
    """Returns the digests of a checkpoint and of a factory's sources; CheckpointError if the checkpoint is absent."""
    return [checkpoint_digest(checkpoint), factory_digest(name)]
