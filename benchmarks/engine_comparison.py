"""Is an engine's INT8 fast, what does it run in INT8, and does it predict what the other engines predict?

Measures one checkpoint on one engine, TensorRT on a GPU machine above all: every precision at batch 1 and 32 in turns,
what the engine says each layer runs in, and top-1 on the test split beside ONNX Runtime's and OpenVINO's on the same
Q/DQ graph. All of it in one run, written as JSON.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subject import Subject, arguments, temporary_subject, write_result
from ptq.config import Precision, QuantizationConfig
from ptq.engines import int8_share, open_engine
from ptq.engines.base import Engine
from ptq.evaluation.benchmark import measure_files
from ptq.numerics.metrics import cosine_per_image, sqnr_db
from ptq.numerics.paired_test import paired_comparison
from ptq.records.base import to_jsonable

BATCHES = (1, 32)


def main() -> None:
    """Measures and writes the result."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--engine", default="auto", help="auto, tensorrt, openvino")
    parser.add_argument("--duration", type=float, default=5.0, help="seconds per graph and batch size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--percentile", type=float, default=99.95)
    options = parser.parse_args()
    engine = open_engine(options.engine, threads=0)
    identity = engine.identity()
    options.name = f"{identity.name}_{options.name or options.model}"
    subject = temporary_subject(options, QuantizationConfig())
    dialect = "tensorrt" if identity.name == "tensorrt" else "cpu"
    amax = subject.amax(subject.histograms(), dialect, "percentile", options.percentile)
    int8 = subject.graph(amax, dialect, "int8", subject.biases())
    graphs: dict[Precision, Path] = {
        precision: int8 if precision == "int8" else subject.files["fp32_onnx"] for precision in engine.precisions()
    }
    found = {
        "engine": to_jsonable(identity),
        "inspected": [inspected(engine, graphs[name], name, batch) for batch in BATCHES for name in graphs],
        "latency": latencies(engine, graphs, options),
        "accuracy": accuracy(subject, engine, graphs, options.test_images),
    }
    for row in found["latency"]:
        print(row)
    for row in found["accuracy"]:
        print(row)
    write_result(options, "engine_comparison", found)


def inspected(engine: Engine, graph: Path, precision: Precision, batch: int) -> dict[str, Any]:
    """Returns what the engine says of the graph it built."""
    built = engine.build(graph, precision=precision, batch_size=batch, float_remainder="fp32")
    share = int8_share(built.layers)
    types = Counter(f"{layer.kind}: {layer.input_type} to {layer.output_type}" for layer in built.layers)
    return {
        "precision": precision, "batch_size": batch, "build_s": round(built.build_s, 2),
        "size_bytes": len(built.blob), "settings": list(built.settings), "int8": to_jsonable(share),
        "layers": dict(types.most_common()),
    }  # fmt: skip


def latencies(engine: Engine, graphs: dict[Precision, Path], options: Any) -> list[dict[str, Any]]:
    """Returns the latencies of every precision, those of one batch size in turns."""
    plan = [(path, precision, batch) for batch in BATCHES for precision, path in graphs.items()]
    results = measure_files(plan, engine=engine, duration_s=options.duration, rounds=options.rounds)
    fp32 = {item.measurement.batch_size: item.measurement for item in results if item.measurement.precision == "fp32"}
    return [
        {
            "precision": item.precision, "batch_size": item.batch_size, "median_ms": round(item.median_ms, 4),
            "p90_ms": round(item.p90_ms, 4), "p99_ms": round(item.p99_ms, 4),
            "images_per_s": round(item.throughput_images_per_s, 1), "rounds_median_ms": item.rounds_median_ms,
            "over_fp32": round(item.median_ms / fp32[item.batch_size].median_ms, 4),
        }
        for item in (result.measurement for result in results)
    ]  # fmt: skip


def accuracy(subject: Subject, engine: Engine, graphs: dict[Precision, Path], count: int) -> list[dict[str, Any]]:
    """Returns top-1 of every precision on the engine, and of the INT8 graph on the other engines."""
    inputs, labels = subject.images("test", count)
    own = engine.identity().name
    runs: list[tuple[str, Engine, Precision]] = [(own, engine, precision) for precision in graphs]
    others = [name for name in ("onnxruntime", "openvino") if name != own]
    runs += [(name, open_engine(name, threads=0), "int8") for name in others]
    logits = {
        (name, precision): logits_of(each, graphs[precision], precision, inputs) for name, each, precision in runs
    }
    baseline, int8 = logits[own, "fp32"], logits[own, "int8"]
    rows = []
    for (name, precision), values in logits.items():
        paired = paired_comparison(baseline.argmax(1), values.argmax(1), labels)
        rows.append(
            {
                "engine": name, "precision": precision, "images": len(labels),
                "top1_percent": round(100 * float((values.argmax(1) == labels).mean()), 3),
                "drop_pp": round(paired.drop_pp, 3),
                "drop_interval_pp": [round(end, 2) for end in paired.drop_interval_pp],
                "agreement_with_fp32_percent": round(100 * float((values.argmax(1) == baseline.argmax(1)).mean()), 2),
                "sqnr_db": round(sqnr_db(baseline, values), 2) if values is not baseline else None,
                "agreement_with_own_int8_percent": round(100 * float((values.argmax(1) == int8.argmax(1)).mean()), 2),
                "cosine_with_own_int8_min": round(float(cosine_per_image(int8, values).min()), 6),
            }
        )  # fmt: skip
    return rows


def logits_of(engine: Engine, graph: Path, precision: Precision, inputs: np.ndarray) -> np.ndarray:
    """Returns the logits of all images, 32 at a time."""
    batches = (inputs[start : start + 32] for start in range(0, len(inputs), 32))
    found = engine.logits(graph, batches, precision=precision, batch_size=32, float_remainder="fp32")
    return np.concatenate(list(found))


if __name__ == "__main__":
    main()
