"""Does an ONNX file without its PyTorch source get the quantization that the PyTorch way gives?

Exports the network as torch's exporter does when a person calls it, quantizes that file and the checkpoint on the same
calibration images, and compares: which layers and tensors are quantized and with which side, amax of matching
quantizers, top-1 on the same images with the paired interval, and how often the two INT8 models agree. Both are done
without and with equalization.
"""

import argparse
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.calibration.amax_tables import amax_table
from ptq.calibration.calibrate import (
    RANGE_IMAGES,
    corrected_biases,
    means_by_name,
    ranges_from_files,
    statistics_from_files,
)
from ptq.config import METHODS, Dialect, Method, QuantizationConfig
from ptq.engines import open_engine
from ptq.graph.candidate import write_candidate
from ptq.graph.insertion import write_qdq_template
from ptq.networks.checkpoint import load_weights_, read_state_dict
from ptq.networks.factory import create_model
from ptq.numerics.metrics import sqnr_db
from ptq.numerics.paired_test import paired_comparison
from ptq.quantization.prepare_onnx import equalize_onnx_model, prepare_onnx_model
from ptq.records.plan import PlacementPlan

BATCH = 20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--splits", nargs="+", default=["test"], help="splits on whose images all are compared")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for equalization in (False, True):
        name = "equalized" if equalization else "not equalized"
        found[name] = both_ways(options, equalization=equalization)
    write_result(options, "onnx_in", found)


def both_ways(options: argparse.Namespace, *, equalization: bool) -> dict[str, Any]:
    """Returns placement, accuracy and agreement of the two ways, with or without equalization."""
    subject = temporary_subject(options, QuantizationConfig(equalization=equalization))
    onnx_way = OnnxWay(options, subject)
    parts = [subject.images(split, 10**9) for split in options.splits]
    inputs, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    fp32 = logits_of(subject.prepared.files["fp32_onnx"], inputs, "fp32")
    fp32_onnx = logits_of(onnx_way.files["fp32_onnx"], inputs, "fp32")
    histograms = subject.histograms()
    biases = subject.biases()
    onnx_way.calibrate(subject)
    rows = []
    for dialect in ("cpu", "tensorrt"):
        for method in options.methods:
            amax = subject.amax(histograms, dialect, method)
            from_torch = logits_of(subject.graph(amax, dialect, "candidate", biases), inputs, "int8")
            from_onnx = logits_of(onnx_way.graph(dialect, method), inputs, "int8")
            row = {"dialect": dialect, "method": method, **compared(from_torch, from_onnx, fp32, labels)}
            row["largest_amax_difference_percent"] = amax_difference(
                subject.prepared.plan, amax, onnx_way.prepared.plan, onnx_way.amax(dialect, method)
            )
            rows.append(row)
            print(row)
    return {
        "images": len(labels),
        "placement": placement(subject.prepared.plan, onnx_way.prepared.plan),
        "fp32_top1_percent": {"pytorch": top1(fp32, labels), "onnx": top1(fp32_onnx, labels)},
        "fp32_largest_difference_over_largest_logit": float(np.abs(fp32 - fp32_onnx).max() / np.abs(fp32).max()),
        "int8": rows,
    }


class OnnxWay:
    """The network of a subject as an ONNX file, prepared and calibrated on the subject's images."""

    def __init__(self, options: argparse.Namespace, subject: Subject) -> None:
        self.directory = subject.directory / "onnx_way"
        self.directory.mkdir()
        file = exported(options, subject)
        self.prepared = prepare_onnx_model(
            checkpoint=file, class_count=len(subject.index.class_names),
            has_named_classes=subject.index.has_named_classes, input_shape=subject.shape,
            quantization=subject.quantization, directory=self.directory,
        )  # fmt: skip
        self.files: dict[str, Path] = dict(self.prepared.files)
        if subject.quantization.equalization:
            self._equalize(subject)
        self.template = self.directory / "template.onnx"
        write_qdq_template(self.files["weights"], self.template, plan=self.prepared.plan)

    def _equalize(self, subject: Subject) -> None:
        plan = self.prepared.plan
        ranges = ranges_from_files(
            observed_onnx=self.files["observed_onnx"], plan=plan, pixels=subject.directory / "ranges.npy",
            images=RANGE_IMAGES, mean=subject.preprocessing.mean, std=subject.preprocessing.std, threads=0,
        )  # fmt: skip
        files, _ = equalize_onnx_model(
            weights=self.files["weights"], plan=plan, ranges=ranges, directory=self.directory
        )
        self.files.update(files)

    def calibrate(self, subject: Subject) -> None:
        """Collects statistics from the images that `subject.histograms` has written."""
        pixels = subject.directory / "pixels.npy"
        (self.trial,) = statistics_from_files(
            observed_onnx=self.files["observed_onnx"], plan=self.prepared.plan, pixels=pixels,
            files=subject.directory / "files.json", draws=[range(len(np.load(pixels, mmap_mode="r")))],
            mean=subject.preprocessing.mean, std=subject.preprocessing.std, bins=4096, threads=0,
        )  # fmt: skip
        means = means_by_name([self.trial], plan=self.prepared.plan)
        self.biases = corrected_biases(self.template, plan=self.prepared.plan, means=means, trial=0)

    def amax(self, dialect: Dialect, method: Method) -> dict[str, float]:
        """Returns the amax table of one method."""
        return amax_table(
            self.trial.histograms, plan=self.prepared.plan, dialect=dialect, method=method, percentile=99.99
        )

    def graph(self, dialect: Dialect, method: Method) -> Path:
        """Writes the Q/DQ graph of one method and returns its path."""
        path = self.directory / "candidate.onnx"
        write_candidate(
            self.template, path, plan=self.prepared.plan, dialect=dialect, activation_amax=self.amax(dialect, method),
            metadata={}, biases=self.biases,
        )  # fmt: skip
        return path


def exported(options: argparse.Namespace, subject: Subject) -> Path:
    """Writes the network, BatchNorm included, by a plain call of torch's exporter with a dynamic batch."""
    state = read_state_dict(options.checkpoint)
    model = create_model(options.model, num_classes=subject.prepared.num_classes, channels=subject.shape[0])
    load_weights_(model, state, name=options.model, source=str(options.checkpoint))
    path = subject.directory / "exported.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter announces its own deprecation
        torch.onnx.export(
            model, (torch.zeros(1, *subject.shape),), str(path), dynamo=False, opset_version=17,
            input_names=["input"], output_names=["output"], dynamic_axes={"input": {0: "b"}, "output": {0: "b"}},
        )  # fmt: skip
    return path


def logits_of(graph: Path, inputs: np.ndarray, precision: str) -> np.ndarray:
    engine = open_engine("openvino", threads=0)
    batches = (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))
    return np.concatenate(
        list(engine.logits(graph, batches, precision=precision, batch_size=BATCH, float_remainder="fp32"))
    )


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float(np.mean(logits.argmax(1) == labels))


def compared(from_torch: np.ndarray, from_onnx: np.ndarray, fp32: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Returns the figures of one method: each way against FP32, and the ONNX way against the PyTorch way."""
    comparison = paired_comparison(from_torch.argmax(1), from_onnx.argmax(1), labels)
    row: dict[str, Any] = {
        name: {
            "top1_percent": top1(logits, labels),
            "sqnr_db": sqnr_db(fp32, logits),
            "agreement_with_fp32_percent": 100 * float(np.mean(logits.argmax(1) == fp32.argmax(1))),
        }
        for name, logits in (("pytorch", from_torch), ("onnx", from_onnx))
    }
    row["onnx_against_pytorch"] = {
        "drop_pp": comparison.drop_pp,
        "interval_pp": comparison.drop_interval_pp,
        "mcnemar_p": comparison.mcnemar_p,
        "agreement_percent": 100 * float(np.mean(from_torch.argmax(1) == from_onnx.argmax(1))),
    }
    return row


def signatures(plan: PlacementPlan) -> dict[str, tuple[tuple[str, ...], str, int, int]]:
    """Returns per activation quantizer: the layers that read it, its side, its tensors and readers."""
    layers: dict[str, list[str]] = {}
    for read in plan.layer_inputs:
        layers.setdefault(read.quantizer, []).append(read.layer)
    return {
        spec.name: (
            tuple(sorted(layers.get(spec.name, ()))), "uint8" if spec.never_negative else "int8", len(spec.tensors),
            len(spec.readers),
        )
        for spec in plan.activations
    }  # fmt: skip


def placement(torch_plan: PlacementPlan, onnx_plan: PlacementPlan) -> dict[str, Any]:
    """Returns what the two plans have in common, and what not."""
    left, right = (Counter(signatures(plan).values()) for plan in (torch_plan, onnx_plan))
    return {
        "is_same": left == right and set(torch_plan.quantized_layers) == set(onnx_plan.quantized_layers),
        "layers": [len(torch_plan.quantized_layers), len(onnx_plan.quantized_layers)],
        "activation_quantizers": [len(torch_plan.activations), len(onnx_plan.activations)],
        "never_negative": [sum(s.never_negative for s in plan.activations) for plan in (torch_plan, onnx_plan)],
        "residual_adds_with_one_quantized_operand": [
            torch_plan.quantized_residual_adds, onnx_plan.quantized_residual_adds,
        ],
        "only_pytorch": [str(item) for item in left - right],
        "only_onnx": [str(item) for item in right - left],
    }  # fmt: skip


def amax_difference(
    torch_plan: PlacementPlan, torch_amax: dict[str, float], onnx_plan: PlacementPlan, onnx_amax: dict[str, float]
) -> float:
    """Returns the largest relative difference of amax over the quantizers that a layer reads, in percent."""
    names = {read.layer: read.quantizer for read in onnx_plan.layer_inputs}
    pairs = [(torch_amax[read.quantizer], onnx_amax[names[read.layer]]) for read in torch_plan.layer_inputs]
    return 100 * max(abs(left - right) / left for left, right in pairs)


if __name__ == "__main__":
    main()
