"""How much of any network is in INT8, and does what stays in float say why?

The networks of `zoo_families.json`, one of each family of timm, torchvision's classifiers and classes of transformers,
with random weights and BatchNorm statistics: each is prepared as a run does it, its Q/DQ graph is held against the
network without its quantizers, checked, and run on OpenVINO and by the letter of ONNX with the ranges of a few random
images. Every network has a process of its own and a limit of time, and its row is written as soon as it is there, so
that networks can be run one after the other. timm and transformers are not installed with the project:
`pip install '.[timm,hf]'`.
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

import numpy as np
import onnxruntime
import torch
from torch import nn

from benchmarks.subject import write_result
from ptq.checks.run import check_graph
from ptq.config import QuantizationConfig
from ptq.engines import open_engine, open_reference
from ptq.engines.base import Engine
from ptq.engines.isa import current_isa
from ptq.graph.candidate import write_candidate
from ptq.graph.insertion import write_qdq_template
from ptq.graph.names import observed_output
from ptq.graph.pair_sums import limit_pair_sums
from ptq.networks.factory import create_model, torchvision
from ptq.numerics.metrics import sqnr_db
from ptq.quantization.prepare import prepare_model
from ptq.quantization.prepare_torch import write_template
from ptq.quantization.prepared import PreparedModel
from ptq.quantization.same_function import require_same_function

CLASSES, IMAGES = 10, 4
TRANSFORMERS = ("ViT", "DeiT", "Beit", "Swin", "ConvNext", "ResNet", "RegNet", "MobileViT")
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
        images = np.random.default_rng(0).normal(size=(IMAGES, *shape)).astype(np.float32)
        amax = largest(found, images)
        portable, graph = directory / "portable.onnx", directory / "graph.onnx"
        limit_pair_sums(template, portable, plan=found.plan, runtimes=["openvino"])
        write_candidate(portable, graph, plan=found.plan, dialect="cpu", activation_amax=amax, metadata={})
        allowed = (*found.plan.float_layers, *found.plan.float_operators)
        checks = check_graph(graph, dialect="cpu", allowed_float_layers=allowed, input_shape=shape, num_classes=CLASSES)
        parity = sqnrs(found.files["fp32_onnx"], graph, images)
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
        **parity,
        "seconds": seconds,
    }


def largest(found: PreparedModel, images: np.ndarray) -> dict[str, float]:
    """The amax of every activation quantizer: the largest value on the images."""
    session = onnxruntime.InferenceSession(found.files["observed_onnx"], providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    values: dict[str, float] = {}
    for image in images:
        for name, value in zip(names, session.run(None, {session.get_inputs()[0].name: image[None]}), strict=True):
            values[name] = max(values.get(name, 0.0), float(np.abs(value).max()))
    return {spec.name: values[observed_output(spec.observed)] or 1.0 for spec in found.plan.activations}


def sqnrs(fp32: Path, int8: Path, images: np.ndarray) -> dict[str, float]:
    """SQNR in dB: of the engine to FP32, of the file by the letter of ONNX to FP32, and of the one to the other."""

    def logits(engine: Engine, graph: Path, precision: str) -> np.ndarray:
        batches = (image[None] for image in images)
        return np.concatenate(
            list(engine.logits(graph, batches, precision=precision, batch_size=1, float_remainder="fp32"))
        )

    engine, letter = open_engine("openvino", threads=0), open_reference(threads=0)
    exact, by_engine = logits(engine, fp32, "fp32"), logits(engine, int8, "int8")
    by_letter = logits(letter, int8, "int8")
    return {
        "engine_db": sqnr_db(exact, by_engine),
        "letter_db": sqnr_db(exact, by_letter),
        "engine_to_letter_db": sqnr_db(by_letter, by_engine),
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


def transformers_networks(folder: Path) -> dict[str, int]:
    """Eight classes of transformers in their default sizes: a folder with the config, and the side of their images."""
    import transformers

    found = {}
    for name in TRANSFORMERS:
        config = getattr(transformers, f"{name}Config")()
        config.save_pretrained(folder / name)
        side = getattr(config, "image_size", 224)
        found[f"hf/{folder / name}"] = side if isinstance(side, int) else side[0]
    return found


def torchvision_networks() -> dict[str, int]:
    """Torchvision's classifiers and the side of the images that each was trained on."""
    models = torchvision.models
    weights = {name: list(models.get_model_weights(name)) for name in models.list_models(module=models)}
    return {name: found[-1].transforms().crop_size[0] for name, found in weights.items()}


def is_whole(row: dict[str, Any]) -> bool:
    """Whether every layer is in INT8, no BatchNorm is left, and nothing was found wrong."""
    return "error" not in row and row["int8_layers"] == row["layers"] and not row["batchnorms"] and not row["errors"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--source", choices=("timm", "torchvision", "transformers"), default="timm")
    parser.add_argument("--networks", nargs="*", default=[], help="names; default: those that have no row yet")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.one:
        name, side = options.one
        print(json.dumps(examined(name, int(side))))
        return
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, int] = {
            "timm": lambda: json.loads(FAMILIES.read_text()),
            "torchvision": torchvision_networks,
            "transformers": lambda: transformers_networks(Path(folder)),
        }[options.source]()
        path = options.results / f"zoo_coverage_{options.source}.json"
        rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["found"]["networks"] if path.is_file() else {}
        asked, options.name = options.networks or [name for name in sides if shown(name) not in rows], options.source
        options.networks, options.one, options.calibration_images, options.data, options.model = [], [], 0, "", ""
        for name in asked:
            rows[shown(name)] = row = in_its_process(name, sides.get(name, 224))
            print(f"{shown(name):44} {sentence(row)}", flush=True)
            found = {
                "isa": current_isa(), "whole": sum(map(is_whole, rows.values())), "examined": len(rows),
                "networks": dict(sorted(rows.items())),
            }  # fmt: skip
            write_result(options, "zoo_coverage", found)


def shown(name: str) -> str:
    """A network's name without the folder that it has in this run alone."""
    return f"hf/{Path(name).name}" if name.startswith("hf/") else name


def sentence(row: dict[str, Any]) -> str:
    """A row on one line."""
    if "error" in row:
        return row["error"][:160]
    return (
        f"{row['source']:5} {row['int8_layers']:4} of {row['layers']:4} {row['int8_macs_percent']:6.2f} % "
        f"{row['batchnorms']:3} BN {row['seconds']:5.1f} s {row['engine_db']:5.1f} dB "
        f"{row['engine_to_letter_db']:5.1f} dB errors {dict(row['errors'])}"
    )


if __name__ == "__main__":
    main()
