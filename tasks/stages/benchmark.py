"""The stage that measures latency and throughput."""

from collections.abc import Sequence
from typing import Literal

from prefect.logging import get_run_logger

from ptq.config import BenchmarkConfig
from ptq.evaluation.benchmark import LoadedEngine, measure_engines
from ptq.records.benchmark import BenchmarkRecord
from ptq.records.graph import EngineRecord
from ptq.storage.store import open_store
from tasks.runtime.stage import RunContext, stage


@stage(returns=BenchmarkRecord, timeout_seconds=4 * 3600, machine="whole")
def benchmark(
    engines: Sequence[EngineRecord],
    config: BenchmarkConfig,
    *,
    threads: int,
    float_remainder: Literal["fp32", "bf16"],
    input_shape: tuple[int, int, int],
    run: RunContext,
) -> BenchmarkRecord:
    """Measure every built engine, precisions interleaved, on the machine this runs on."""
    store = open_store(run.store_uri)
    record = measure_engines(
        [LoadedEngine(record, store.get_path(record.blob)) for record in engines],
        threads=threads,
        float_remainder=float_remainder,
        input_shape=input_shape,
        warmup_ms=config.warmup_ms,
        duration_s=config.duration_s,
        min_iterations=config.min_iterations,
        rounds=config.rounds,
    )
    for measured in record.measurements:
        get_run_logger().info(
            "%s batch %d: median %.3f ms, %.0f images/s",
            measured.precision, measured.batch_size, measured.median_ms, measured.throughput_images_per_s,
        )  # fmt: skip
    for warning in (*record.red_flags, *record.warnings):
        get_run_logger().warning(warning)
    return record
