"""How does a training config become a checkpoint?

Builds the network, loads weights to start from if there are any, trains it on prepared images and saves it. How a
step is made is `training`'s business.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ptq.config import TrainingConfig
from ptq.data.remote_inputs import Inputs, checkpoint_file, is_remote
from ptq.models import create_model, factory_digest, load_weights_, read_state_dict
from ptq.preparation import checkpoint_digest
from ptq.training import save_checkpoint, train_classifier


def train_from_files(
    config: TrainingConfig,
    *,
    class_count: int,
    train: tuple[Path, Path],
    held_out: tuple[Path, Path] | None,
    threads: int,
    output: Path,
    progress: Callable[[int], None],
) -> float | None:
    """Trains, writes the checkpoint to `output` and returns top-1 on the held-out images in percent, None without any.

    Args:
        config: how to train.
        class_count: outputs of the last layer.
        train: npy files of pixels uint8 (n, h, w, c) and labels int64 (n,).
        held_out: the same for the images that are only watched.
        threads: CPU threads; 0 for all cores.
        output: file to write.
        progress: called with the number of finished epochs.
    """
    preprocessing = config.data.preprocessing
    model = create_model(config.model, num_classes=class_count, channels=preprocessing.channels, seed=config.seed)
    if config.checkpoint:
        with checkpoint_file(config.checkpoint) as file:
            load_weights_(model, read_state_dict(file), name=config.model, source=config.checkpoint)
    result = train_classifier(
        model,
        train=_arrays(train),
        val=_arrays(held_out) if held_out else None,
        mean=preprocessing.mean,
        std=preprocessing.std,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        augment=config.augment,
        seed=config.seed,
        threads=threads or os.cpu_count() or 1,
        progress=lambda epoch: progress(epoch.epoch),
    )
    save_checkpoint(model, output)
    return result.val_top1_percent


def _arrays(files: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = files
    return np.load(pixels, mmap_mode="r", allow_pickle=False), np.load(labels, allow_pickle=False)


def training_sources(model: str, checkpoint: str) -> list[str]:
    """Returns the digests of what training reads beside the images: a factory's sources and the initial weights."""
    digest_of = Inputs().checkpoint_digest if is_remote(checkpoint) else lambda path: checkpoint_digest(Path(path))
    return [factory_digest(model), digest_of(checkpoint) if checkpoint else ""]
