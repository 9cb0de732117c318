"""What does an INT8 model lose under each instruction set, with scales that cannot saturate and without?

One graph each of `portable` and `native` weights, from one calibration, with biases corrected for its own weights. Each
is run by OpenVINO in a process of its own per instruction set, to which `ONEDNN_MAX_CPU_ISA` limits the kernels, and by
ONNX Runtime in float, which is what the file says. Latencies at batch 1 are taken by turns.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.calibration.calibrate import corrected_biases
from ptq.engines import open_engine
from ptq.engines.isa import current_isa, playable_isas
from ptq.graph.pair_sums import limit_pair_sums
from ptq.numerics.metrics import sqnr_db
from ptq.numerics.paired_test import paired_comparison

BATCH = 20
TURNS = 20


def run(graphs: list[Path], inputs: Path, folder: Path) -> None:
    """In a process of its own: the logits of every graph, and latencies at batch 1 by turns."""
    engine = open_engine("openvino", threads=0)
    images = np.load(inputs, mmap_mode="r")
    runners = []
    for graph in graphs:
        batches = (np.array(images[start : start + BATCH]) for start in range(0, len(images), BATCH))
        found = engine.logits(graph, batches, precision="int8", batch_size=BATCH, float_remainder="fp32")
        np.save(folder / f"{graph.stem}.npy", np.concatenate(list(found)))
        built = engine.build(graph, precision="int8", batch_size=1, float_remainder="fp32")
        runners.append(engine.load(built.blob, precision="int8", batch_size=1, float_remainder="fp32"))
    one = np.array(images[:1])
    turns = [
        [float(np.median(runner.timed_calls(one, warmup_ms=50, duration_s=0.3, min_iterations=10)[0]))
         for runner in runners]
        for _ in range(TURNS)
    ]  # fmt: skip
    (folder / "ran.json").write_text(json.dumps({"isa": current_isa(), "latency_ms": turns}))


def graphs_of(subject: Subject) -> list[Path]:
    """The two graphs, percentile 99.99 in the cpu dialect."""
    amax = subject.amax(subject.histograms(), "cpu", "percentile")
    native = subject.template
    portable = subject.directory / "portable_template.onnx"
    grown = limit_pair_sums(native, portable, plan=subject.prepared.plan)
    print(f"{grown.grown} of {grown.scales} scales grew, in {grown.layers} layers, by up to {grown.largest_factor:.2f}")
    found = []
    for name, template in (("native", native), ("portable", portable)):
        subject.template = template
        biases = corrected_biases(template, plan=subject.prepared.plan, means=subject.means, trial=0)
        found.append(subject.graph(amax, "cpu", name, biases))
    return found


def under(isa: str, graphs: list[Path], inputs: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What a process says that is limited to an instruction set, and the logits of every graph."""
    folder = inputs.parent / isa
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "benchmarks.instruction_sets",
        "--run",
        *map(str, graphs),
        str(inputs),
        str(folder),
    ]
    subprocess.run(command, check=True, env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa.upper()})
    logits = {graph.stem: np.load(folder / f"{graph.stem}.npy") for graph in graphs}
    return json.loads((folder / "ran.json").read_text()), logits


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        *graphs, inputs, folder = map(Path, sys.argv[2:])
        run(graphs, inputs, folder)
        return
    parser = arguments(__doc__)
    parser.add_argument("--splits", nargs="+", default=["val", "test"], help="splits on whose images all are compared")
    parser.add_argument("--isas", nargs="+", default=list(playable_isas()))
    options = parser.parse_args()
    subject = temporary_subject(options)
    splits = [subject.images(split, 10**9) for split in options.splits]
    inputs, labels = (np.concatenate(parts) for parts in zip(*splits, strict=True))
    np.save(subject.directory / "inputs.npy", inputs)
    graphs = graphs_of(subject)

    def in_float(graph: Path, precision: str) -> np.ndarray:
        batches = (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))
        engine = open_engine("onnxruntime", threads=0)
        return np.concatenate(
            list(engine.logits(graph, batches, precision=precision, batch_size=BATCH, float_remainder="fp32"))
        )

    fp32 = in_float(subject.files["fp32_onnx"], "fp32")
    reference = {graph.stem: in_float(graph, "int8") for graph in graphs}
    rows = []
    for isa in options.isas:
        ran, logits = under(isa, graphs, subject.directory / "inputs.npy")
        for position, (name, found) in enumerate(logits.items()):
            comparison = paired_comparison(fp32.argmax(1), found.argmax(1), labels)
            rows.append({
                "isa": ran["isa"], "weights": name, "drop_pp": comparison.drop_pp,
                "drop_interval_pp": comparison.drop_interval_pp,
                "agreement_percent": 100 * float(np.mean(fp32.argmax(1) == found.argmax(1))),
                "engine_db": sqnr_db(fp32, found), "reference_db": sqnr_db(fp32, reference[name]),
                "engine_to_reference_db": sqnr_db(reference[name], found),
                "latency_ms": float(np.median([turn[position] for turn in ran["latency_ms"]])),
                "over_native": float(np.median([turn[position] / turn[0] for turn in ran["latency_ms"]])),
            })  # fmt: skip
            print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()})
    write_result(options, "instruction_sets", {"images": len(labels), "rows": rows})


if __name__ == "__main__":
    main()
