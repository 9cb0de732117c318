"""Stages that hold a new model against the version in service."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ptq.evaluation import versus_published
from ptq.evaluation.predictions import tables_from_parquet
from ptq.evaluation.selection import compared_images
from ptq.evaluation.versus_published import published_version
from ptq.numerics.paired_test import paired_comparison
from ptq.records.base import ArtifactRef
from ptq.records.benchmark import PublishedLatency
from ptq.records.calibration import AmaxRecord
from ptq.records.decision import GateDecision, PublishedComparison, PublishedModel
from ptq.records.evaluation import EvaluationRecord
from ptq.records.graph import GraphRecord
from ptq.records.plan import ModelRecord
from tasks.runtime.context import RunContext
from tasks.runtime.stage import stage


@task(timeout_seconds=120, cache_policy=NO_CACHE)
def find_published(model: ModelRecord, graph: GraphRecord, *, run: RunContext) -> PublishedModel | None:
    """Find the published version that this graph would replace; None where there is none, or where it is this one."""
    name = run.config.model.published_name
    published = published_version(
        run.store,
        name,
        onnx_sha256=graph.onnx.sha256,
        dialect=graph.dialect,
        input_shape=model.input_shape,
        num_classes=model.num_classes,
    )
    if published is not None:
        get_run_logger().info("In service is %s version %s %s", name, published.version, published.obstacle)
    return published


@stage(
    returns=PublishedComparison,
    timeout_seconds=600,
    uses=("config.data.test_split", "config.gate.max_regression_pp", "config.gate.max_slowdown"),
)
def compare_with_published(
    published: PublishedModel,
    amax: AmaxRecord,
    evaluations: Mapping[Literal["new", "published"], EvaluationRecord],
    latencies: Sequence[PublishedLatency],
    *,
    run: RunContext,
) -> PublishedComparison:
    """Compare accuracy, latency and amax with the version in service; evaluations are empty where that cannot be."""
    if not evaluations or published.amax is None:
        found = versus_published.incomparable(published)
    else:
        found = _compared(published.version, published.amax, amax, evaluations, latencies, run)
    log = get_run_logger().info if found.decision == "accept" else get_run_logger().warning
    log("Against version %s in service: %s. %s", published.version, found.decision, " ".join(found.reasons))
    return found


def _compared(
    version: str,
    published_amax: ArtifactRef,
    amax: AmaxRecord,
    evaluations: Mapping[Literal["new", "published"], EvaluationRecord],
    latencies: Sequence[PublishedLatency],
    run: RunContext,
) -> PublishedComparison:
    store, test_split, limits = run.store, run.config.data.test_split, run.config.gate
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
        max_regression_pp=limits.max_regression_pp,
        max_slowdown=limits.max_slowdown,
    )


@stage(returns=GateDecision, timeout_seconds=60, uses=("config.gate.publish_inconclusive",))
def decide_on_published(decision: GateDecision, comparison: PublishedComparison, *, run: RunContext) -> GateDecision:
    """Accept what the gate accepted unless it is worse than the version in service."""
    publish_inconclusive = run.config.gate.publish_inconclusive
    return versus_published.held_against(decision, comparison, publish_inconclusive=publish_inconclusive)
