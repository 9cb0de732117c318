"""What does calibration cost over the forward pass alone, and is it slower than a whole `nncf.quantize`?

Every part runs once in each round, so that a change of the machine's speed meets all of them; a ratio is the median of
the rounds' ratios. The parts, and what is inside their clocks:

plain_1x2, plain_2x1: the FP32 graph on OpenVINO, batch 1, one request with all threads or one request of one thread
per core that takes the next image; normalizing the image is inside, building the graph is not.
statistics: `collect_statistics`, histograms and channel means for one trial, from the same pixels, one request of one
thread per core; building the graph is not inside.
torch_1, torch_32: the BatchNorm-folded FP32 model in PyTorch, all threads, batch 1 and 32, from normalized images.
torch_observed_32: the same with the observed tensors as outputs.
reference_32: the same with pytorch-quantization's HistogramCalibrator (2048 bins) collecting each observed tensor.
ours_whole: from the file of the FP32 graph and decoded pixels to four amax tables: building the graph, normalizing,
statistics with channel means, all four methods.
nncf_whole: from the file of the FP32 graph and the same pixels to NNCF's quantized model, default settings, as many
images: reading the file, normalizing, `nncf.quantize`, which chooses one range per tensor and corrects biases.

Preparing the model and decoding image files are outside all clocks; numba's kernels are compiled before. Parts in
PyTorch run on fewer images (`--torch-images`). Where NNCF is not installed its part is left out.
"""

import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino
import torch

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.calibration.calibrate import channel_axes
from ptq.calibration.statistics import TrialStatistics, collect_statistics
from ptq.config import METHODS
from ptq.data.images import network_input
from ptq.dialect import observed_names
from ptq.engines import open_activation_readers
from ptq.networks.network import NetworkKind, network_from_weights
from ptq.networks.observed import observed_from_folded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_quantization.calib import HistogramCalibrator

try:
    import nncf
except ImportError:
    nncf = None

BATCH_SIZE = 32
RATIOS = {
    "statistics over the faster plain pass": ("statistics", ("plain_1x2", "plain_2x1")),
    "statistics over the plain pass with the same streams": ("statistics", ("plain_2x1",)),
    "reference over its own plain pass": ("reference_32", ("torch_32",)),
    "reference over the plain pass that returns its tensors": ("reference_32", ("torch_observed_32",)),
    "whole over nncf.quantize": ("ours_whole", ("nncf_whole",)),
}


def plain_pass(graph: Path, pixels: np.ndarray, *, streams: int, threads: int, subject: Subject) -> Callable[[], None]:
    """Returns a function that runs the FP32 graph on every image."""
    core = openvino.Core()
    model = core.read_model(graph)
    model.reshape({0: [1, *subject.shape]})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
    compiled = core.compile_model(model, "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(streams)]
    mean, std = subject.preprocessing.mean, subject.preprocessing.std

    def run() -> None:
        pending, lock = iter(range(len(pixels))), threading.Lock()

        def work(request: openvino.InferRequest) -> None:
            while True:
                with lock:
                    position = next(pending, None)
                if position is None:
                    return
                image = network_input(pixels[position : position + 1], mean=mean, std=std)
                request.set_input_tensor(0, openvino.Tensor(image, shared_memory=True))
                request.infer()

        with ThreadPoolExecutor(streams) as pool:
            list(pool.map(work, requests))

    return run


def torch_pass(model: torch.nn.Module, inputs: torch.Tensor, *, batch_size: int, tensors: int) -> Callable[[], None]:
    """Returns a function that runs a PyTorch model on every image; its last outputs go to fresh calibrators."""

    def run() -> None:
        calibrators = [HistogramCalibrator(8, None, False, num_bins=2048) for _ in range(tensors)]
        with torch.inference_mode():
            for batch in inputs.split(batch_size):
                outputs = model(batch)
                for calibrator, tensor in zip(calibrators, outputs[1:] if calibrators else (), strict=True):
                    calibrator.collect(tensor)

    return run


def parts_of(subject: Subject, pixels: np.ndarray, *, threads: int, torch_images: int) -> dict[str, tuple[int, object]]:
    """Returns the parts by name: the number of images and the function that runs them."""
    plan, files = subject.prepared.plan, subject.prepared.files
    mean, std = subject.preprocessing.mean, subject.preprocessing.std
    readers = open_activation_readers(files["observed_onnx"], workers=threads)

    def statistics(opened) -> TrialStatistics:
        (trial,) = collect_statistics(
            opened, pixels, draws=[range(len(pixels))], names=observed_names(plan), channel_axes=channel_axes(plan),
            image_names=[str(index) for index in range(len(pixels))], mean=mean, std=std, bins=4096,
        )  # fmt: skip
        return trial

    def ours_whole() -> None:
        trial = statistics(open_activation_readers(files["observed_onnx"], workers=threads))
        for method in METHODS:
            subject.amax(trial.histograms, "cpu", method)

    def nncf_whole() -> None:
        model = openvino.Core().read_model(files["fp32_onnx"])
        dataset = nncf.Dataset(
            range(len(pixels)), lambda index: network_input(pixels[index : index + 1], mean=mean, std=std)
        )
        nncf.quantize(model, dataset, subset_size=len(pixels))

    kind = NetworkKind(subject.options.model, subject.prepared.num_classes, subject.shape)
    folded = network_from_weights(files["weights"], kind).folded.module.eval()
    observed = observed_from_folded(folded, plan)
    inputs = torch.from_numpy(network_input(pixels[:torch_images], mean=mean, std=std))
    every, some = len(pixels), len(inputs)
    parts: dict[str, tuple[int, object]] = {
        "plain_1x2": (every, plain_pass(files["fp32_onnx"], pixels, streams=1, threads=threads, subject=subject)),
        "plain_2x1": (every, plain_pass(files["fp32_onnx"], pixels, streams=threads, threads=threads, subject=subject)),
        "statistics": (every, lambda: statistics(readers)),
        "ours_whole": (every, ours_whole),
        "torch_1": (some, torch_pass(folded, inputs, batch_size=1, tensors=0)),
        "torch_32": (some, torch_pass(folded, inputs, batch_size=BATCH_SIZE, tensors=0)),
        "torch_observed_32": (some, torch_pass(observed, inputs, batch_size=BATCH_SIZE, tensors=0)),
        "reference_32": (some, torch_pass(observed, inputs, batch_size=BATCH_SIZE, tensors=len(plan.activations))),
    }
    if nncf is not None:
        nncf.set_log_level("ERROR")
        parts["nncf_whole"] = (every, nncf_whole)
    return parts


def ratios_of(seconds: dict[str, list[float]], images: dict[str, int]) -> dict[str, dict[str, object]]:
    """Returns the median of the rounds' ratios of times per image, and the ratios."""
    found = {}
    for label, (part, others) in RATIOS.items():
        if part not in seconds or any(other not in seconds for other in others):
            continue
        rounds = [
            own / images[part] / min(seconds[other][index] / images[other] for other in others)
            for index, own in enumerate(seconds[part])
        ]
        found[label] = {"median": float(np.median(rounds)), "rounds": rounds}
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-images", type=int, default=64)
    parser.set_defaults(calibration_images=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject = temporary_subject(options)
    # Compiles every kernel and writes the pixels of the draw.
    histograms = subject.histograms()
    for method in METHODS:
        subject.amax(histograms, "cpu", method)
    pixels = np.load(subject.directory / "pixels.npy", mmap_mode="r")
    parts = parts_of(subject, pixels, threads=options.threads, torch_images=options.torch_images)
    for name in ("plain_1x2", "plain_2x1", "statistics"):
        parts[name][1]()
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.rounds):
        for name, (_, run) in parts.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    images = {name: count for name, (count, _) in parts.items()}
    found = {
        "tensors": len(subject.prepared.plan.activations),
        "values_per_image": int(histograms.totals.sum()) // len(pixels),
        "nncf": nncf.__version__ if nncf is not None else None,
        "ratios": ratios_of(seconds, images),
        "parts": {
            name: {
                "images": images[name],
                "median_ms_per_image": 1e3 * float(np.median(times)) / images[name],
                "median_s": float(np.median(times)),
                "rounds_s": times,
            }
            for name, times in seconds.items()
        },
    }
    for name, part in found["parts"].items():
        print(f"{name:20} {part['median_ms_per_image']:8.2f} ms an image, {part['median_s']:7.2f} s")
    for label, ratio in found["ratios"].items():
        print(f"{label}: {ratio['median']:.3f}")
    write_result(options, "calibration_speed", found)


if __name__ == "__main__":
    main()
