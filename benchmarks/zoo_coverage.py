"""How much of any network is in INT8, and does what stays in float say why?

The networks of `zoo_families.json`, one of a family of timm, with random weights and BatchNorm statistics: each is
prepared as a run does it, its Q/DQ graph is held against the network without its quantizers, and checked. Every network
has a process of its own and a limit of time. timm is not installed with the project: `pip install '.[timm]'`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.subject import write_result
from ptq.checks.run import check_graph
from ptq.config import QuantizationConfig
from ptq.graph.candidate import write_candidate
from ptq.graph.insertion import write_qdq_template
from ptq.networks.factory import create_model
from ptq.quantization.prepare import prepare_model
from ptq.quantization.prepare_torch import write_template
from ptq.quantization.same_function import require_same_function

CLASSES = 10
LIMIT_S = 240
FAMILIES = Path(__file__).with_name("zoo_families.json")


def with_statistics_(model: nn.Module) -> None:
    """Gives BatchNorm statistics that are not the initial ones, so that folding has something to do."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)


def examined(name: str, side: int) -> dict[str, Any]:
    """What becomes of one network."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model = create_model(name, num_classes=CLASSES, channels=3)
        with_statistics_(model)
        torch.save(model.state_dict(), directory / "network.pth")
        del model
        shape = (3, side, side)
        started = time.perf_counter()
        found = prepare_model(
            name=name, checkpoint=directory / "network.pth", is_onnx=False, class_count=CLASSES, has_named_classes=True,
            input_shape=shape, quantization=QuantizationConfig(), directory=directory,
        )  # fmt: skip
        seconds, template = time.perf_counter() - started, directory / "template.onnx"
        if found.source == "onnx":
            write_qdq_template(found.files["weights"], template, plan=found.plan)
        else:
            write_template(
                template, weights=found.files["weights"], plan=found.plan, name=name, num_classes=CLASSES,
                input_shape=shape,
            )  # fmt: skip
        require_same_function(template, found.files["fp32_onnx"], input_shape=shape)
        graph = directory / "graph.onnx"
        amax = {spec.name: 4.0 for spec in found.plan.activations}
        write_candidate(template, graph, plan=found.plan, dialect="cpu", activation_amax=amax, metadata={})
        allowed = (*found.plan.float_layers, *found.plan.float_operators)
        checks = check_graph(graph, dialect="cpu", allowed_float_layers=allowed, input_shape=shape, num_classes=CLASSES)
    coverage = found.coverage
    return {
        "source": found.source,
        "layers": coverage.layers,
        "int8_layers": coverage.int8_layers,
        "int8_macs_percent": coverage.int8_macs_percent,
        "batchnorms": coverage.batchnorms,
        "in_float": [[layer.name, layer.reason] for layer in coverage.in_float],
        "residual_adds": [found.plan.quantized_residual_adds, found.plan.residual_adds],
        "errors": Counter(each.check for each in checks.findings if each.severity == "error"),
        "warnings": Counter(each.check for each in checks.findings if each.severity == "warning"),
        "notes": found.warnings,
        "seconds": seconds,
    }


def in_its_process(name: str, side: int) -> dict[str, Any]:
    """The same in a process of its own; where that fails, the last line it wrote."""
    command = [sys.executable, "-m", "benchmarks.zoo_coverage", "--one", name, str(side)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT_S} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:400]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--networks", nargs="*", default=[], help="names; default: every family")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.one:
        name, side = options.one
        print(json.dumps(examined(name, int(side))))
        return
    sides: dict[str, int] = json.loads(FAMILIES.read_text())
    rows: dict[str, dict[str, Any]] = {}
    for name in options.networks or sides:
        rows[name] = row = in_its_process(name, sides.get(name, 224))
        if "error" in row:
            print(f"{name:40} {row['error'][:140]}", flush=True)
        else:
            print(
                f"{name:40} {row['source']:5} {row['int8_layers']:4} of {row['layers']:4} "
                f"{row['int8_macs_percent']:6.2f} % {row['batchnorms']:3} BN {row['seconds']:5.1f} s "
                f"errors {dict(row['errors'])}",
                flush=True,
            )
    whole = [
        name for name, row in rows.items()
        if "error" not in row and row["int8_layers"] == row["layers"] and not row["batchnorms"]
    ]  # fmt: skip
    print(f"{len(whole)} of {len(rows)} networks are whole: every layer in INT8, no BatchNorm left")
    options.calibration_images, options.data, options.name, options.model = 0, "", "", ""
    write_result(options, "zoo_coverage", {"whole": len(whole), "networks": rows})


if __name__ == "__main__":
    main()
