"""How is an FP32 classifier trained?

SGD with Nesterov momentum on a one-cycle schedule, from pixels that fit in memory. The same seed gives the
same weights. Nothing here reads an image or chooses a network.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

from ptq.config import TrainingConfig
from ptq.data.images import network_input
from ptq.data.remote_inputs import Inputs, checkpoint_file
from ptq.errors import ManifestError, UsageError
from ptq.networks.checkpoint import checkpoint_digest, load_weights_, weights_for
from ptq.networks.factory import create_model, factory_digest
from ptq.uris import is_remote

LABEL_SMOOTHING = 0.05
MOMENTUM = 0.9
WARMUP_SHARE = 0.3
EVALUATION_BATCH_SIZE = 128

Examples = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One pass over the training images. The loss includes label smoothing; `val_...` is None without a val split."""

    epoch: int
    epochs: int
    train_loss: float
    train_top1_percent: float
    val_loss: float | None
    val_top1_percent: float | None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Every epoch, and the one whose weights the model holds: "best" on val, or "last" without val."""

    epochs: tuple[EpochResult, ...]
    kept: Literal["best", "last"]
    kept_epoch: int

    @property
    def val_top1_percent(self) -> float | None:
        """Top-1 on val of the weights the model holds, None without val."""
        return self.epochs[self.kept_epoch - 1].val_top1_percent


def train_classifier(
    model: torch.nn.Module,
    *,
    train: Examples,
    val: Examples | None,
    mean: Sequence[float],
    std: Sequence[float],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    augment: bool,
    seed: int,
    threads: int,
    progress: Callable[[EpochResult], None],
) -> TrainingResult:
    """Train `model` in place and leave it in eval() with the best weights on val, or the last without val.

    Args:
        model: maps float32 (n, c, h, w) to logits (n, k); its weights are the starting point.
        train: pixels, uint8 (n, h, w, c) with n at least 2, and labels (n,) in [0, k).
        val: the same for the images that choose the epoch, or None.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        epochs: passes over the training images, at least 1.
        batch_size: largest number of images in a step, at least 2.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: applied to weights, not to biases and not to normalisation layers.
        augment: shift each training image by up to an eighth of its side.
        seed: of order, shifts and dropout.
        threads: CPU threads; 0 leaves torch's setting.
        progress: called after each epoch.

    Returns:
        The loss and top-1 of every epoch, and which epoch was kept.

    Raises:
        ManifestError: fewer than 2 training images, or a label outside [0, k).
        UsageError: the loss is no longer finite.
    """
    if len(train[0]) < 2:
        raise ManifestError(
            f"Training has {len(train[0])} images; expected at least 2, because BatchNorm needs two values. "
            "Add images to the training split."
        )
    _check_labels(model, train, mean=mean, std=std)
    optimizer = _optimizer(model, weight_decay=weight_decay)
    order = np.random.Generator(np.random.PCG64(seed))
    results: list[EpochResult] = []
    kept_epoch, kept_weights = epochs, None
    with _torch_state(seed=seed, threads=threads):
        model.to(memory_format=torch.channels_last)
        for epoch in range(1, epochs + 1):
            rates = learning_rates(
                epoch, epochs=epochs, steps=batches_of(len(train[0]), batch_size), peak=learning_rate
            )
            loss, top1 = _train_epoch_(
                model, optimizer, train, rates=rates, mean=mean, std=std, order=order, augment=augment
            )
            if not math.isfinite(loss):
                raise UsageError(
                    f"Training diverged: the loss is {loss} in epoch {epoch} of {epochs} with learning_rate "
                    f"{learning_rate}. Expected a finite loss; lower learning_rate, for example to "
                    f"{learning_rate / 5:g}."
                )
            val_loss, val_top1 = (None, None) if val is None else evaluate_classifier(model, val, mean=mean, std=std)
            results.append(EpochResult(epoch, epochs, loss, top1, val_loss, val_top1))
            if val is not None and epoch == _best_epoch(results):
                kept_epoch, kept_weights = epoch, {key: value.clone() for key, value in model.state_dict().items()}
            progress(results[-1])
        if kept_weights is not None:
            model.load_state_dict(kept_weights)
        # Written weights are contiguous, whatever layout trained fastest.
        model.to(memory_format=torch.contiguous_format)
        model.eval()
    return TrainingResult(tuple(results), "last" if val is None else "best", kept_epoch)


def evaluate_classifier(
    model: torch.nn.Module, examples: Examples, *, mean: Sequence[float], std: Sequence[float]
) -> tuple[float, float]:
    """Put `model` in eval() and return its mean cross-entropy (nats) and top-1 (percent) on `examples`."""
    model.eval()
    pixels, labels = examples
    loss_sum, correct = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(pixels), EVALUATION_BATCH_SIZE):
            chosen = slice(start, start + EVALUATION_BATCH_SIZE)
            logits = model(_tensor(pixels[chosen], mean=mean, std=std))
            targets = torch.tensor(labels[chosen])
            loss_sum += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            correct += int((logits.argmax(dim=1) == targets).sum())
    return loss_sum / len(pixels), 100.0 * correct / len(pixels)


def batches_of(images: int, batch_size: int) -> int:
    """Return into how many batches of nearly equal size `images` are dealt, none of them of one image.

    >>> batches_of(100, 50), batches_of(101, 50), batches_of(3, 2)
    (2, 3, 1)
    """
    return min(math.ceil(images / batch_size), images // 2)


def learning_rates(epoch: int, *, epochs: int, steps: int, peak: float) -> list[float]:
    """Return the learning rate of each step of an epoch, counted from 1.

    The rate rises linearly over the first 30 % of all steps and falls on a half cosine to 0 after the last
    (Smith and Topin, Super-Convergence, 2018, with the cosine that is usual since).

    >>> [round(rate, 3) for epoch in (1, 2) for rate in learning_rates(epoch, epochs=2, steps=5, peak=1.0)]
    [0.333, 0.667, 1.0, 0.95, 0.812, 0.611, 0.389, 0.188, 0.05, 0.0]
    """
    total = epochs * steps
    warmup = WARMUP_SHARE * total
    rates = []
    for step in range((epoch - 1) * steps + 1, epoch * steps + 1):
        if step <= warmup:
            rates.append(peak * step / warmup)
        else:
            rates.append(peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup))))
    return rates


def shift_images(pixels: np.ndarray, *, order: np.random.Generator) -> np.ndarray:
    """Return each image moved by a random whole number of pixels, up to an eighth of its side either way.

    Args:
        pixels: uint8 (n, h, w, c).
        order: source of the shifts, one draw for rows and one for columns per image.

    Returns:
        uint8 (n, h, w, c). What moves in from outside repeats the border.
    """
    images, height, width, _ = pixels.shape
    down = order.integers(-(height // 8), height // 8, size=(images, 1), endpoint=True)
    right = order.integers(-(width // 8), width // 8, size=(images, 1), endpoint=True)
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pixels[np.arange(images)[:, None, None], rows[:, :, None], columns[:, None, :]]


def save_checkpoint(model: torch.nn.Module, path: Path) -> None:
    """Write the state dict of `model` to `path`, whole or not at all.

    A name that ends in .safetensors chooses that format; any other is a file for `torch.load(weights_only=True)`.
    Equal weights give equal bytes. Missing folders are made.
    """
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if path.suffix == ".safetensors":
                file.write(safetensors_bytes(weights))
            else:
                # Through the open file: given a path, torch writes the temporary name into the archive.
                torch.save(weights, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _train_epoch_(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Examples,
    *,
    rates: list[float],
    mean: Sequence[float],
    std: Sequence[float],
    order: np.random.Generator,
    augment: bool,
) -> tuple[float, float]:
    """One pass in random order, a step per rate; returns the mean loss and the top-1 in percent."""
    model.train()
    pixels, labels = train
    loss_sum, correct = 0.0, 0
    for rate, chosen in zip(rates, np.array_split(order.permutation(len(pixels)), len(rates)), strict=True):
        batch = shift_images(pixels[chosen], order=order) if augment else pixels[chosen]
        targets = torch.tensor(labels[chosen])
        logits = model(_tensor(batch, mean=mean, std=std))
        loss = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        loss_sum += loss.item() * len(chosen)
        correct += int((logits.argmax(dim=1) == targets).sum())
    return loss_sum / len(pixels), 100.0 * correct / len(pixels)


def _optimizer(model: torch.nn.Module, *, weight_decay: float) -> torch.optim.Optimizer:
    """SGD that decays weights of layers only: parameters of one dimension are biases and normalisation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # Fused: one pass over the weights instead of five, a tenth of a ResNet-50 step at 32 pixels.
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=True)


def _check_labels(model: torch.nn.Module, train: Examples, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse labels the last layer has no output for."""
    model.eval()
    with torch.inference_mode():
        classes = int(model(_tensor(train[0][:1], mean=mean, std=std)).shape[1])
    lowest, highest = int(train[1].min()), int(train[1].max())
    if lowest < 0 or highest >= classes:
        raise ManifestError(
            f"Training labels run from {lowest} to {highest}; the model has {classes} outputs, "
            f"so labels must be from 0 to {classes - 1}. Correct the labels, or build the model for {highest + 1} "
            "classes."
        )


def _best_epoch(results: list[EpochResult]) -> int:
    """Highest top-1 on val; among equals the last, because the learning rate falls to the end."""
    return max(results, key=lambda result: (result.val_top1_percent or 0.0, result.epoch)).epoch


def _tensor(pixels: np.ndarray, *, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    return torch.from_numpy(network_input(pixels, mean=mean, std=std)).to(memory_format=torch.channels_last)


@contextmanager
def _torch_state(*, seed: int, threads: int) -> Iterator[None]:
    """Seed torch and set its threads, and give both back as they were."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


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
            read = weights_for(file, name=config.model, channels=preprocessing.channels)
            load_weights_(model, read.state, name=config.model, source=config.checkpoint)
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
