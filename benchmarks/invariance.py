"""Is amax the same to the last bit whatever the order of the images and the number of workers?

Ours: shuffled draws, batches of several sizes fed one after the other and merged, and parts collected by separate
processes and merged. Beside it the reference library's histogram calibrator on the same images in the same orders.
"""

import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks.subject import arguments, temporary_subject, write_result
from ptq.calibration import channel_axes
from ptq.collection import TrialStatistics, collect_statistics, merge_statistics
from ptq.config import METHODS
from ptq.engines import open_activation_readers
from ptq.observation import observed_names
from ptq.records import PlacementPlan


def collect(
    observed: Path,
    plan: PlacementPlan,
    pixels: np.ndarray,
    draw: list[int],
    mean: list[float],
    std: list[float],
    workers: int,
) -> TrialStatistics:
    """Returns the statistics of one draw."""
    (trial,) = collect_statistics(
        open_activation_readers(observed, workers=workers), pixels, draws=[draw], names=observed_names(plan),
        channel_axes=channel_axes(plan), image_names=[str(i) for i in range(len(pixels))], mean=mean, std=std,
        bins=4096,
    )  # fmt: skip
    return trial


def spread_percent(tables: list[np.ndarray]) -> float:
    """Returns the largest relative difference of one tensor's amax between tables, in percent."""
    stack = np.stack(tables)
    return float(100 * (stack.max(0) / stack.min(0) - 1).max())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shuffles", type=int, default=20)
    options = parser.parse_args()
    subject = temporary_subject(options)
    subject.histograms()
    pixels = np.load(subject.directory / "pixels.npy")
    plan, observed = subject.prepared.plan, subject.prepared.files["observed_onnx"]
    common = (list(options.mean), list(options.std))
    count = len(pixels)

    def tables(trial: TrialStatistics) -> dict[str, list[float]]:
        return {method: list(subject.amax(trial.histograms, "cpu", method).values()) for method in METHODS}

    reference = tables(collect(observed, plan, pixels, list(range(count)), *common, 1))
    found: dict[str, object] = {"images": count, "tensors": len(plan.activations)}

    different = 0
    for size in (1, 2, 4, 8, 16, 32, 64):
        merged = None
        for start in range(0, count, size):
            part = collect(observed, plan, pixels, list(range(start, min(start + size, count))), *common, 1)
            merged = part if merged is None else merge_statistics(merged, part)
        different += tables(merged) != reference
    found["batch_sizes_different"] = different

    different = 0
    for seed in range(options.shuffles):
        order = np.random.default_rng(seed).permutation(count)
        different += tables(collect(observed, plan, pixels[order], list(range(count)), *common, 2)) != reference
    found["shuffles_different"] = different

    different = 0
    for processes in (1, 2, 4):
        shares = [list(map(int, share)) for share in np.array_split(np.arange(count), processes)]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.starmap(collect, [(observed, plan, pixels, share, *common, 1) for share in shares])
        merged = parts[0]
        for part in parts[1:]:
            merged = merge_statistics(merged, part)
        different += tables(merged) != reference
    found["processes_different"] = different

    found["reference_spread_percent"] = reference_spread(subject, options, pixels)
    print(found)
    write_result(options, "invariance", found)


def reference_spread(subject, options, pixels: np.ndarray) -> dict[str, float]:
    """Returns how far the reference's percentile amax moves over five shuffles, in percent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_quantization.calib import HistogramCalibrator

    inputs = (
        (pixels / np.float32(255)).transpose(0, 3, 1, 2) - np.array(options.mean, np.float32)[:, None, None]
    ) / np.array(options.std, np.float32)[:, None, None]
    (reader,) = open_activation_readers(subject.prepared.files["observed_onnx"], workers=1)
    tables = []
    for seed in range(5):
        calibrators = [HistogramCalibrator(8, None, False, num_bins=2048) for _ in subject.prepared.plan.activations]
        for position in np.random.default_rng(seed).permutation(len(inputs)):
            image = np.ascontiguousarray(inputs[position : position + 1], dtype=np.float32)
            for calibrator, tensor in zip(calibrators, reader(image), strict=True):
                calibrator.collect(torch.from_numpy(tensor.copy()))
        tables.append(np.array([float(c.compute_amax("percentile", percentile=99.99)) for c in calibrators]))
    return {"percentile": spread_percent(tables)}


if __name__ == "__main__":
    main()
