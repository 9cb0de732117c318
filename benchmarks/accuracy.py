"""How accurate is each method, against the reference library's ranges and NNCF on the same images?

For every draw of calibration images: our four methods in both dialects with corrected biases (and the cpu dialect
without), the reference library's histograms with its methods in the tensorrt dialect, and NNCF's default
quantization. Everything runs on OpenVINO. Entropy and mse of the reference are computed by our functions, which
choose the same bins (see `amax_reference.py`).
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.config import METHODS, Method, QuantizationConfig
from ptq.dialect import observed_names
from ptq.engines import open_activation_readers, open_engine
from ptq.numerics.amax import entropy_bin, mse_bin
from ptq.numerics.metrics import sqnr_db
from ptq.numerics.paired_test import paired_comparison

# The four methods, and the percentile of a network with heavier tails.
OURS: dict[str, tuple[Method, float]] = {
    **{method: (method, 99.99) for method in METHODS},
    "percentile-99.95": ("percentile", 99.95),
}


def reference_tables(subject: Subject, inputs: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns the amax tables of the reference library's calibrators, by method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_quantization.calib import HistogramCalibrator

    names = observed_names(subject.prepared.plan)
    (reader,) = open_activation_readers(subject.prepared.files["observed_onnx"], workers=1)
    calibrators = [HistogramCalibrator(8, None, False, num_bins=2048) for _ in names]
    maxima = np.zeros(len(names))
    for image in inputs:
        for index, tensor in enumerate(reader(image[None])):
            calibrators[index].collect(torch.from_numpy(tensor.copy()))
            maxima[index] = max(maxima[index], float(np.abs(tensor).max()))
    tables: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for name, calibrator, maximum in zip(names, calibrators, maxima, strict=True):
        counts = calibrator._calib_hist.int().numpy().astype(np.int64)[None]
        edges = calibrator._calib_bin_edges.numpy()
        tables["max"][name] = float(maximum)
        tables["percentile"][name] = float(calibrator.compute_amax("percentile", percentile=99.99))
        tables["entropy"][name] = float(edges[entropy_bin(counts, bounds=np.array([127]))[0]])
        bin_index = int(mse_bin(counts, bounds=np.array([127]))[0])
        tables["mse"][name] = float((edges[bin_index] + edges[bin_index + 1]) / 2)
    return tables


def nncf_logits(subject: Subject, calibration: np.ndarray, inputs: np.ndarray) -> np.ndarray | None:
    """Returns the logits of NNCF's default quantization, None where NNCF is not installed."""
    try:
        import nncf
    except ImportError:
        return None
    import openvino

    model = openvino.Core().read_model(subject.prepared.files["fp32_onnx"])
    quantized = nncf.quantize(model, nncf.Dataset([image[None] for image in calibration]), subset_size=len(calibration))
    compiled = openvino.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled([image[None]])[0] for image in inputs])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--splits", nargs="+", default=["test"], help="splits on whose images all are compared")
    parser.add_argument("--without-reference", action="store_true")
    parser.add_argument("--dialects", nargs="+", default=["cpu", "tensorrt"])
    options = parser.parse_args()
    subject = temporary_subject(options)
    plain = temporary_subject(options, QuantizationConfig(equalization=False))
    splits = [subject.images(split, 10**9) for split in options.splits]
    inputs, labels = (np.concatenate(parts) for parts in zip(*splits, strict=True))
    engine = open_engine("openvino", threads=0)

    def logits_of(graph, precision: str) -> np.ndarray:
        batches = (inputs[start : start + 20] for start in range(0, len(inputs), 20))
        found = engine.logits(graph, batches, precision=precision, batch_size=20, float_remainder="fp32")
        return np.concatenate(list(found))

    fp32 = logits_of(subject.prepared.files["fp32_onnx"], "fp32")
    rows: dict[str, list[dict[str, float]]] = {}

    def note(name: str, logits: np.ndarray) -> None:
        comparison = paired_comparison(fp32.argmax(1), logits.argmax(1), labels)
        row = {
            "drop_pp": comparison.drop_pp,
            "interval_low_pp": comparison.drop_interval_pp[0],
            "interval_high_pp": comparison.drop_interval_pp[1],
            "agreement_percent": 100 * float(np.mean(fp32.argmax(1) == logits.argmax(1))),
            "sqnr_db": sqnr_db(fp32, logits),
        }
        rows.setdefault(name, []).append(row)
        print(f"{name:32} drop {row['drop_pp']:6.2f} pp, {row['agreement_percent']:6.2f} %, {row['sqnr_db']:5.2f} dB")

    for seed in range(options.draws):
        histograms = subject.histograms(seed)
        biases = subject.biases()
        for dialect in options.dialects:
            for label, (method, percentile) in OURS.items():
                amax = subject.amax(histograms, dialect, method, percentile)
                note(f"{dialect} {label}", logits_of(subject.graph(amax, dialect, "ours", biases), "int8"))
                if dialect == "cpu" and seed == 0 and label in METHODS:
                    note(f"cpu {method} (biases as they were)", logits_of(subject.graph(amax, "cpu", "plain"), "int8"))
        calibration = calibration_inputs(subject)
        if not options.without_reference:
            for method, amax in reference_tables(plain, calibration).items():
                note(f"reference {method}", logits_of(plain.graph(amax, "tensorrt", "reference"), "int8"))
        if seed == 0:
            found = nncf_logits(subject, calibration, inputs)
            if found is not None:
                note("NNCF default", found)

    fp32_top1 = 100 * float(np.mean(fp32.argmax(1) == labels))
    summary = {name: summarized(values) for name, values in rows.items()}
    write_result(
        options, "accuracy", {"images": len(labels), "fp32_top1_percent": fp32_top1, "methods": summary, "draws": rows}
    )


def calibration_inputs(subject: Subject) -> np.ndarray:
    """Returns the images of the last draw as the network reads them."""
    from ptq.data.images import network_input

    pixels = np.load(subject.directory / "pixels.npy")
    return network_input(pixels, mean=subject.preprocessing.mean, std=subject.preprocessing.std)


def summarized(rows: list[dict[str, float]]) -> dict[str, float]:
    """Returns means over the draws, and the sample standard deviation of the drop."""
    statistic: Callable[[str], np.ndarray] = lambda key: np.array([row[key] for row in rows])  # noqa: E731
    return {
        "draws": len(rows),
        "drop_pp_mean": float(statistic("drop_pp").mean()),
        "drop_pp_worst": float(statistic("drop_pp").max()),
        "drop_pp_std": float(statistic("drop_pp").std(ddof=1)) if len(rows) > 1 else 0.0,
        "agreement_percent_mean": float(statistic("agreement_percent").mean()),
        "sqnr_db_mean": float(statistic("sqnr_db").mean()),
    }


if __name__ == "__main__":
    main()
