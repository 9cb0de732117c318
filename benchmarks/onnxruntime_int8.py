"""What is ONNX Runtime's INT8 worth with graphs of the dialect `onnxruntime`?

From one calibration: our graph of that dialect, our graph of the `cpu` dialect on the same runtime, what
`onnxruntime.quantization.quantize_static` makes of the same FP32 file and images (Q/DQ, per channel, either type of
activations, `reduce_range` where the processor has no VNNI), and our `cpu` dialect on OpenVINO. For each: the
convolutions and additions that run on integers, read from the optimised graph, latency over FP32 of the same runtime at
batch 1 and 32 by turns, and what it loses.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.engines import open_engine
from ptq.engines.base import Engine, Runner
from ptq.engines.isa import adds_in_16_bits
from ptq.graph.pair_sums import limit_pair_sums
from ptq.numerics.metrics import sqnr_db
from ptq.numerics.paired_test import paired_comparison
from ptq.numerics.saturation import Runtime

BATCH = 20
BATCH_SIZES = (1, 32)
TURNS = 20
METHOD, PERCENTILE = "percentile", 99.99


def ours(subject: Subject) -> dict[str, Path]:
    """The graphs of both dialects, portable weights of each runtime, biases corrected."""
    histograms, native = subject.histograms(), subject.template
    found = {}
    runtimes: dict[str, Runtime] = {"cpu": "openvino", "onnxruntime": "onnxruntime"}
    for dialect, runtime in runtimes.items():
        subject.template = subject.directory / f"{dialect}_template.onnx"
        limit_pair_sums(native, subject.template, plan=subject.prepared.plan, runtimes=[runtime])
        amax = subject.amax(histograms, dialect, METHOD, PERCENTILE)
        found[dialect] = subject.graph(amax, dialect, f"ours_{dialect}", subject.biases())
    return found


def theirs(subject: Subject, *, reduce_range: bool) -> dict[str, Path]:
    """What quantize_static makes of the FP32 file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inputs = subject.calibration_inputs()

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    plain = subject.directory / "preprocessed.onnx"
    quant_pre_process(str(subject.files["fp32_onnx"]), str(plain))
    found = {}
    for name, activation in (("uint8", QuantType.QUInt8), ("int8", QuantType.QInt8)):
        path = subject.directory / f"quantize_static_{name}.onnx"
        quantize_static(
            str(plain), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            weight_type=QuantType.QInt8, activation_type=activation, reduce_range=reduce_range,
        )  # fmt: skip
        found[f"quantize_static, {name}"] = path
    return found


def shares(engine: Engine, graph: Path) -> dict[str, int]:
    """Convolutions and additions of the optimised graph, and how many of them run on integers."""
    layers = engine.build(graph, precision="int8", batch_size=1, float_remainder="fp32").layers
    convolutions = [layer.input_type for layer in layers if layer.kind == "convolution"]
    return {
        "convolutions": len(convolutions),
        "int8_convolutions": sum(kind != "fp32" for kind in convolutions),
        "adds": sum(layer.kernel in ("Add", "QLinearAdd") for layer in layers),
        "int8_adds": sum(layer.kernel == "QLinearAdd" for layer in layers),
    }


def runner(engine: Engine, graph: Path, precision: str, batch_size: int) -> Runner:
    built = engine.build(graph, precision=precision, batch_size=batch_size, float_remainder="fp32")
    return engine.load(built.blob, precision=precision, batch_size=batch_size, float_remainder="fp32")


def ratios(candidates: dict[str, tuple[Engine, Path]], fp32: Path, image: np.ndarray, batch_size: int) -> dict:
    """Median latency of each at a batch size, and FP32 of its runtime over it, by turns."""
    images = np.repeat(image, batch_size, axis=0)
    engines = {engine.identity().name: engine for engine, _ in candidates.values()}
    runners = {name: runner(engine, fp32, "fp32", batch_size) for name, engine in engines.items()}
    runners |= {name: runner(*each, "int8", batch_size) for name, each in candidates.items()}
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(TURNS):
        for name, each in runners.items():
            samples, _ = each.timed_calls(images, warmup_ms=20, duration_s=0.2, min_iterations=3)
            taken[name].append(float(np.median(samples)))
    found = {}
    for name, (engine, _) in candidates.items():
        base = taken[engine.identity().name]
        speedup = [one / other for one, other in zip(base, taken[name], strict=True)]
        found[name] = {"latency_ms": float(np.median(taken[name])), "speedup_over_fp32": float(np.median(speedup))}
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--splits", nargs="+", default=["val", "test"], help="splits on whose images all are compared")
    options = parser.parse_args()
    subject = temporary_subject(options, whole_operators=True)
    parts = [subject.images(split, 10**9) for split in options.splits]
    inputs, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    runtime, openvino = (open_engine(name, threads=0) for name in ("onnxruntime", "openvino"))
    isa = runtime.identity().isa
    graphs = ours(subject)
    candidates = {
        "ours, onnxruntime": (runtime, graphs["onnxruntime"]),
        "ours, cpu": (runtime, graphs["cpu"]),
        **{name: (runtime, path) for name, path in theirs(subject, reduce_range=adds_in_16_bits(isa)).items()},
        "ours, cpu, on OpenVINO": (openvino, graphs["cpu"]),
    }

    def logits(engine: Engine, graph: Path, precision: str) -> np.ndarray:
        batches = (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))
        found = engine.logits(graph, batches, precision=precision, batch_size=BATCH, float_remainder="fp32")
        return np.concatenate(list(found))

    exact = logits(runtime, subject.files["fp32_onnx"], "fp32")
    rows = []
    for name, (engine, graph) in candidates.items():
        found = logits(engine, graph, "int8")
        comparison = paired_comparison(exact.argmax(1), found.argmax(1), labels)
        rows.append({
            "graph": name, "isa": isa, **(shares(engine, graph) if engine is runtime else {}),
            "drop_pp": comparison.drop_pp, "drop_interval_pp": comparison.drop_interval_pp,
            "agreement_percent": 100 * float(np.mean(exact.argmax(1) == found.argmax(1))),
            "sqnr_db": sqnr_db(exact, found),
        })  # fmt: skip
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()})
    for batch_size in BATCH_SIZES:
        for name, found in ratios(candidates, subject.files["fp32_onnx"], inputs[:1], batch_size).items():
            next(row for row in rows if row["graph"] == name)[f"batch_{batch_size}"] = found
            print(name, batch_size, found)
    write_result(options, "onnxruntime_int8", {"images": len(labels), "rows": rows})


if __name__ == "__main__":
    main()
