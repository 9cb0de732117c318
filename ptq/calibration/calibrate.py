"""How does a run get from prepared images to amax tables?

Puts the engine that reads activations, the histograms and the methods together; each of them is written and
tested in its own file.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from ptq.calibration.amax_tables import bounds
from ptq.calibration.early_stopping import Collect, collect_adaptively, describe_lengths, used_draws
from ptq.calibration.gpu_statistics import collect_statistics_on_device
from ptq.calibration.statistics import TrialStatistics, collect_statistics
from ptq.config import StoppingRule
from ptq.data.images import network_input
from ptq.data.sampling import evenly_spaced
from ptq.dialect import observed_names
from ptq.engines import open_activation_readers
from ptq.graph.candidate import read_layers
from ptq.numerics.bias_correction import bias_shift
from ptq.numerics.channel_factors import channel_ranges
from ptq.records.base import Progress
from ptq.records.calibration import CalibrationDraws
from ptq.records.plan import PlacementPlan

# Images whose channel ranges decide the factors of equalization.
RANGE_IMAGES = 64


@dataclass(frozen=True, slots=True)
class ObservedOnDevice:
    """The model of `observed.observed_from_folded`, and the torch device that is to run it."""

    model: nn.Module
    device: str


@dataclass(frozen=True, slots=True)
class CollectedTrials:
    """The statistics of every trial, the draws really used, and a sentence that sums them up."""

    trials: list[TrialStatistics]
    draws: CalibrationDraws
    summary: str


def statistics_from_files(
    *,
    observed_onnx: Path,
    plan: PlacementPlan,
    pixels: Path,
    files: Path,
    draws: Sequence[Sequence[int]],
    mean: Sequence[float],
    std: Sequence[float],
    bins: int,
    threads: int,
    progress: Progress | None = None,
) -> list[TrialStatistics]:
    """Returns the statistics of every trial from a prepared model and prepared images.

    Args:
        observed_onnx: the FP32 graph, batch 1, with the observed tensors as outputs behind the logits.
        plan: its placement plan.
        pixels: npy, uint8 (n, h, w, c).
        files: JSON, a [path, SHA-256] per image.
        draws: per trial the positions of its images.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        bins: bins of each histogram, a power of two.
        threads: workers, each with one thread; 0 for one per core.
        progress: called with (images done, images in all).

    Raises:
        CalibrationError: no image was drawn, or an activation holds NaN or infinity.
    """
    collect = _collector(
        observed_onnx=observed_onnx,
        plan=plan,
        pixels=pixels,
        files=files,
        mean=mean,
        std=std,
        bins=bins,
        threads=threads,
    )
    return collect(draws=draws, progress=progress)


def _collector(
    *,
    observed_onnx: Path,
    plan: PlacementPlan,
    pixels: Path,
    files: Path,
    mean: Sequence[float],
    std: Sequence[float],
    bins: int,
    threads: int,
    on_device: ObservedOnDevice | None = None,
) -> Callable[..., list[TrialStatistics]]:
    """What collects the statistics of given draws: the engine is opened once, for any number of passes."""
    stored = np.load(pixels, mmap_mode="r", allow_pickle=False)
    collect: Callable[..., list[TrialStatistics]] = (
        partial(collect_statistics_on_device, on_device.model, stored, device=on_device.device)
        if on_device
        else partial(collect_statistics, open_activation_readers(observed_onnx, workers=threads), stored)
    )
    return partial(
        collect,
        names=observed_names(plan),
        channel_axes=channel_axes(plan),
        image_names=[path for path, _ in json.loads(files.read_text())],
        mean=mean,
        std=std,
        bins=bins,
    )


def trials_from_files(
    *,
    observed_onnx: Path,
    plan: PlacementPlan,
    pixels: Path,
    labels: Path,
    files: Path,
    draws: CalibrationDraws,
    class_names: Sequence[str],
    stopping: StoppingRule | None,
    mean: Sequence[float],
    std: Sequence[float],
    bins: int,
    threads: int,
    on_device: ObservedOnDevice | None = None,
    progress: Progress | None = None,
) -> CollectedTrials:
    """Returns the statistics of every trial over its whole draw, or over as many images as the stopping rule asks for.

    `labels` is npy, int64 (n,), the class of every prepared image. With a stopping rule, `draws` are in the order in
    which their images are to be used. With `on_device`, torch runs the model there in place of OpenVINO. The other
    arguments and the errors are those of `statistics_from_files`. An
    image that several trials of adaptive length reach at different looks is run once for each look.
    """
    collect = _collector(
        observed_onnx=observed_onnx,
        plan=plan,
        pixels=pixels,
        files=files,
        mean=mean,
        std=std,
        bins=bins,
        threads=threads,
        on_device=on_device,
    )
    if stopping is None:
        trials = collect(draws=draws.indices, progress=progress)
        counts = f"{len(plan.activations)} histograms for {len(trials)} trials from {draws.prepared.images} images"
        return CollectedTrials(trials, draws, f"Collected {counts}")
    found = collect_adaptively(
        _in_one_progress(collect, progress),
        draws.indices,
        names=observed_names(plan),
        methods=stopping.methods,
        bounds=bounds(plan, stopping.dialect),
        tolerance_percent=stopping.tolerance_percent,
    )
    lengths = tuple(trial.length for trial in found)
    used = used_draws(
        draws,
        lengths,
        labels=np.load(labels, allow_pickle=False),
        class_names=class_names,
        tolerance_percent=stopping.tolerance_percent,
    )
    most = len(draws.indices[0])
    summary = describe_lengths(lengths, most=most, tolerance_percent=stopping.tolerance_percent)
    return CollectedTrials([trial.statistics for trial in found], used, summary)


def _in_one_progress(collect: Callable[..., list[TrialStatistics]], progress: Progress | None) -> Collect:
    """The passes of an adaptive collection, whose counts of images go on from one pass to the next."""
    before = 0

    def collect_more(draws: Sequence[Sequence[int]]) -> list[TrialStatistics]:
        nonlocal before
        advance = (lambda done, total: progress(before + done, before + total)) if progress else None
        found = collect(draws=draws, progress=advance)
        before += len({position for draw in draws for position in draw})
        return found

    return collect_more


def ranges_from_files(
    *,
    observed_onnx: Path,
    plan: PlacementPlan,
    pixels: Path,
    images: int,
    mean: Sequence[float],
    std: Sequence[float],
    threads: int,
) -> dict[str, np.ndarray]:
    """Returns max |x| of every channel of the observed tensors, by name, over images evenly spaced in a file.

    Args:
        observed_onnx: as `statistics_from_files` reads it.
        plan: its placement plan.
        pixels: npy, uint8 (n, h, w, c).
        images: how many images to read; all where there are fewer.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        threads: workers, each with one thread; 0 for one per core.

    Channels are those of axis 1, as in the tensors of convolutions and of the linear layer behind them.
    """
    stored = np.load(pixels, mmap_mode="r", allow_pickle=False)
    chosen = evenly_spaced(range(len(stored)), count=images)
    readers = open_activation_readers(observed_onnx, workers=threads)
    names, axes = observed_names(plan), [1] * len(plan.activations)

    def widest(worker: int) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for position in chosen[worker :: len(readers)]:
            image = network_input(stored[position : position + 1], mean=mean, std=std)
            ranges = channel_ranges(readers[worker](image), axes=axes)
            found = [np.maximum(*pair) for pair in zip(found, ranges, strict=True)] if found else ranges
        return found

    with ThreadPoolExecutor(len(readers)) as pool:
        parts = [part for part in pool.map(widest, range(len(readers))) if part]
    return {name: np.max(found, axis=0) for name, found in zip(names, zip(*parts, strict=True), strict=True)}


def channel_axes(plan: PlacementPlan) -> list[int | None]:
    """Returns the channel axis of every observed tensor; None for those that no quantized layer reads."""
    axes = {read.quantizer: read.channel_axis for read in plan.layer_inputs}
    return [axes.get(name) for name in observed_names(plan)]


def means_by_name(trials: Sequence[TrialStatistics], *, plan: PlacementPlan) -> dict[str, np.ndarray]:
    """Returns the channel means of every trial and tensor, named `<trial>.<tensor>`."""
    return {
        f"{index}.{name}": mean
        for index, trial in enumerate(trials)
        for name, mean in zip(observed_names(plan), trial.channel_sums.means(), strict=True)
    }


def corrected_biases(
    template: Path, *, plan: PlacementPlan, means: Mapping[str, np.ndarray], trial: int
) -> dict[str, np.ndarray]:
    """Returns the biases that undo the mean error of rounded weights, float32 by layer name.

    Args:
        template: the Q/DQ template, which has weights, weight scales and biases.
        plan: the placement plan.
        means: channel means as `means_by_name` names them.
        trial: whose means are used.

    A layer without a bias in the graph, or that reads several tensors, is left out.
    """
    axes = {spec.readers[0]: spec.axis or 0 for spec in plan.weights}
    quantizers = {read.layer: read.quantizer for read in plan.layer_inputs}
    corrected = {}
    for layer in read_layers(template, plan=plan):
        if layer.name not in quantizers:
            continue
        mean = means[f"{trial}.{quantizers[layer.name]}"]
        shift = bias_shift(layer.weight, layer.scale, mean, axis=axes[layer.name], groups=layer.groups)
        corrected[layer.name] = (layer.bias + shift).astype(np.float32)
    return corrected
