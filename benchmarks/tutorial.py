"""How long does the whole comparison of 4 methods x 5 draws take, beside the tutorial's procedure run 20 times?

Ours is the `ptq quantize` command in a process of its own, on an empty store: from its start, imports and Prefect
included, to the end of the stage that selects among the evaluated candidates. What the command does afterwards (graph
checks, engines, benchmark, report) is no part of the comparison; its time is given beside it. Equal amax tables are
evaluated once: `distinct_candidates` says how many there were.

The tutorial's procedure is one run for each method and draw: `quant_modules.initialize()`, build the model, load the
weights, collect statistics over the draw in eval() mode with the calibrators set to "histogram" (max: "max"),
`compute_amax` by the library's function, evaluate the fake-quantized PyTorch model (loss, top-1, confusion matrix),
export it with Q/DQ at batch 1 and 32. Its faults are not repeated. Each run starts an interpreter and imports the
libraries, as ours does once. `twenty_runs` counts all of it, `to_evaluation` leaves the export out of the tutorial
and not out of ours.

What is measured and what is derived: the tutorial is measured for max, percentile and entropy on the first draw and
multiplied by 5. `mse` of the reference needs CUDA, so its run is the percentile run with 0 s for `compute_amax`; the
ratio of 15 runs, without mse, stands beside it, against all 20 candidates of ours. The reference's entropy is
quadratic in the bins, which grow without bound: histograms above `--most-bins` count 0 s and get the same amax from
`ptq.amax.entropy_bin` (see `amax_reference.py`). Each of these favours the tutorial. What the spared histograms would
have cost, by the measured time per squared bin, is in one further ratio and in no other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.subject import arguments, write_result
from ptq.config import METHODS, PreprocessingConfig
from ptq.data import decoding, sampling
from ptq.data import index as index_module
from ptq.data.images import network_input
from ptq.networks.checkpoint import head_size, load_weights_, read_state_dict
from ptq.networks.factory import create_model
from ptq.networks.fake_quant import exportable_fake_quant
from ptq.numerics.amax import entropy_bin
from ptq.numerics.metrics import split_metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from absl import logging as absl_logging
    from pytorch_quantization import calib, quant_modules
    from pytorch_quantization import nn as quant_nn
    from pytorch_quantization.tensor_quant import QuantDescriptor

absl_logging.set_verbosity(absl_logging.ERROR)

MEASURED_METHODS = ("max", "percentile", "entropy")
PERCENTILE = 99.99  # what `calibration` asks for unless told otherwise
EVALUATION_STAGES = ("decode_test", "evaluate")
OUR_EVALUATION_STAGES = ("prepare_split", "evaluate_baseline", "evaluate", "select_candidate")
LAST_STAGE = "select_candidate"
# `ptq.models` is torchvision with the schemas that a CPU build of torch lacks.
IMPORTS = "import torch, ptq.models; from pytorch_quantization import quant_modules"


class Stopwatch:
    """Seconds by stage, in the order in which the stages were first entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time the block takes to a stage."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass of the tutorial")
    parser.add_argument("--selection-split", default="test", help="evaluated as well where it is not the test split")
    parser.add_argument("--most-bins", type=int, default=8192, help="larger histograms cost the reference 0 s")
    options = parser.parse_args()
    tutorial = measure_tutorial(options)
    with tempfile.TemporaryDirectory(prefix="ptq-tutorial-") as directory:
        ours = measure_ours(options, Path(directory))
    found = {"ratio": ratios(ours, tutorial, trials=options.trials), "ours": ours, "tutorial": tutorial}
    print(json.dumps(found, indent=1))
    write_result(options, "tutorial", found)


def ratios(ours: dict, tutorial: dict, *, trials: int) -> dict[str, float]:
    """Returns the tutorial's wall time over ours: whole, without mse, and both sides without evaluation."""
    runs = tutorial["runs"]

    def all_runs_s(*, without: Sequence[str] = (), mse: bool = True) -> float:
        seconds = {
            method: {stage: value for stage, value in run["seconds"].items() if stage not in without}
            for method, run in runs.items()
        }
        total = sum(sum(stages.values()) for stages in seconds.values())
        if mse:
            total += sum(seconds["percentile"].values()) - seconds["percentile"]["compute_amax"]
        return trials * total

    tutorial["twenty_runs_s"] = all_runs_s()
    tutorial["twenty_runs_to_evaluation_s"] = all_runs_s(without=["export"])
    tutorial["fifteen_runs_s"] = all_runs_s(mse=False)
    tutorial["twenty_runs_without_evaluation_s"] = all_runs_s(without=EVALUATION_STAGES)
    spared_s = trials * runs["entropy"]["spared_likely_s"]
    return {
        "twenty_runs": tutorial["twenty_runs_s"] / ours["comparison_s"],
        "to_evaluation": tutorial["twenty_runs_to_evaluation_s"] / ours["comparison_s"],
        "with_spared_entropy": (tutorial["twenty_runs_s"] + spared_s) / ours["comparison_s"],
        "fifteen_runs_without_mse": tutorial["fifteen_runs_s"] / ours["comparison_s"],
        "over_whole_command": tutorial["twenty_runs_s"] / ours["command_s"],
        "without_evaluation": tutorial["twenty_runs_without_evaluation_s"] / ours["without_evaluation_s"],
    }


def preprocessing_of(options: argparse.Namespace) -> PreprocessingConfig:
    """Returns how a file becomes the network's input."""
    return PreprocessingConfig(
        channels=options.channels, resize=options.resize, crop=options.crop, mean=tuple(options.mean),
        std=tuple(options.std),
    )  # fmt: skip


def measure_ours(options: argparse.Namespace, directory: Path) -> dict:
    """Returns wall times of `ptq quantize` with an empty store in `directory`, and what it found."""
    config = {
        "model": {"name": options.model, "checkpoint": str(options.checkpoint)},
        "data": {
            "path": str(options.data),
            "selection_split": options.selection_split,
            "preprocessing": preprocessing_of(options).model_dump(mode="json"),
        },
        "calibration": {
            "methods": list(METHODS), "trials": options.trials, "images": options.calibration_images,
            "percentiles": [PERCENTILE],
        },
        "engine": {"name": "openvino"},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.5, "rounds": 1},
        "output": {"store": str(directory / "store"), "directory": str(directory / "output")},
    }  # fmt: skip
    (directory / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "flows.cli", "quantize", "--config", str(directory / "config.yaml")]
    ends, lines = {}, []
    started = time.perf_counter()
    # The command writes a line for every finished stage as it ends; the last one of a name counts.
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            lines.append(line)
            ends[line.split()[0] if line.split() else ""] = time.perf_counter() - started
        process.wait()
    command_s = time.perf_counter() - started
    # 3: rejected by the gate, which judges the model and not this comparison.
    if process.returncode not in (0, 3) or LAST_STAGE not in ends:
        raise SystemExit(f"ptq quantize ended with exit code {process.returncode}:\n{''.join(lines[-20:])}")
    verdict = json.loads((directory / "output" / "verdict.json").read_text())
    stages = verdict["stage_seconds"]
    evaluation_s = sum(stages.get(stage, 0.0) for stage in OUR_EVALUATION_STAGES)
    return {
        "comparison_s": ends[LAST_STAGE],
        "without_evaluation_s": ends[LAST_STAGE] - evaluation_s,
        "command_s": command_s,
        "stages_s": stages,
        "candidates": len(verdict["candidates"]),
        "distinct_candidates": sum(not row["same_as"] for row in verdict["candidates"]),
        "fp32_top1_percent": verdict["fp32"]["top1_percent"],
        "first_draw_top1_percent": {
            row["method"]: row["top1_percent"] for row in verdict["candidates"] if row["trial"] == 0
        },
    }


def measure_tutorial(options: argparse.Namespace) -> dict:
    """Returns the stage times of one run of the tutorial's procedure for each measured method, on the first draw."""
    index = index_module.index_images(
        options.data, calibration_split="train", selection_split=options.selection_split, test_split="test"
    )
    rows = index_module.rows_of_split_table(index.table, "train")
    labels = np.array([row.label for row in rows])
    draw = [rows[i] for i in sampling.draw_calibration_indices(labels, images=options.calibration_images, seed=0)]
    splits = dict.fromkeys((options.selection_split, "test"))
    evaluated = {split: index_module.rows_of_split_table(index.table, split) for split in splits}
    classes = len(index.class_names) if index.has_named_classes else None
    runs = {
        method: run_tutorial(options, method, draw, evaluated, classes, root=str(index.root))
        for method in MEASURED_METHODS
    }
    return {"batch_size": options.batch_size, "calibration_images": len(draw), "runs": runs}


def run_tutorial(
    options: argparse.Namespace,
    method: str,
    draw: Sequence[index_module.ImageRow],
    evaluated: dict[str, Sequence[index_module.ImageRow]],
    classes: int | None,
    *,
    root: str,
) -> dict:
    """Returns what one run of the tutorial's procedure took and found."""
    watch = Stopwatch()
    with watch.stage("start_and_import"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], check=True, capture_output=True)
    with watch.stage("build_and_load"):
        model = quantized_model(options, method, classes)
    quantizers = [module for module in model.modules() if isinstance(module, quant_nn.TensorQuantizer)]
    with watch.stage("decode_calibration"):
        images = decoded(options, draw, root=root)
    with watch.stage("collect_stats"):
        collect_stats_(model, quantizers, images, batch_size=options.batch_size)
    spared = compute_amax_(quantizers, method, watch, most_bins=options.most_bins)
    found, logits = {}, {}
    for split, rows in evaluated.items():
        with watch.stage("decode_test"):
            images = decoded(options, rows, root=root)
        with watch.stage("evaluate"):
            logits[split] = forward(model, images, batch_size=options.batch_size)
            labels = np.array([row.label for row in rows])
            metrics = split_metrics(logits[split], labels, split=split, reference_logits=None)
        found[split] = {"images": metrics.images, "top1_percent": metrics.top1_percent, "loss": metrics.loss}
    with watch.stage("export"):
        export(model, (options.channels, options.crop, options.crop))
    print(f"tutorial, {method}: {sum(watch.seconds.values()):.1f} s, {found}", file=sys.stderr)
    return {"seconds": watch.seconds, "quantizers": len(quantizers), **spared, "found": found}


def quantized_model(options: argparse.Namespace, method: str, classes: int | None) -> torch.nn.Module:
    """Returns the loaded model in eval() mode, its modules replaced by the reference library's as it was built."""
    described = QuantDescriptor(num_bits=8, calib_method="max" if method == "max" else "histogram")
    layers = (quant_nn.QuantConv2d, quant_nn.QuantLinear, quant_nn.QuantAvgPool2d, quant_nn.QuantAdaptiveAvgPool2d)
    for layer in layers:
        layer.set_default_quant_desc_input(described)
    state = read_state_dict(options.checkpoint)
    num_classes = classes or head_size(state, name=options.model, channels=options.channels)
    quant_modules.initialize()
    try:
        model = create_model(options.model, num_classes=num_classes, channels=options.channels)
    finally:
        quant_modules.deactivate()
    load_weights_(model, state, name=options.model, source=str(options.checkpoint))
    return model.eval()


def decoded(options: argparse.Namespace, rows: Sequence[index_module.ImageRow], *, root: str) -> torch.Tensor:
    """Returns the images of `rows` as the network reads them, decoded with as many threads as ours."""
    preprocessing = preprocessing_of(options)
    pixels = decoding.decode_rows(rows, root=root, preprocessing=preprocessing)
    return torch.from_numpy(network_input(pixels, mean=preprocessing.mean, std=preprocessing.std))


def collect_stats_(
    model: torch.nn.Module, quantizers: Sequence[quant_nn.TensorQuantizer], images: torch.Tensor, *, batch_size: int
) -> None:
    """Feeds the images with calibrators on and quantizers off, then turns both back."""
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    forward(model, images, batch_size=batch_size)
    for quantizer in quantizers:
        quantizer.enable_quant()
        quantizer.disable_calib()


def compute_amax_(
    quantizers: Sequence[quant_nn.TensorQuantizer], method: str, watch: Stopwatch, *, most_bins: int
) -> dict:
    """Loads every quantizer's amax; returns the bins of the spared histograms and what they would have cost."""
    spared, loops, loop_s = [], 0, 0.0
    for quantizer in quantizers:
        calibrator = quantizer._calibrator
        if isinstance(calibrator, calib.MaxCalibrator):
            with watch.stage("compute_amax"):
                quantizer.load_calib_amax()
            continue
        bins = len(calibrator._calib_hist)
        if method == "entropy" and bins > most_bins:
            counts = calibrator._calib_hist.int().numpy().astype(np.int64)
            edge = int(entropy_bin(counts[None], bounds=np.array([127]))[0])
            quantizer.register_buffer("_amax", calibrator._calib_bin_edges[edge].clone())
            spared.append(bins)
            continue
        started = time.perf_counter()
        with watch.stage("compute_amax"):
            settings = {"percentile": PERCENTILE} if method == "percentile" else {}
            quantizer.load_calib_amax(method, **settings)
        loops += bins**2
        loop_s += time.perf_counter() - started
    likely_s = loop_s / loops * sum(bins**2 for bins in spared) if spared and loops else 0.0
    return {"spared_bins": spared, "spared_likely_s": likely_s}


def export(model: torch.nn.Module, shape: tuple[int, int, int]) -> None:
    """Writes the fake-quantized model as Q/DQ ONNX at batch 1 and 32, and drops it."""
    with tempfile.TemporaryDirectory() as directory, exportable_fake_quant(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch_size in (1, 32):
            images = torch.zeros(batch_size, *shape)
            torch.onnx.export(
                model, (images,), f"{directory}/{batch_size}.onnx", opset_version=17, do_constant_folding=True,
                dynamo=False,
            )  # fmt: skip


@torch.no_grad()
def forward(model: torch.nn.Module, images: torch.Tensor, *, batch_size: int) -> np.ndarray:
    """Returns the logits of the images, batch by batch."""
    return np.concatenate([model(part).numpy() for part in images.split(batch_size)])


if __name__ == "__main__":
    main()
