"""What does placement buy on this machine?

FP32, BF16 where the processor has it, and INT8 with quantizers on convolutions only, plus residuals, plus average
pools and before max pools, in both dialects, at batch 1 and 32, interleaved in one run on OpenVINO.
"""

from benchmarks.subject import arguments, temporary_subject, write_result
from ptq.config import QuantizationConfig
from ptq.engines import open_engine
from ptq.evaluation.benchmark import measure_files

PLACEMENTS = {
    "layers_only": QuantizationConfig(residuals=False, pools=False, commuting_pools=False),
    "plus_residuals": QuantizationConfig(pools=False, commuting_pools=False),
    "full": QuantizationConfig(),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--duration", type=float, default=5.0, help="seconds per graph and batch size")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    engine = open_engine("openvino", threads=0)
    graphs = []
    for placement, quantization in PLACEMENTS.items():
        subject = temporary_subject(options, quantization)
        if not graphs:
            fp32 = subject.prepared.files["fp32_onnx"]
            graphs += [(fp32, precision) for precision in engine.precisions() if precision != "int8"]
        histograms = subject.histograms()
        for dialect in ("tensorrt", "cpu"):
            amax = subject.amax(histograms, dialect, "percentile")
            graphs.append((subject.graph(amax, dialect, f"{dialect}_{placement}"), "int8"))
    plan = [(path, precision, batch) for batch in (1, 32) for path, precision in graphs]
    results = measure_files(plan, engine=engine, duration_s=options.duration, rounds=options.rounds)
    found = []
    reference = {r.measurement.batch_size: r.measurement for r in results if r.measurement.precision == "fp32"}
    for result in results:
        item = result.measurement
        speedup = reference[item.batch_size].median_ms / item.median_ms
        found.append(
            {
                "graph": result.file, "precision": item.precision, "batch_size": item.batch_size,
                "median_ms": item.median_ms, "p90_ms": item.p90_ms, "rounds_median_ms": item.rounds_median_ms,
                "times_fp32": speedup, "int8_input_percent": result.int8.int8_input_percent,
                "int8_output_percent": result.int8.int8_output_percent, "reformats": result.int8.reformats,
            }
        )  # fmt: skip
        print(
            f"{result.file:32} {item.precision:5} batch {item.batch_size:2}: {item.median_ms:9.3f} ms, "
            f"{speedup:5.2f} x FP32, "
            f"INT8 in {result.int8.int8_input_percent:5.1f} %, out {result.int8.int8_output_percent:5.1f} %, "
            f"{result.int8.reformats} reformats"
        )
    write_result(options, "placement_speed", found)


if __name__ == "__main__":
    main()
