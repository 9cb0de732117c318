"""Stages that decide on a model, publish it and tell people about it."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from prefect import runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ptq.config import PtqConfig
from ptq.evaluation import gate
from ptq.records.base import ArtifactRef
from ptq.records.benchmark import BenchmarkRecord
from ptq.records.decision import GateDecision, Publication, RunDecision, RunFindings, RunResult
from ptq.records.evaluation import EvaluationRecord, IsaEvaluations, Selection
from ptq.records.graph import GraphChecks
from ptq.records.parity import ParityRecord
from ptq.report.deliver import build_report, check_output_directory, deliver, lineage
from ptq.storage.store import open_store
from tasks.runtime.context import RunContext
from tasks.runtime.stage import stage


@task(timeout_seconds=60, cache_policy=NO_CACHE)
def check_destinations(config: PtqConfig) -> None:
    """Make sure that the store and the output folder can be written before anything is computed."""
    store = open_store(config.output.store)
    check_output_directory(Path(config.output.directory))
    get_run_logger().info("Store %s, output folder %s", store.uri, Path(config.output.directory).absolute())


@stage(
    returns=GateDecision,
    timeout_seconds=60,
    uses=(
        "config.data.test_split",
        "config.gate.max_drop_pp",
        "config.gate.min_speedup_fp16",
        "config.gate.min_speedup_fp32",
    ),
)
def decide(
    selection: Selection,
    benchmark: BenchmarkRecord,
    checks: Sequence[GraphChecks],
    parity: ParityRecord,
    isas: IsaEvaluations | None,
    baseline: EvaluationRecord,
    *,
    run: RunContext,
) -> GateDecision:
    """Accept or reject the chosen candidate."""
    limits = run.config.gate
    decision = gate.decide(
        comparison=selection.comparison,
        benchmark=benchmark,
        graph_errors=sum(check.errors for check in checks),
        parity=parity,
        isas=isas.found if isas else (),
        fp32_top1_percent=baseline.on(run.config.data.test_split).top1_percent,
        max_drop_pp=limits.max_drop_pp,
        min_speedup_fp32=limits.min_speedup_fp32,
        min_speedup_fp16=limits.min_speedup_fp16,
    )
    log = get_run_logger().info if decision.accepted else get_run_logger().warning
    log("%s: %s", "Accepted" if decision.accepted else "Rejected", " ".join(decision.reasons))
    return decision


@task(timeout_seconds=300, cache_policy=NO_CACHE)
def publish(findings: RunFindings, *, run: RunContext) -> Publication:
    """Move `models/<name>/latest.json` to the accepted graph; a graph that is latest already stays."""
    store = run.store
    version, name = findings.graphs[0].onnx.sha256[:16], run.config.model.published_name
    entry = lineage(store, run.config, findings, run_id=run.run_id)
    entry["published_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    latest = store.latest(name)
    is_new = latest is None or latest["version"] != version
    replaced = store.publish(name, version, entry)
    get_run_logger().info("Published %s version %s, replacing %s", name, version, replaced or "nothing")
    return Publication(published=True, model=name, version=version, replaced=replaced, is_new=is_new)


@task(timeout_seconds=600, cache_policy=NO_CACHE)
def write_report(findings: RunFindings, *, run: RunContext) -> RunResult:
    """Write verdict, report, tables and graphs into the output folder and show them on the run's page."""
    store, config = run.store, run.config
    report = build_report(store, config, findings, run_id=run.run_id)
    verdict: ArtifactRef = deliver(store, config, findings, report)
    create_markdown_artifact(key="ptq-verdict", markdown=report.page_markdown, description="Verdict and report")
    create_table_artifact(key="ptq-results", table=report.result_rows, description="One row per candidate")
    create_table_artifact(key="ptq-graph-checks", table=report.check_rows, description="Findings of the graph checks")
    get_run_logger().info(report.sentence)
    return RunResult(
        run_id=run.run_id,
        accepted=findings.decision.accepted,
        reasons=findings.decision.reasons,
        output_directory=str(Path(config.output.directory).absolute()),
        verdict=verdict,
        model=config.model.published_name,
        version=findings.graphs[0].onnx.sha256[:16],
        decision=_decision(findings),
        sentence=report.sentence,
        top1_percent=report.verdict.best.top1_percent,
        drop_pp=report.verdict.best.drop_pp,
        is_new=findings.publication.is_new,
        page=runtime.flow_run.ui_url or "",
    )


def _decision(findings: RunFindings) -> RunDecision:
    if findings.decision.accepted:
        return "accept"
    return (
        findings.versus_published.decision
        if findings.versus_published and findings.versus_published.decision != "accept"
        else "reject"
    )
