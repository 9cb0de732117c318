"""Is amax the same to the last bit whatever the order of the images and the number of workers?

Ours: shuffled draws, batches of several sizes fed one after the other and merged, and parts collected by separate
processes and merged. Beside it the reference library's histogram calibrator on the same images in three orders and in
batches of 1, 8 and 32: how far amax of its percentile, entropy and mse moves. Its entropy and mse are computed from
its own histograms by `ptq.amax.entropy_bin` and `mse_bin`, which choose the bins that the reference chooses (see
`amax_reference.py`) and leave out no histogram however far it grew.
"""

import multiprocessing
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.calibration.calibrate import channel_axes
from ptq.calibration.statistics import Reader, TrialStatistics, collect_statistics, merge_statistics
from ptq.config import METHODS
from ptq.data.images import network_input
from ptq.dialect import observed_names
from ptq.engines import open_activation_readers
from ptq.numerics.amax import entropy_bin, mse_bin
from ptq.records.plan import PlacementPlan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_quantization.calib import HistogramCalibrator

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
REFERENCE_BATCH_SIZES = (1, 8, 32)
REFERENCE_SHUFFLES = 3


def collect(
    readers: Sequence[Reader],
    plan: PlacementPlan,
    pixels: np.ndarray,
    draw: list[int],
    mean: list[float],
    std: list[float],
) -> TrialStatistics:
    """Returns the statistics of one draw."""
    (trial,) = collect_statistics(
        readers, pixels, draws=[draw], names=observed_names(plan), channel_axes=channel_axes(plan),
        image_names=[str(i) for i in range(len(pixels))], mean=mean, std=std, bins=4096,
    )  # fmt: skip
    return trial


def collect_in_process(
    observed: Path, plan: PlacementPlan, pixels: np.ndarray, draw: list[int], mean: list[float], std: list[float]
) -> TrialStatistics:
    """Returns the statistics of one share of the images; runs in a process of its own."""
    return collect(open_activation_readers(observed, workers=1), plan, pixels, draw, mean, std)


def merged(parts: Sequence[TrialStatistics]) -> TrialStatistics:
    """Returns the statistics of the images of all parts."""
    result = parts[0]
    for part in parts[1:]:
        result = merge_statistics(result, part)
    return result


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shuffles", type=int, default=20)
    options = parser.parse_args()
    subject = temporary_subject(options)
    subject.histograms()
    pixels = np.load(subject.directory / "pixels.npy")
    plan, observed = subject.prepared.plan, subject.prepared.files["observed_onnx"]
    common = (list(options.mean), list(options.std))
    count = len(pixels)
    one, two = (open_activation_readers(observed, workers=workers) for workers in (1, 2))

    def tables(trial: TrialStatistics) -> dict[str, list[float]]:
        return {method: list(subject.amax(trial.histograms, "cpu", method).values()) for method in METHODS}

    expected = tables(collect(one, plan, pixels, list(range(count)), *common))
    found: dict[str, object] = {"images": count, "tensors": len(plan.activations)}

    different = 0
    for size in BATCH_SIZES:
        batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        parts = [collect(one, plan, pixels, batch, *common) for batch in batches]
        different += tables(merged(parts)) != expected
    found["batch_sizes_different"] = different

    different = 0
    for seed in range(options.shuffles):
        order = np.random.default_rng(seed).permutation(count)
        different += tables(collect(two, plan, pixels[order], list(range(count)), *common)) != expected
    found["shuffles_different"] = different

    different = 0
    for processes in (1, 2, 4):
        shares = [list(map(int, share)) for share in np.array_split(np.arange(count), processes)]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.starmap(collect_in_process, [(observed, plan, pixels, share, *common) for share in shares])
        different += tables(merged(parts)) != expected
    found["processes_different"] = different

    found["reference_spread_percent"] = reference_spread(subject, pixels)
    print(found)
    write_result(options, "invariance", found)


def reference_spread(subject: Subject, pixels: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Returns by how many percent the reference's amax moves, by what is varied and method."""
    inputs = network_input(pixels, mean=subject.preprocessing.mean, std=subject.preprocessing.std)
    (reader,) = open_activation_readers(subject.prepared.files["observed_onnx"], workers=1)
    tensors = len(subject.prepared.plan.activations)
    orders = [np.random.default_rng(seed).permutation(len(inputs)) for seed in range(REFERENCE_SHUFFLES)]
    shuffled = [reference_amax(reader, inputs[order], tensors=tensors, batch_size=1) for order in orders]
    batched = [
        reference_amax(reader, inputs[orders[0]], tensors=tensors, batch_size=size)
        for size in REFERENCE_BATCH_SIZES
        if size != 1
    ]
    return {
        f"{REFERENCE_SHUFFLES} shuffles, batch size 1": spreads_percent(shuffled),
        f"batch sizes {', '.join(map(str, REFERENCE_BATCH_SIZES))}, one order": spreads_percent(
            [shuffled[0], *batched]
        ),
    }


def reference_amax(reader: Reader, inputs: np.ndarray, *, tensors: int, batch_size: int) -> dict[str, np.ndarray]:
    """Returns the amax of every tensor by the reference's percentile, entropy and mse, int8, (tensors,) each."""
    calibrators = [HistogramCalibrator(8, None, False, num_bins=2048) for _ in range(tensors)]
    for start in range(0, len(inputs), batch_size):
        # The graph takes one image; the calibrators see the tensors of a batch at once, as they would in PyTorch.
        images = [
            [torch.from_numpy(tensor.copy()) for tensor in reader(image[None])]
            for image in inputs[start : start + batch_size]
        ]
        for index, calibrator in enumerate(calibrators):
            calibrator.collect(torch.cat([image[index] for image in images]))
    bounds = np.array([127])
    rows = []
    for calibrator in calibrators:
        counts = calibrator._calib_hist.int().numpy().astype(np.int64)[None]
        edges = calibrator._calib_bin_edges.numpy()
        bin_index = int(mse_bin(counts, bounds=bounds)[0])
        rows.append(
            (
                float(calibrator.compute_amax("percentile", percentile=99.99)),
                float(edges[entropy_bin(counts, bounds=bounds)[0]]),
                float(edges[bin_index] + edges[bin_index + 1]) / 2,
            )
        )
    return dict(zip(("percentile", "entropy", "mse"), np.array(rows).T, strict=True))


def spreads_percent(tables: Sequence[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Returns, by method, the relative difference of a tensor's amax between tables: largest and median tensor."""
    result = {}
    for method in tables[0]:
        stack = np.stack([table[method] for table in tables])
        differences = 100 * (stack.max(0) / stack.min(0) - 1)
        result[method] = {"largest": float(differences.max()), "median": float(np.median(differences))}
    return result


if __name__ == "__main__":
    main()
