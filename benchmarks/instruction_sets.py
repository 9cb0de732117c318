"""What does an INT8 model lose under each instruction set, with scales that cannot saturate and without, beside NNCF?

Of each draw of calibration images, graphs of three kinds of weights, biases corrected for each: `native`, `portable`
(no sum of two products exceeds 16 bits at any input) and `observed` (none does at the largest activation that each
channel had on the drawn images; a rule that was tried and is in the benchmark alone). The method of each is the one
with the best SQNR on 100 images of the first split on the engine. Every graph is run by OpenVINO in a process of its
own per instruction set, to which `ONEDNN_MAX_CPU_ISA` limits the kernels, and by ONNX Runtime in float, which is what
the file says; beside them NNCF's default quantization of the same FP32 file with the same images (`--nncf PYTHON`: the
interpreter of an environment with NNCF). Sums that saturate are counted exactly on images of the first split. Latencies
at batch 1 are taken by turns.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.calibration.calibrate import corrected_biases, ranges_from_files
from ptq.config import METHODS, Method
from ptq.dialect import amax_bound
from ptq.engines import open_engine, open_reference
from ptq.engines.isa import adds_in_16_bits, current_isa, playable_isas
from ptq.graph.candidate import groups_of, layer_nodes
from ptq.graph.pair_sums import integer_layer, limit_pair_sums, outputs_first
from ptq.graph.prefixes import beginning_of
from ptq.numerics.metrics import sqnr_db
from ptq.numerics.paired_test import paired_comparison
from ptq.numerics.saturation import LARGEST_INPUT, SHIFT, scales_without_saturation

BATCH = 20
TURNS = 20
CHOICE_IMAGES = 100
CANDIDATES: tuple[tuple[Method, float], ...] = (*((method, 99.99) for method in METHODS), ("percentile", 99.95))
# Run by an interpreter that has NNCF, and may lack everything else of ours.
NNCF = """
import sys
import numpy as np, nncf, openvino
fp32, images, output = sys.argv[1:]
nncf.set_log_level("ERROR")
calibration = np.load(images)
dataset = nncf.Dataset([image[None] for image in calibration])
found = nncf.quantize(openvino.Core().read_model(fp32), dataset, subset_size=len(calibration))
openvino.save_model(found, output, compress_to_fp16=False)
print(nncf.__version__)
"""


def run(graphs: list[Path], inputs: Path, folder: Path) -> None:
    """In a process of its own: the logits of every graph, and latencies at batch 1 of the first three by turns."""
    engine = open_engine("openvino", threads=0)
    images = np.load(inputs, mmap_mode="r")
    runners = []
    for graph in graphs:
        batches = (np.array(images[start : start + BATCH]) for start in range(0, len(images), BATCH))
        found = engine.logits(graph, batches, precision="int8", batch_size=BATCH, float_remainder="fp32")
        np.save(folder / f"{graph.stem}.npy", np.concatenate(list(found)))
    for graph in graphs[:3]:
        built = engine.build(graph, precision="int8", batch_size=1, float_remainder="fp32")
        runners.append(engine.load(built.blob, precision="int8", batch_size=1, float_remainder="fp32"))
    one = np.array(images[:1])
    turns = [
        [float(np.median(runner.timed_calls(one, warmup_ms=50, duration_s=0.3, min_iterations=10)[0]))
         for runner in runners]
        for _ in range(TURNS)
    ]  # fmt: skip
    (folder / "ran.json").write_text(json.dumps({"isa": current_isa(), "latency_ms": turns}))


def observed_template(subject: Subject, native: Path, amax: dict[str, float], path: Path) -> None:
    """Writes the template with scales that grow for the largest step that each input channel had, margin 1."""
    plan, model = subject.prepared.plan, onnx.load(native)
    ranges = ranges_from_files(
        observed_onnx=subject.files["observed_onnx"], plan=plan, pixels=subject.directory / "pixels.npy", images=10**9,
        mean=subject.preprocessing.mean, std=subject.preprocessing.std, threads=0,
    )  # fmt: skip
    specs = {spec.name: spec for spec in plan.activations}
    read = {found.layer: specs[found.quantizer] for found in plan.layer_inputs if found.quantizer in specs}
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for layer, node in layer_nodes(model, plan).items():
        name, groups = f"{layer}.weight.scale", groups_of(node)
        weight, scale = (numpy_helper.to_array(values[each]) for each in (f"{layer}.weight", name))
        turned = outputs_first(weight, 0, node.op_type, groups)
        largest = np.full(turned.shape[1] * groups, LARGEST_INPUT)
        spec = read.get(layer)
        if spec is not None and ranges[spec.name].size == largest.size:
            steps = np.rint(ranges[spec.name] * amax_bound(spec, "cpu") / amax[spec.name])
            largest = np.minimum(steps, 255) if spec.never_negative else np.minimum(steps, 127) + SHIFT
        grown = scales_without_saturation(turned, scale, largest.astype(np.int64), groups=groups)
        values[name].CopyFrom(numpy_helper.from_array(grown, name))
    path.write_bytes(model.SerializeToString(deterministic=True))


def graphs_of(subject: Subject, draw: int, choice: np.ndarray, exact: np.ndarray) -> dict[str, Path]:
    """The chosen graph of each kind of weights of one draw."""
    histograms, plan, native = subject.histograms(draw), subject.prepared.plan, subject.directory / "template.onnx"
    engine = open_engine("openvino", threads=0)
    found = {}
    for kind in ("native", "portable", "observed"):
        best = -np.inf
        for position, (method, percentile) in enumerate(CANDIDATES):
            amax = subject.amax(histograms, "cpu", method, percentile)
            subject.template = native
            if kind != "native":
                subject.template = subject.directory / f"{kind}_template.onnx"
            if kind == "portable" and not position:
                grown = limit_pair_sums(native, subject.template, plan=plan)
                print(f"{grown.grown} of {grown.scales} scales grew, by up to {grown.largest_factor:.2f}")
            if kind == "observed":
                observed_template(subject, native, amax, subject.template)
            biases = corrected_biases(subject.template, plan=plan, means=subject.means, trial=0)
            graph = subject.graph(amax, "cpu", f"{kind}_{draw}_{position}", biases)
            batches = (choice[start : start + BATCH] for start in range(0, len(choice), BATCH))
            logits = engine.logits(graph, batches, precision="int8", batch_size=BATCH, float_remainder="fp32")
            likeness = sqnr_db(exact, np.concatenate(list(logits)))
            print(f"draw {draw}, {kind}, {method} {percentile}: {likeness:.2f} dB")
            if likeness > best:
                best, found[kind] = likeness, graph
    return {f"{kind}_{draw}": path.rename(path.with_name(f"{kind}_{draw}.onnx")) for kind, path in found.items()}


def nncf_graph(subject: Subject, python: str, draw: int) -> tuple[Path, str]:
    """NNCF's graph of the FP32 file, in OpenVINO's format, and its version."""
    images, output = subject.directory / "calibration.npy", subject.directory / f"nncf_{draw}.xml"
    np.save(images, subject.calibration_inputs(seed=draw))
    command = [python, "-c", NNCF, str(subject.files["fp32_onnx"]), str(images), str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return output, done.stdout.split()[-1]


def under(isa: str, graphs: list[Path], inputs: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What a process says that is limited to an instruction set, and the logits of every graph."""
    folder = inputs.parent / isa
    folder.mkdir()
    files = [*map(str, graphs), str(inputs), str(folder)]
    command = [sys.executable, "-m", "benchmarks.instruction_sets", "--run", *files]
    subprocess.run(command, check=True, env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa.upper()})
    logits = {graph.stem: np.load(folder / f"{graph.stem}.npy") for graph in graphs}
    return json.loads((folder / "ran.json").read_text()), logits


def saturated_sums(graph: Path, images: np.ndarray) -> dict[str, float]:
    """Sums of two products that saturate over all layers at these images, and how many sums there are."""
    model, reference = onnx.load(graph), open_reference(threads=0)
    beginning = graph.with_name("beginning.onnx")
    saturated = total = 0
    for node in model.graph.node:
        layer = integer_layer(model, node.output[0]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if layer is None:
            continue
        part = beginning_of(model, layer.activation, as_vector=False)
        beginning.write_bytes(part.SerializeToString())
        for image in images:
            (activations,) = reference.logits(
                beginning, [image[None]], precision="int8", batch_size=1, float_remainder="fp32"
            )
            found = layer.saturated_sums(activations)
            saturated, total = saturated + found[0], total + found[1]
    return {"saturated": saturated, "sums": total}


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        *graphs, inputs, folder = map(Path, sys.argv[2:])
        run(graphs, inputs, folder)
        return
    parser = arguments(__doc__)
    parser.add_argument("--splits", nargs="+", default=["val", "test"], help="splits on whose images all are compared")
    parser.add_argument("--isas", nargs="+", default=list(playable_isas()))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--nncf", default="", help="Python interpreter of an environment with NNCF")
    parser.add_argument("--saturation-images", type=int, default=64)
    options = parser.parse_args()
    subject = temporary_subject(options)
    splits = [subject.images(split, 10**9) for split in options.splits]
    inputs, labels = (np.concatenate(parts) for parts in zip(*splits, strict=True))
    np.save(subject.directory / "inputs.npy", inputs)

    def in_float(graph: Path, precision: str) -> np.ndarray:
        batches = (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))
        found = open_reference(threads=0).logits(
            graph, batches, precision=precision, batch_size=BATCH, float_remainder="fp32"
        )
        return np.concatenate(list(found))

    fp32 = in_float(subject.files["fp32_onnx"], "fp32")
    graphs: dict[str, Path] = {}
    version = ""
    for draw in range(options.draws):
        graphs |= graphs_of(subject, draw, splits[0][0][:CHOICE_IMAGES], fp32[:CHOICE_IMAGES])
        if options.nncf:
            graphs[f"nncf_{draw}"], version = nncf_graph(subject, options.nncf, draw)
    reference = {name: in_float(graph, "int8") for name, graph in graphs.items() if graph.suffix == ".onnx"}
    rows = []
    for isa in options.isas:
        ran, logits = under(isa, list(graphs.values()), subject.directory / "inputs.npy")
        latencies = dict(zip(list(graphs)[:3], np.array(ran["latency_ms"]).T, strict=True))
        for name, found in logits.items():
            kind, _, draw = name.partition("_")
            comparison = paired_comparison(fp32.argmax(1), found.argmax(1), labels)
            row = {
                "isa": ran["isa"], "weights": kind, "draw": int(draw), "drop_pp": comparison.drop_pp,
                "drop_interval_pp": comparison.drop_interval_pp,
                "agreement_percent": 100 * float(np.mean(fp32.argmax(1) == found.argmax(1))),
                "engine_db": sqnr_db(fp32, found),
            }  # fmt: skip
            if name in reference:
                row |= {"reference_db": sqnr_db(fp32, reference[name])}
            if name in latencies:
                ratio = latencies[name] / latencies["native_0"]
                row |= {"latency_ms": float(np.median(latencies[name])), "over_native": float(np.median(ratio))}
            rows.append(row)
            print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    counted = {}
    if options.saturation_images and adds_in_16_bits(current_isa()):
        for kind in ("native", "portable", "observed"):
            counted[kind] = saturated_sums(graphs[f"{kind}_0"], inputs[: options.saturation_images])
            print(kind, counted[kind])
    options.nncf = f"nncf {version}" if version else ""
    write_result(options, "instruction_sets", {"images": len(labels), "rows": rows, "saturation": counted})


if __name__ == "__main__":
    main()
