"""Do the graph checks find faults that onnx.checker, strict shape inference and ONNX Runtime let pass?

Writes sound Q/DQ graphs of torchvision networks through the core's own functions (random weights, both dialects),
puts one fault of `benchmarks.faults` into each, and reports which checks find it, and what the three others say. A
graph without a fault must have no finding above information. A fault that onnx.checker finds is no evidence; the
exit code is 1 if a check misses its fault, if a sound graph has a finding, or if onnx.checker finds a fault.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import safetensors.torch

from benchmarks.family_networks import MEAN, STD, random_pixels, realistic_network
from benchmarks.faults import FAULTS
from benchmarks.faulty_graph import Fault, Subject
from benchmarks.subject import write_result
from ptq.checks.run import CHECKS, check_graph
from ptq.config import Dialect, QuantizationConfig
from ptq.data.images import network_input
from ptq.engines.openvino_activations import open_activation_readers
from ptq.graph.candidate import write_candidate
from ptq.graph.pair_sums import limit_pair_sums
from ptq.numerics.metrics import cosine_per_image
from ptq.quantization.prepare_torch import prepare_torch_model, write_template

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
DIALECTS: tuple[Dialect, ...] = ("tensorrt", "cpu")
SEVERITIES = {check.identifier: check for check in CHECKS}
METADATA = {"checkpoint_sha256": "0" * 64, "method": "max", "trial": "0"}


@dataclass(frozen=True, slots=True)
class Sound:
    """A Q/DQ graph without a fault, its dialect, and arguments of `check_graph` that it satisfies."""

    path: Path
    dialect: Dialect
    options: dict[str, Any]


def sound_graphs(name: str, *, side: int, directory: Path) -> list[Sound]:
    """Returns the Q/DQ graphs of a network with random weights, calibrated on two random images."""
    shape = (3, side, side)
    checkpoint = directory / "checkpoint.safetensors"
    state = realistic_network(name, side=side).state_dict()
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, checkpoint)
    prepared = prepare_torch_model(
        name=name, checkpoint=checkpoint, class_count=1, has_named_classes=False, input_shape=shape,
        quantization=QuantizationConfig(), directory=directory,
    )  # fmt: skip
    template = directory / "template.onnx"
    write_template(
        template, weights=prepared.files["weights"], plan=prepared.plan, name=name, num_classes=prepared.num_classes,
        input_shape=shape,
    )  # fmt: skip
    limit_pair_sums(template, template, plan=prepared.plan)
    (read,) = open_activation_readers(prepared.files["observed_onnx"], workers=1)
    images = network_input(random_pixels(2, side=side, seed=3), mean=MEAN, std=STD)
    seen = [[float(np.abs(tensor).max()) for tensor in read(image[None])] for image in images]
    observed = list(dict.fromkeys(spec.observed for spec in prepared.plan.activations))
    largest = dict(zip(observed, np.max(seen, axis=0), strict=True))
    amax = {spec.name: float(largest[spec.observed]) for spec in prepared.plan.activations}
    plan, found = prepared.plan, []
    options = {
        "allowed_float_layers": (*plan.float_layers, *plan.float_operators), "input_shape": shape,
        "num_classes": prepared.num_classes,
    }  # fmt: skip
    for dialect in DIALECTS:
        path = directory / f"{name}_{dialect}.onnx"
        write_candidate(template, path, plan=plan, dialect=dialect, activation_amax=amax, metadata=METADATA)
        found.append(Sound(path, dialect, options))
    return found


def said(attempt: Callable[[], object]) -> str:
    """Returns the first line of what is raised, empty if nothing is."""
    try:
        attempt()
    except Exception as error:  # the libraries' exceptions share no other base class
        return " ".join(str(error).split())[:160] or type(error).__name__
    return ""


class Runtime:
    """ONNX Runtime with every optimisation off, and the logits of a sound graph."""

    def __init__(self, sound: Sound, images: np.ndarray) -> None:
        self._images = images
        self._reference = self._run(sound.path.read_bytes())

    def _run(self, graph: bytes) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {session.get_inputs()[0].name: self._images})[0])

    def verdict(self, graph: bytes) -> str:
        """Returns the least cosine to the sound graph's logits, or why the graph does not run."""
        found: list[np.ndarray] = []
        problem = said(lambda: found.append(self._run(graph)))
        if problem:
            return f"fails: {problem}"
        if found[0].shape != self._reference.shape:
            return f"runs, logits {found[0].shape}"
        return f"runs, cosine {float(cosine_per_image(self._reference, found[0]).min()):.4f}"


def fits(fault: Fault, sound: Sound) -> bool:
    """Tells whether the graph has the place that the fault damages; MobileNetV2 has no square weight, for example."""
    try:
        fault.put(Subject(onnx.load(sound.path)))
    except LookupError:
        return False
    return True


def examine(sound: Sound, name: str, fault: Fault, runtime: Runtime | None, directory: Path) -> dict[str, Any]:
    """Returns what everyone says of one fault."""
    model = onnx.load(sound.path)
    fault.put(Subject(model))
    path = directory / "faulty.onnx"
    path.write_bytes(model.SerializeToString())
    checks = check_graph(path, dialect=sound.dialect, **{**sound.options, **fault.options})
    caught = [item for item in checks.findings if item.check == fault.check]
    serious = {item.check for item in checks.findings if item.severity != "info"} - {fault.check}
    return {
        "graph": sound.path.stem, "fault": name, "check": fault.check,
        "severity": SEVERITIES[fault.check].severity_in(sound.dialect),
        "caught": bool(caught), "message": caught[0].message if caught else "", "others": sorted(serious),
        "onnx_checker": said(lambda: onnx.checker.check_model(model, full_check=True)),
        "shape_inference": said(lambda: onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)),
        "onnxruntime": runtime.verdict(model.SerializeToString()) if runtime else "not run",
    }  # fmt: skip


def examine_network(name: str, *, side: int, run: bool) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Returns a row per fault of a network's two graphs, and the findings of the graphs without a fault."""
    rows, false_alarms = [], {}
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        images = network_input(random_pixels(2, side=side, seed=4), mean=MEAN, std=STD)
        for sound in sound_graphs(name, side=side, directory=directory):
            checks = check_graph(sound.path, dialect=sound.dialect, **sound.options)
            own = {fault.check for fault in FAULTS.values()}
            false_alarms[sound.path.stem] = [
                f"{item.check}: {item.node} {item.message}"
                for item in checks.findings
                if item.severity != "info" or item.check in own
            ]
            runtime = Runtime(sound, images) if run else None
            for fault_name, fault in FAULTS.items():
                if sound.dialect in fault.dialects and fits(fault, sound):
                    rows.append(examine(sound, fault_name, fault, runtime, directory))
    return rows, false_alarms


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints a line per fault and graph."""
    print(f"{'graph':22} {'fault':36} {'check':24} {'caught':6} {'onnx.checker':12} {'shapes':7} ONNX Runtime; others")
    for row in rows:
        others = f"; {', '.join(row['others'])}" if row["others"] else ""
        print(
            f"{row['graph']:22} {row['fault']:36} {row['check']:24} {'yes' if row['caught'] else 'NO':6} "
            f"{'refuses' if row['onnx_checker'] else 'passes':12} "
            f"{'refuses' if row['shape_inference'] else 'passes':7} {row['onnxruntime'][:40]}{others}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(NETWORKS))
    parser.add_argument("--side", type=int, default=96, help="pixels of an image")
    parser.add_argument("--no-run", action="store_true", help="leave ONNX Runtime out")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.name = options.model = ""
    rows: list[dict[str, Any]] = []
    false_alarms: dict[str, list[str]] = {}
    for name in options.models:
        found, alarms = examine_network(name, side=options.side, run=not options.no_run)
        rows += found
        false_alarms |= alarms
    print_table(rows)
    summary = {
        "faults": len({row["fault"] for row in rows}),
        "checks_that_caught_one": len({row["check"] for row in rows if row["caught"]}),
        "seeded": len(rows), "caught": sum(row["caught"] for row in rows),
        "onnx_checker_refuses": sum(bool(row["onnx_checker"]) for row in rows),
        "shape_inference_refuses": sum(bool(row["shape_inference"]) for row in rows),
        "onnxruntime_runs": sum(row["onnxruntime"].startswith("runs") for row in rows),
        "false_alarms": sum(map(len, false_alarms.values())),
    }  # fmt: skip
    print(summary)
    write_result(options, "seeded_faults", {"summary": summary, "false_alarms": false_alarms, "rows": rows})
    if summary["caught"] < summary["seeded"] or summary["onnx_checker_refuses"] or summary["false_alarms"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
