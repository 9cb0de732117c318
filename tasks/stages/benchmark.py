"""Stages that measure latency and throughput."""

from collections.abc import Sequence
from typing import Any

from prefect.logging import get_run_logger

from ptq.evaluation.benchmark import LoadedEngine, measure_against, measure_engines
from ptq.records.benchmark import BenchmarkRecord, PublishedLatency
from ptq.records.graph import EngineRecord
from tasks.runtime.context import RunContext
from tasks.runtime.stage import stage

_USED = ("config.benchmark", "config.engine.float_remainder", "input_shape", "threads")


@stage(returns=BenchmarkRecord, timeout_seconds=4 * 3600, uses=_USED, machine="whole")
def benchmark(engines: Sequence[EngineRecord], *, run: RunContext) -> BenchmarkRecord:
    """Measure every built engine, precisions interleaved, on the machine this runs on."""
    record = measure_engines(_loaded(engines, run), **_settings(run))
    for measured in record.measurements:
        get_run_logger().info(
            "%s batch %d: median %.3f ms, %.0f images/s",
            measured.precision,
            measured.batch_size,
            measured.median_ms,
            measured.throughput_images_per_s,
        )
    for warning in (*record.red_flags, *record.warnings):
        get_run_logger().warning(warning)
    return record


@stage(returns=tuple[PublishedLatency, ...], timeout_seconds=4 * 3600, uses=_USED, machine="whole")
def benchmark_published(
    new: Sequence[EngineRecord], published: Sequence[EngineRecord], *, run: RunContext
) -> tuple[PublishedLatency, ...]:
    """Measure the INT8 engines of the new model and of the version in service in turns."""
    found = measure_against(_loaded(new, run), _loaded(published, run), **_settings(run))
    for item in found:
        get_run_logger().info(
            "Batch %d: %.3f ms, in service %.3f ms", item.batch_size, item.new_median_ms, item.published_median_ms
        )
    return found


def _loaded(engines: Sequence[EngineRecord], run: RunContext) -> list[LoadedEngine]:
    return [LoadedEngine(record, run.store.get_path(record.blob)) for record in engines]


def _settings(run: RunContext) -> dict[str, Any]:
    """How both measure, as arguments of `measure_engines`."""
    measured = run.config.benchmark.model_dump(exclude={"batch_sizes"})
    remainder = run.config.engine.float_remainder
    return {**measured, "threads": run.threads, "float_remainder": remainder, "input_shape": run.input_shape}
