"""Does placement hold for every family of networks, and is it as fast as NNCF's?

Three stages, so that the first two can run beside other work. `structure` writes each network's FP32 and Q/DQ graphs
into `--directory`, and reports: layers and residual adds that the plan covers, what the graph checks find in both
dialects, cosine per image between the fake-quantized PyTorch model and the graph on ONNX Runtime (beside it the model
with itself under other float kernels), SQNR to the FP32 logits, and the INT8 share on OpenVINO. `nncf` writes NNCF's
graph of the same FP32 network from the same images; where NNCF is not installed it is left out. `timing` measures
those graphs in turns: FP32, ours in the cpu dialect, NNCF; then ours and NNCF's alone in many short turns, whose paired
ratios say which is faster on a machine that others use too. Results are merged by network, so that networks can be
run one at a time. Weights are random.
"""

import argparse
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from benchmarks.family_networks import FAMILIES, MEAN, STD, image_side, random_pixels, realistic_network
from benchmarks.parity import one_at_a_time
from benchmarks.subject import write_result
from ptq.calibration.amax_tables import amax_table
from ptq.calibration.calibrate import statistics_from_files
from ptq.checks.run import check_graph
from ptq.config import Dialect, PreprocessingConfig, QuantizationConfig
from ptq.data import decoding, sampling
from ptq.data import index as index_module
from ptq.data.images import network_input
from ptq.engines import int8_share, open_engine
from ptq.engines.base import Engine, Runner
from ptq.evaluation.benchmark import machine_description
from ptq.files import npy_from_array
from ptq.graph.candidate import write_candidate
from ptq.graph.pair_sums import limit_pair_sums
from ptq.graph.summary import summarize_onnx
from ptq.networks.fake_quant import exportable_fake_quant, fake_quant_from_folded, weight_amax
from ptq.networks.network import NetworkKind, network_from_weights
from ptq.numerics.latency import TimedCalls, interleave, summarize
from ptq.numerics.metrics import cosine_per_image, sqnr_db
from ptq.quantization.prepare_torch import prepare_torch_model, write_template
from ptq.quantization.prepared import PreparedModel

DIALECTS: tuple[Dialect, ...] = ("cpu", "tensorrt")
METADATA = {"checkpoint_sha256": "random weights", "method": "percentile_99.99", "trial": "0"}


class Network:
    """One network of a family and the folder that holds its graphs."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.side = options.side or image_side(name)
        self.directory = options.directory / name.replace(":", ".")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.options = options

    def path(self, graph: str) -> Path:
        """Returns the file of a graph: `fp32`, a dialect, or `nncf`."""
        return self.directory / ("nncf.xml" if graph == "nncf" else f"{graph}.onnx")

    def pixels(self) -> np.ndarray:
        """Returns the images that calibrate, uint8 (n, h, w, c): random ones, or a draw from a manifest."""
        count = self.options.calibration_images
        if not self.options.data:
            return random_pixels(count, side=self.side, seed=2)
        index = index_module.index_images(
            self.options.data, calibration_split="train", selection_split="val", test_split="test"
        )
        rows = index_module.rows_of_split_table(index.table, self.options.split)
        drawn = sampling.draw_stratified(np.array([row.label for row in rows]), images=count, seed=0)
        preprocessing = PreprocessingConfig(resize=self.side, crop=self.side, mean=MEAN, std=STD)
        return decoding.decode_rows([rows[i] for i in drawn], root=str(index.root), preprocessing=preprocessing)

    def prepare(self, quantization: QuantizationConfig) -> PreparedModel:
        """Writes the FP32 graph and the placement plan of the network with random weights."""
        checkpoint = self.directory / "checkpoint.safetensors"
        if not checkpoint.is_file():
            state = realistic_network(self.name, side=self.side).state_dict()
            safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, checkpoint)
        prepared = prepare_torch_model(
            name=self.name, checkpoint=checkpoint, class_count=1, has_named_classes=False,
            input_shape=(3, self.side, self.side), quantization=quantization, directory=self.directory,
        )  # fmt: skip
        prepared.files["fp32_onnx"].replace(self.path("fp32"))
        return prepared


def structure(network: Network) -> dict[str, Any]:
    """Writes the graphs of a network and returns what can be said without a clock."""
    quantization = QuantizationConfig()
    prepared = network.prepare(quantization)
    plan, shape = prepared.plan, (3, network.side, network.side)
    pixels = network.pixels()
    (network.directory / "pixels.npy").write_bytes(npy_from_array(pixels))
    (network.directory / "files.json").write_text(json.dumps([[str(index), ""] for index in range(len(pixels))]))
    (trial,) = statistics_from_files(
        observed_onnx=prepared.files["observed_onnx"], plan=plan, pixels=network.directory / "pixels.npy",
        files=network.directory / "files.json", draws=[range(len(pixels))], mean=MEAN, std=STD, bins=4096, threads=0,
    )  # fmt: skip
    template = network.directory / "template.onnx"
    write_template(
        template, weights=prepared.files["weights"], plan=plan, name=network.name, num_classes=prepared.num_classes,
        input_shape=shape,
    )  # fmt: skip
    limit_pair_sums(template, template, plan=plan)
    kind = NetworkKind(network.name, prepared.num_classes, shape)
    folded = network_from_weights(prepared.files["weights"], kind).folded
    inputs = network_input(pixels[: network.options.parity_images], mean=MEAN, std=STD)
    with torch.inference_mode():
        fp32 = folded.module(torch.from_numpy(inputs)).numpy()
    openvino, reference = (open_engine(name, threads=0) for name in ("openvino", "onnxruntime"))
    layers = len(plan.quantized_layers) + len(plan.float_layers)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "side": network.side, "traced": plan.traced,
        "layers": layers, "quantized_layers": len(plan.quantized_layers), "residual_adds": plan.residual_adds,
        "adds_with_one_quantized_operand": plan.quantized_residual_adds,
        "activation_quantizers": len(plan.activations), "warnings": list(prepared.warnings),
    }  # fmt: skip
    for dialect in DIALECTS:
        amax = amax_table(trial.histograms, plan=plan, dialect=dialect, method="percentile", percentile=99.99)
        path = network.path(dialect)
        write_candidate(template, path, plan=plan, dialect=dialect, activation_amax=amax, metadata=METADATA)
        model = fake_quant_from_folded(
            folded.module, plan, dialect=dialect, activation_amax=amax, weight_amax=weight_amax(folded.module, plan)
        )
        with torch.inference_mode(), exportable_fake_quant():
            logits = model(torch.from_numpy(inputs)).numpy()
        cosine = cosine_per_image(logits, run(reference, path, inputs))
        itself = cosine_per_image(logits, one_at_a_time(model, inputs))
        found[dialect] = {
            **findings(path, dialect, network, prepared),
            "parity_cosine_min": float(cosine.min()), "parity_cosine_mean": float(cosine.mean()),
            "pytorch_with_itself_cosine_min": float(itself.min()), "sqnr_db": sqnr_db(fp32, logits),
            **shares(openvino, path),
        }  # fmt: skip
    return found


def findings(path: Path, dialect: Dialect, network: Network, prepared: PreparedModel) -> dict[str, Any]:
    """Returns how many errors and warnings the graph checks find, and which."""
    checks = check_graph(
        path, dialect=dialect, allowed_float_layers=prepared.plan.float_layers,
        input_shape=(3, network.side, network.side), num_classes=prepared.num_classes,
    )  # fmt: skip
    kinds = Counter(f"{found.severity} {found.check}" for found in checks.findings if found.severity != "info")
    return {"errors": checks.errors, "warnings": checks.warnings, "findings": dict(kinds)}


def shares(engine: Engine, path: Path) -> dict[str, Any]:
    """Returns what OpenVINO runs in INT8, at batch 1."""
    share = int8_share(engine.build(path, precision="int8", batch_size=1, float_remainder="fp32").layers)
    return {
        "int8_input_percent": share.int8_input_percent, "int8_output_percent": share.int8_output_percent,
        "reformats": share.reformats, "float_layers": list(share.float_layers),
    }  # fmt: skip


def run(engine: Engine, path: Path, inputs: np.ndarray) -> np.ndarray:
    """Returns the logits of a Q/DQ graph."""
    batch = len(inputs)
    built = engine.build(path, precision="int8", batch_size=batch, float_remainder="fp32")
    runner = engine.load(built.blob, precision="int8", batch_size=batch, float_remainder="fp32")
    return runner(inputs)


def nncf_graph(network: Network) -> dict[str, Any] | None:
    """Writes NNCF's default quantization of the FP32 graph; for transformers with the model type it has for them."""
    try:
        import nncf
    except ImportError:
        return None
    import openvino

    nncf.set_log_level("ERROR")
    pixels = np.load(network.directory / "pixels.npy")
    is_transformer = any(network.name in FAMILIES[family] for family in ("ViT", "Swin"))
    # Converted, not read: a conversion folds constants, without which NNCF does not know weights behind a Transpose
    # or a Reshape for weights, and OpenVINO runs such layers in float.
    quantized = nncf.quantize(
        openvino.convert_model(network.path("fp32")),
        nncf.Dataset([image[None] for image in network_input(pixels, mean=MEAN, std=STD)]), subset_size=len(pixels),
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
    )  # fmt: skip
    openvino.save_model(quantized, network.path("nncf"), compress_to_fp16=False)
    engine = open_engine("openvino", threads=0)
    inputs = network_input(pixels[: network.options.parity_images], mean=MEAN, std=STD)
    fp32, logits = (run(engine, network.path(graph), inputs) for graph in ("fp32", "nncf"))
    return {
        "version": nncf.__version__, "model_type": "transformer" if is_transformer else "default",
        "sqnr_db": sqnr_db(fp32, logits), **shares(engine, network.path("nncf")),
    }  # fmt: skip


def timing(network: Network) -> dict[str, Any]:
    """Returns latencies of the graphs that `structure` wrote, and each one's share of FP32's, per batch size."""
    options, engine = network.options, open_engine("openvino", threads=0)
    graphs = [graph for graph in ("fp32", *options.timed_dialects, "nncf") if network.path(graph).is_file()]
    side = summarize_onnx(network.path("fp32")).input_shape[2] or network.side
    # Networks may have been timed on other machines: only figures of one row are of one run.
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine_description(), "side": side,
    }  # fmt: skip
    for batch in options.batch_sizes:
        images = np.random.default_rng(0).standard_normal((batch, 3, side, side)).astype(np.float32)
        runners = {}
        for graph in graphs:
            precision = "fp32" if graph == "fp32" else "int8"
            built = engine.build(network.path(graph), precision=precision, batch_size=batch, float_remainder="fp32")
            runners[graph] = engine.load(built.blob, precision=precision, batch_size=batch, float_remainder="fp32")
        timed = {graph: timed_runner(runner, images) for graph, runner in runners.items()}
        taken = interleave(
            timed, rounds=options.rounds, warmup_ms=200.0, duration_s=options.duration, min_iterations=options.rounds
        )
        rows = {
            graph: summarize("fp32" if graph == "fp32" else "int8", batch, samples, elapsed_s=elapsed_s)
            for graph, (samples, elapsed_s) in taken.items()
        }
        found[str(batch)] = {
            graph: {
                "median_ms": row.median_ms, "rounds_median_ms": row.rounds_median_ms,
                "over_fp32": row.median_ms / rows["fp32"].median_ms,
            }
            for graph, row in rows.items()
        }  # fmt: skip
        if "nncf" in timed:
            found[str(batch)]["over_nncf"] = paired_ratio(timed["cpu"], timed["nncf"], options)
    return found


def paired_ratio(ours: TimedCalls, other: TimedCalls, options: argparse.Namespace) -> dict[str, Any]:
    """Returns median and quartiles of our latency over the other's, turn by turn."""
    taken = interleave(
        {"ours": ours, "other": other}, rounds=options.turns, warmup_ms=20.0, duration_s=options.duration,
        min_iterations=2 * options.turns,
    )  # fmt: skip
    medians = {name: [float(np.median(turn)) for turn in samples] for name, (samples, _) in taken.items()}
    ratios = np.divide(medians["ours"], medians["other"])
    return {
        "turns": len(ratios),
        "median": float(np.median(ratios)),
        "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
    }


def timed_runner(runner: Runner, images: np.ndarray) -> TimedCalls:
    """Returns a function that times the runner on the images."""
    return lambda warmup_ms, duration_s, least: runner.timed_calls(
        images, warmup_ms=warmup_ms, duration_s=duration_s, min_iterations=least
    )


def merged(options: argparse.Namespace, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns what the result file holds, with the network's entry brought up to date, in the order of `FAMILIES`."""
    path = options.results / "families.json"
    found = json.loads(path.read_text())["found"] if path.is_file() else {}
    found[name] = {**found.get(name, {}), **entry}
    order = [model for models in FAMILIES.values() for model in models]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def print_table(found: dict[str, Any]) -> None:
    """Prints a line per network."""
    print(
        f"{'network':24} {'layers':>9} {'adds':>7} {'errors':>7} {'warn.':>6} {'parity':>9} {'in %':>6} {'out %':>6} "
        "INT8/FP32 (NNCF) and paired ratio of ours to NNCF's at batch 1, 32"
    )
    for name, entry in found.items():
        item, clock = entry.get("structure"), entry.get("timing", {})
        if item is None:
            continue
        cells = []
        for batch in ("1", "32"):
            rows = clock.get(batch)
            if rows:
                nncf = f"{rows['nncf']['over_fp32']:.2f}" if "nncf" in rows else "-"
                paired = f" {rows['over_nncf']['median']:.3f}" if "over_nncf" in rows else ""
                cells.append(f"{rows['cpu']['over_fp32']:.2f} ({nncf}){paired}")
        print(
            f"{name[-24:]:24} {item['quantized_layers']:4}/{item['layers']:<4} "
            f"{item['adds_with_one_quantized_operand']:3}/{item['residual_adds']:<3} "
            f"{item['cpu']['errors']:3}/{item['tensorrt']['errors']:<3} "
            f"{item['cpu']['warnings']:3}/{item['tensorrt']['warnings']:<3}"
            f"{min(item[dialect]['parity_cosine_min'] for dialect in DIALECTS):9.6f} "
            f"{item['cpu']['int8_input_percent']:6.1f} {item['cpu']['int8_output_percent']:6.1f} {'  '.join(cells)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[model for models in FAMILIES.values() for model in models])
    parser.add_argument("--stages", nargs="+", default=["structure", "nncf", "timing"],
                        choices=["structure", "nncf", "timing"])  # fmt: skip
    parser.add_argument("--directory", type=Path, required=True, help="folder that keeps the graphs")
    parser.add_argument("--side", type=int, default=0, help="pixels; 0: 224, or 32 for the CIFAR network")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--timed-dialects", nargs="+", default=["cpu"], choices=DIALECTS)
    parser.add_argument("--duration", type=float, default=4.0, help="seconds per graph and batch size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=20, help="paired turns of ours and NNCF's")
    parser.add_argument("--data", default="", help="manifest or image folder; default: random images")
    parser.add_argument("--split", default="train")
    parser.add_argument("--calibration-images", type=int, default=32)
    parser.add_argument("--parity-images", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.name = options.model = ""
    for name in options.models:
        network = Network(name, options)
        stages = {"structure": structure, "nncf": nncf_graph, "timing": timing}
        entry = {stage: stages[stage](network) for stage in options.stages}
        found = merged(options, name, entry)
        print_table({name: found[name]})
        write_result(options, "families", found)


if __name__ == "__main__":
    main()
