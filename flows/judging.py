"""How a candidate of the main flow is judged: its graphs, its engines, the gate, and the version in service."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ptq.config import Precision, WeightMethod
from ptq.records.base import ArtifactRef
from ptq.records.benchmark import PublishedLatency
from ptq.records.calibration import AmaxRecord, CalibrationDraws
from ptq.records.data import DataRecord, PreparedImages
from ptq.records.decision import Publication, RunFindings
from ptq.records.evaluation import EvaluationRecord, Selection
from ptq.records.graph import EngineRecord
from ptq.records.plan import ModelRecord
from tasks.runtime.context import RunContext
from tasks.stages.benchmark import benchmark, benchmark_published
from tasks.stages.engine import build_engine
from tasks.stages.evaluation import evaluate_published
from tasks.stages.export import export_qdq, limit_pair_sums, write_graph
from tasks.stages.graph_checks import validate_graph
from tasks.stages.model import equalize_channels
from tasks.stages.parity import compare_with_file, evaluate_each_isa
from tasks.stages.publication import decide
from tasks.stages.versus_published import compare_with_published, decide_on_published, find_published


@dataclass(frozen=True, slots=True)
class Judged:
    """What every candidate of a run is judged with. `loaded` is the model before its channels are equalized."""

    run: RunContext
    data: DataRecord
    loaded: ModelRecord
    draws: CalibrationDraws
    images: Mapping[str, PreparedImages]
    baseline: EvaluationRecord


def equalized(model: ModelRecord, reference: ModelRecord, draws: CalibrationDraws, run: RunContext) -> ModelRecord:
    """Equalize channels where the config asks for it, by the ranges that `reference` shows."""
    return equalize_channels(model, reference, draws, run=run) if run.config.quantization.equalization else model


def exported(model: ModelRecord, weight_method: WeightMethod, run: RunContext) -> ArtifactRef:
    """Export the Q/DQ template, its weights fit for every processor where the model is to run on other ones too."""
    template = export_qdq(model, weight_method, run=run)
    return limit_pair_sums(template, model, run=run) if run.limits_pair_sums else template


def judge(
    judged: Judged,
    model: ModelRecord,
    template: ArtifactRef,
    tables: Sequence[AmaxRecord],
    candidates: Sequence[EvaluationRecord],
    selection: Selection,
) -> RunFindings:
    """Write the graphs of the selected candidate, validate them, build engines, benchmark them and decide."""
    run = judged.run
    best = selection.table_among(tables)
    graphs = [write_graph(model, template, best, dialect, run=run) for dialect in run.dialects]
    checks = [validate_graph(model, graph, run=run) for graph in graphs]
    chosen = next(each for each in candidates if each.candidate == selection.candidate)
    parity = compare_with_file(graphs[0], model, best, chosen, judged.baseline, judged.images, run=run)
    engines = [
        _built(graphs[0].onnx if precision == "int8" else judged.loaded.fp32_onnx, precision, batch_size, run)
        for batch_size in run.config.benchmark.batch_sizes
        for precision in run.precisions
    ]
    measured = benchmark(engines, run=run)
    isas = evaluate_each_isa(graphs[0], judged.baseline, judged.images, run=run) if run.evaluates_isas else None
    return RunFindings(
        model=model,
        data=judged.data,
        draws=judged.draws,
        tables=tuple(tables),
        baseline=judged.baseline,
        candidates=tuple(candidates),
        selection=selection,
        graphs=tuple(graphs),
        checks=tuple(checks),
        parity=parity,
        isas=isas.found if isas else (),
        engines=tuple(engines),
        benchmark=measured,
        decision=decide(selection, measured, checks, parity, isas, judged.baseline, run=run),
        publication=Publication(published=False, model=run.config.model.published_name, version="", replaced=""),
    )


def compare_with_version_in_service(judged: Judged, findings: RunFindings) -> RunFindings:
    """Compare an accepted model with the version that it would replace, on the same images and in turns."""
    run = judged.run
    published = find_published(findings.model, findings.graphs[0], run=run)
    if published is None:
        return findings
    amax = findings.selection.table_among(findings.tables)
    evaluations: dict[Literal["new", "published"], EvaluationRecord] = {}
    latencies: Sequence[PublishedLatency] = ()
    if published.onnx is not None:
        test = run.config.data.test_split
        own = findings.selection.candidate
        evaluations["new"] = next(each for each in findings.candidates if each.candidate == own)
        images = {test: judged.images[test]}
        evaluations["published"] = evaluate_published(published.onnx, judged.baseline, images, run=run)
        new = [engine for engine in findings.engines if engine.precision == "int8"]
        old = [_built(published.onnx, "int8", engine.batch_size, run) for engine in new]
        latencies = benchmark_published(new, old, run=run)
    comparison = compare_with_published(published, amax, evaluations, latencies, run=run)
    decision = decide_on_published(findings.decision, comparison, run=run)
    return replace(findings, decision=decision, versus_published=comparison)


def _built(onnx: ArtifactRef, precision: Precision, batch_size: int, run: RunContext) -> EngineRecord:
    """An engine of a graph; what stays in float has another precision in INT8 graphs alone."""
    remainder = run.config.engine.float_remainder if precision == "int8" else "fp32"
    return build_engine(onnx, precision, batch_size, remainder, run=run)
