"""Stages that hold a new model against the version in service."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ptq.config import BenchmarkConfig, GateConfig
from ptq.evaluation import versus_published
from ptq.evaluation.benchmark import LoadedEngine, measure_against
from ptq.evaluation.predictions import tables_from_parquet
from ptq.evaluation.selection import compared_images
from ptq.evaluation.versus_published import published_version
from ptq.numerics.paired_test import paired_comparison
from ptq.records.base import ArtifactRef
from ptq.records.benchmark import PublishedLatency
from ptq.records.calibration import AmaxRecord
from ptq.records.decision import GateDecision, PublishedComparison, PublishedModel
from ptq.records.evaluation import EvaluationRecord
from ptq.records.graph import EngineRecord, GraphRecord
from ptq.records.plan import ModelRecord
from ptq.storage.store import open_store
from tasks.runtime.stage import RunContext, stage


@task(timeout_seconds=120, cache_policy=NO_CACHE)
def find_published(
    published_name: str, model: ModelRecord, graph: GraphRecord, *, run: RunContext
) -> PublishedModel | None:
    """Find the published version that this graph would replace; None where there is none, or where it is this one."""
    published = published_version(
        open_store(run.store_uri), published_name, onnx_sha256=graph.onnx.sha256, dialect=graph.dialect,
        input_shape=model.input_shape, num_classes=model.num_classes,
    )  # fmt: skip
    if published is not None:
        get_run_logger().info("In service is %s version %s %s", published_name, published.version, published.obstacle)
    return published


@stage(returns=tuple[PublishedLatency, ...], timeout_seconds=4 * 3600, machine="whole")
def benchmark_published(
    new: Sequence[EngineRecord],
    published: Sequence[EngineRecord],
    config: BenchmarkConfig,
    *,
    threads: int,
    float_remainder: Literal["fp32", "bf16"],
    input_shape: tuple[int, int, int],
    run: RunContext,
) -> tuple[PublishedLatency, ...]:
    """Measure the INT8 engines of the new model and of the version in service in turns."""
    store = open_store(run.store_uri)
    loaded = [[LoadedEngine(record, store.get_path(record.blob)) for record in records] for records in (new, published)]
    found = measure_against(
        loaded[0], loaded[1], threads=threads, float_remainder=float_remainder, input_shape=input_shape,
        warmup_ms=config.warmup_ms, duration_s=config.duration_s, min_iterations=config.min_iterations,
        rounds=config.rounds,
    )  # fmt: skip
    for item in found:
        get_run_logger().info(
            "Batch %d: %.3f ms, in service %.3f ms", item.batch_size, item.new_median_ms, item.published_median_ms
        )
    return found


@stage(returns=PublishedComparison, timeout_seconds=600)
def compare_with_published(
    published: PublishedModel,
    amax: AmaxRecord,
    evaluations: Mapping[Literal["new", "published"], EvaluationRecord],
    latencies: Sequence[PublishedLatency],
    config: GateConfig,
    *,
    test_split: str,
    run: RunContext,
) -> PublishedComparison:
    """Compare accuracy, latency and amax with the version in service; evaluations are empty where that cannot be."""
    if not evaluations or published.amax is None:
        found = versus_published.incomparable(published)
    else:
        found = _compared(published.version, published.amax, amax, evaluations, latencies, config, test_split, run)
    log = get_run_logger().info if found.decision == "accept" else get_run_logger().warning
    log("Against version %s in service: %s. %s", published.version, found.decision, " ".join(found.reasons))
    return found


def _compared(
    version: str,
    published_amax: ArtifactRef,
    amax: AmaxRecord,
    evaluations: Mapping[Literal["new", "published"], EvaluationRecord],
    latencies: Sequence[PublishedLatency],
    config: GateConfig,
    test_split: str,
    run: RunContext,
) -> PublishedComparison:
    store = open_store(run.store_uri)
    tables = {name: tables_from_parquet(store.get_path(found.predictions)) for name, found in evaluations.items()}
    images = compared_images(tables["published"], tables["new"], split=test_split)
    return versus_published.compare(
        version=version,
        published_top1_percent=evaluations["published"].on(test_split).top1_percent,
        new_top1_percent=evaluations["new"].on(test_split).top1_percent,
        paired=paired_comparison(images.fp32_predictions, images.int8_predictions, images.labels),
        latencies=latencies,
        published_amax=json.loads(store.get_bytes(published_amax)),
        new_amax=json.loads(store.get_bytes(amax.table)),
        max_regression_pp=config.max_regression_pp,
        max_slowdown=config.max_slowdown,
    )


@stage(returns=GateDecision, timeout_seconds=60)
def decide_on_published(
    decision: GateDecision, comparison: PublishedComparison, *, publish_inconclusive: bool, run: RunContext
) -> GateDecision:
    """Accept what the gate accepted unless it is worse than the version in service."""
    return versus_published.held_against(decision, comparison, publish_inconclusive=publish_inconclusive)
