"""Do our methods choose the reference library's bins, and how much sooner?

Collects pytorch-quantization's own histograms of every activation on real images, then gives both libraries the
same histograms: entropy by the reference's function, mse by its formula on the CPU (its function calls .cuda()), and
all four methods by ours. Times are of one run on one machine.
"""

import time
import warnings

import numpy as np
import torch

from benchmarks.subject import arguments, temporary_subject, write_result
from ptq.dialect import observed_names
from ptq.engines import open_activation_readers
from ptq.numerics.amax import entropy_bin, mse_bin, percentile_bins

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_quantization.calib import HistogramCalibrator
    from pytorch_quantization.calib.histogram import _compute_amax_entropy
    from pytorch_quantization.tensor_quant import fake_tensor_quant


def reference_mse_bin(counts: np.ndarray, edges: np.ndarray) -> int:
    """The loop of `_compute_amax_mse`, on the CPU in float64."""
    weights = torch.from_numpy(counts).double()
    centres = torch.from_numpy((edges[1:] + edges[:-1]) / 2).double()
    errors = [
        float(((fake_tensor_quant(centres, centres[i], 8, False) - centres) ** 2 * weights).mean())
        for i in range(128, len(centres))
    ]
    return 128 + int(np.argmin(errors))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--most-bins", type=int, default=8192, help="histograms that grew beyond this are left out")
    options = parser.parse_args()
    subject = temporary_subject(options)
    inputs, _ = subject.images("train", options.calibration_images)
    (reader,) = open_activation_readers(subject.prepared.files["observed_onnx"], workers=1)
    names = observed_names(subject.prepared.plan)
    calibrators = [HistogramCalibrator(8, None, False, num_bins=2048) for _ in names]
    for image in inputs:
        for calibrator, tensor in zip(calibrators, reader(image[None]), strict=True):
            calibrator.collect(torch.from_numpy(tensor.copy()))
    histograms = [
        (calibrator._calib_hist.int().numpy().astype(np.int64), calibrator._calib_bin_edges.numpy())
        for calibrator in calibrators
    ]
    kept = [i for i, (counts, _) in enumerate(histograms) if len(counts) <= options.most_bins]
    bounds = np.array([127])
    for function in (entropy_bin, mse_bin):
        function(histograms[kept[0]][0][None], bounds=bounds)  # compile before the clock starts

    started = time.perf_counter()
    ours = []
    for index in kept:
        counts = histograms[index][0][None]
        ours.append(
            (
                int(entropy_bin(counts, bounds=bounds)[0]), int(mse_bin(counts, bounds=bounds)[0]),
                int(percentile_bins(counts, percentiles=[99.99])[0, 0]), float(histograms[index][1][-1]),
            )
        )  # fmt: skip
    ours_s = time.perf_counter() - started

    started = time.perf_counter()
    entropy = [
        float(_compute_amax_entropy(counts.copy(), edges, 8, False))
        for counts, edges in map(histograms.__getitem__, kept)
    ]
    reference_entropy_s = time.perf_counter() - started
    mse = [reference_mse_bin(*histograms[index]) for index in kept]

    same_entropy = sum(
        np.float32(histograms[i][1][own[0]]) == np.float32(ref) for i, own, ref in zip(kept, ours, entropy, strict=True)
    )
    same_mse = sum(own[1] == ref for own, ref in zip(ours, mse, strict=True))
    found = {
        "tensors": len(kept),
        "left_out": [names[i] for i in range(len(names)) if i not in kept],
        "bins": {"least": min(len(histograms[i][0]) for i in kept), "most": max(len(histograms[i][0]) for i in kept)},
        "same_bin_entropy": int(same_entropy),
        "same_bin_mse": int(same_mse),
        "four_methods_s": ours_s,
        "reference_entropy_s": reference_entropy_s,
        "ratio": reference_entropy_s / ours_s,
    }
    print(found)
    write_result(options, "amax_reference", found)


if __name__ == "__main__":
    main()
