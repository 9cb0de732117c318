"""How does a run get from prepared images to amax tables?

Puts the engine that reads activations, the histograms and the methods together; each of them is written and
tested in its own file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ptq.amax import amax_from_histograms
from ptq.bias_correction import bias_shift
from ptq.collection import Progress, TrialStatistics, collect_statistics
from ptq.config import Dialect, Method
from ptq.engines import open_activation_readers
from ptq.fake_quant import amax_bound
from ptq.histogram import Histograms
from ptq.observation import observed_names
from ptq.onnx_graph import read_layers
from ptq.records import PlacementPlan


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
    readers = open_activation_readers(observed_onnx, workers=threads)
    return collect_statistics(
        readers,
        np.load(pixels, mmap_mode="r", allow_pickle=False),
        draws=draws,
        names=observed_names(plan),
        channel_axes=channel_axes(plan),
        image_names=[path for path, _ in json.loads(files.read_text())],
        mean=mean,
        std=std,
        bins=bins,
        progress=progress,
    )


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


def amax_table(
    histograms: Histograms, *, plan: PlacementPlan, dialect: Dialect, method: Method, percentile: float
) -> dict[str, float]:
    """Returns the amax of every activation quantizer by one method, by name, in activation units.

    The `mse` and `entropy` methods count the integers a quantizer has, so a table belongs to a dialect.

    Raises:
        CalibrationError: a quantizer has seen no value, or only zeros.
    """
    names = observed_names(plan)
    bounds = np.array([amax_bound(spec, dialect) for spec in plan.activations], dtype=np.int64)
    values = amax_from_histograms(histograms, method=method, percentile=percentile, bounds=bounds, names=names)
    return {name: float(value) for name, value in zip(names, values, strict=True)}
