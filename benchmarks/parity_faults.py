"""Are faults of an INT8 file, and of the engine, named with layer and cause?

Ten kinds of fault are seeded into the graph of a real network, one at a time, at layers drawn at random: a wrong scale,
a clipped range, a wrong zero point, scales along another axis, a changed weight, a changed bias, an input without Q, a
weight without Q, an addition that no engine fuses, and weights whose sums saturate (for which a processor without VNNI
is needed). What a run does in its stage `compare_with_file` is done for each. Sound graphs must raise no alarm.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.calibration.calibrate import corrected_biases
from ptq.engines import open_engine, open_reference
from ptq.engines.isa import adds_in_16_bits, current_isa
from ptq.evaluation.parity import IMAGES, measure_parity
from ptq.graph.against_plan import Decisions, difference_in_file
from ptq.graph.candidate import layer_nodes
from ptq.graph.pair_sums import limit_pair_sums
from ptq.records.parity import Parting

Fault = Callable[[onnx.ModelProto, Decisions, np.random.Generator], tuple[str, ...]]


def _change(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    before = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(before), dtype=before.dtype), name))


def _activation(decided: Decisions, random: np.random.Generator) -> str:
    specs = decided.plan.of_dialect(decided.dialect).activations
    return specs[int(random.integers(len(specs)))].name


def _layer(decided: Decisions, random: np.random.Generator) -> str:
    return decided.plan.quantized_layers[int(random.integers(len(decided.plan.quantized_layers)))]


def wrong_scale(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    name = _activation(decided, random)
    _change(model, f"{name}.scale", lambda scale: scale * np.float32(4))
    return (name,)


def clipped_range(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    name = _activation(decided, random)
    _change(model, f"{name}.scale", lambda scale: scale * np.float32(0.3))
    return (name,)


def wrong_zero_point(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    name = _activation(decided, random)
    _change(model, f"{name}.zero_point", lambda zero: zero + 5)
    return (name,)


def swapped_axis(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    layer = _layer(decided, random)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] == f"{layer}.weight.scale":
            axis = next(each for each in node.attribute if each.name == "axis")
            axis.i = 1 - axis.i
    return (layer,)


def changed_weight(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    layer = _layer(decided, random)

    def change(weight: np.ndarray) -> np.ndarray:
        weight.flat[int(np.abs(weight).argmax())] *= -0.7
        return weight

    _change(model, f"{layer}.weight", change)
    return (layer,)


def changed_bias(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    layer = _layer(decided, random)
    names = {node.input[2] for node in [layer_nodes(model, decided.plan)[layer]] if len(node.input) > 2}
    _change(model, *names or {f"{layer}.bias"}, lambda bias: bias + np.float32(0.1) * np.abs(bias).max())
    return (layer,)


def _bypass(model: onnx.ModelProto, layer: str, position: int, decided: Decisions) -> bool:
    """Lets a layer read the tensor before the pair; whether it read a pair directly."""
    writers = {name: node for node in model.graph.node for name in node.output}
    node = layer_nodes(model, decided.plan)[layer]
    dequantize = writers.get(node.input[position])
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    node.input[position] = writers[dequantize.input[0]].input[0]
    return True


def input_without_q(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    layer = _layer(decided, random)
    while not _bypass(model, layer, 0, decided):
        layer = _layer(decided, random)
    return (layer,)


def weight_without_q(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    layer = _layer(decided, random)
    while not _bypass(model, layer, 1, decided):
        layer = _layer(decided, random)
    return (layer,)


def unfused_add(model: onnx.ModelProto, decided: Decisions, random: np.random.Generator) -> tuple[str, ...]:
    writers = {name: node for node in model.graph.node for name in node.output}
    found = [
        (node, position)
        for node in model.graph.node
        if node.op_type == "Add"
        for position, name in enumerate(node.input)
        if name in writers and writers[name].op_type == "DequantizeLinear"
    ]
    node, position = found[int(random.integers(len(found)))]
    node.input[position] = writers[writers[node.input[position]].input[0]].input[0]
    return (node.name,)


FAULTS: dict[str, tuple[Fault, str]] = {
    "wrong scale": (wrong_scale, "scale"),
    "clipped range": (clipped_range, "scale"),
    "wrong zero point": (wrong_zero_point, "zero point"),
    "swapped axis": (swapped_axis, "axis"),
    "changed weight": (changed_weight, "weight"),
    "changed bias": (changed_bias, "bias"),
    "input without Q": (input_without_q, "float"),
    "weight without Q": (weight_without_q, "float"),
    "unfused add": (unfused_add, "placement"),
}


def graphs_of(subject: Subject) -> tuple[Path, Path, Decisions]:
    """A sound graph, one whose sums saturate, and what both were written from."""
    plan, native = subject.prepared.plan, subject.template
    amax = subject.amax(subject.histograms(), "cpu", "percentile")
    biases = corrected_biases(native, plan=plan, means=subject.means, trial=0)
    saturating = subject.graph(amax, "cpu", "native", biases)
    subject.template = subject.directory / "portable_template.onnx"
    limit_pair_sums(native, subject.template, plan=plan)
    sound = subject.graph(amax, "cpu", "sound", biases)
    return sound, saturating, Decisions(plan=plan, dialect="cpu", amax=amax, biases=biases)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="layers per kind of fault")
    options = parser.parse_args()
    subject = temporary_subject(options)
    sound, saturating, decided = graphs_of(subject)
    images, _ = subject.images("val", IMAGES)
    engine, fp32 = open_engine("openvino", threads=0), subject.files["fp32_onnx"]

    def logits(graph: Path, precision: str) -> np.ndarray:
        runner = open_reference(threads=0) if precision == "fp32" else engine
        found = runner.logits(graph, [images], precision=precision, batch_size=len(images), float_remainder="fp32")
        return np.concatenate(list(found))

    exact = logits(fp32, "fp32")

    def looked_at(graph: Path) -> Parting | None:
        difference = difference_in_file(graph, fp32, decided)
        if difference is not None:
            return difference
        return measure_parity(
            graph, images, fp32_logits=exact, engine_logits=logits(graph, "int8"), engine=engine, threads=0,
            batch_size=len(images), float_remainder="fp32",
        ).parting  # fmt: skip

    rows = []

    def note(fault: str, graph: Path, layers: tuple[str, ...], cause: str) -> None:
        found = looked_at(graph)
        named = found is not None and found.cause == cause and (not layers or found.layer in layers)
        rows.append({
            "fault": fault, "at": list(layers), "named": named, "layer": found.layer if found else "",
            "cause": found.cause if found else "", "says": found.sentence if found else "",
        })  # fmt: skip
        print(json.dumps(rows[-1]))

    for name, (seed_fault, cause) in FAULTS.items():
        for seed in range(options.seeds):
            model = onnx.load(sound)
            layers = seed_fault(model, decided, np.random.default_rng(seed))
            path = subject.directory / "faulty.onnx"
            onnx.save(model, path)
            note(name, path, layers, cause)
    if adds_in_16_bits(current_isa()):
        note("saturation", saturating, (), "saturation")
    alarm = looked_at(sound)
    found = {
        "isa": current_isa(),
        "alarm_on_sound_graph": alarm.sentence if alarm else "",
        "named": sum(row["named"] for row in rows),
        "faults": len(rows),
        "rows": rows,
    }
    print(
        f"{found['named']} of {found['faults']} named; the sound graph: {found['alarm_on_sound_graph'] or 'no alarm'}"
    )
    write_result(options, "parity_faults", found)


if __name__ == "__main__":
    main()
