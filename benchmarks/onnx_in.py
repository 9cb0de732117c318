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
from ptq.config import METHODS, QuantizationConfig
from ptq.engines import open_engine
from ptq.networks.checkpoint import load_weights_, read_state_dict
from ptq.networks.factory import create_model
from ptq.numerics.metrics import sqnr_db
from ptq.numerics.paired_test import paired_comparison
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
    as_onnx = argparse.Namespace(**{**vars(options), "checkpoint": exported(options, subject)})
    onnx_way = temporary_subject(as_onnx, subject.quantization)
    parts = [subject.images(split, 10**9) for split in options.splits]
    inputs, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    fp32 = logits_of(subject.prepared.files["fp32_onnx"], inputs, "fp32")
    fp32_onnx = logits_of(onnx_way.files["fp32_onnx"], inputs, "fp32")
    histograms, onnx_histograms = subject.histograms(), onnx_way.histograms()
    biases, onnx_biases = subject.biases(), onnx_way.biases()
    rows = []
    for dialect in ("cpu", "tensorrt"):
        for method in options.methods:
            amax = subject.amax(histograms, dialect, method)
            onnx_amax = onnx_way.amax(onnx_histograms, dialect, method)
            from_torch = logits_of(subject.graph(amax, dialect, "candidate", biases), inputs, "int8")
            from_onnx = logits_of(onnx_way.graph(onnx_amax, dialect, "candidate", onnx_biases), inputs, "int8")
            row = {"dialect": dialect, "method": method, **compared(from_torch, from_onnx, fp32, labels)}
            row["largest_amax_difference_percent"] = amax_difference(
                subject.prepared.plan, amax, onnx_way.prepared.plan, onnx_amax
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
