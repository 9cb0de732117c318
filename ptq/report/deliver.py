"""What does a run leave behind for people and programs?

Composes the verdict and the report from a run's findings and writes the output folder, every file complete or
absent. What the documents look like is `report`'s business.
"""

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptq.config import PtqConfig
from ptq.errors import ArtifactError, UsageError
from ptq.evaluation.benchmark import machine_description
from ptq.evaluation.predictions import ClassMetrics, class_metrics, combined_predictions, tables_from_parquet
from ptq.evaluation.versus_published import drift_factor
from ptq.provenance import library_versions, package_digest
from ptq.quantization.prepared import plan_from_file
from ptq.records.base import ArtifactRef, digest, to_jsonable
from ptq.records.calibration import CalibrationDraws
from ptq.records.decision import PublishedComparison, RunFindings
from ptq.records.evaluation import EvaluationRecord
from ptq.records.parity import ParityRecord
from ptq.records.verdict import (
    Verdict,
    VerdictBaseline,
    VerdictBest,
    VerdictCandidate,
    VerdictCoverage,
    VerdictEngine,
    VerdictFile,
    VerdictGraphChecks,
    VerdictInt8,
    VerdictIsa,
    VerdictLatency,
    VerdictMeasurement,
    VerdictParity,
    VerdictPublished,
    VerdictTrial,
)
from ptq.report.charts import report_box_plot_png
from ptq.report.frames import benchmark_table, parquet_from_frame, results_table
from ptq.report.html import html_report
from ptq.report.inputs import ReportInputs, verdict_sentence
from ptq.report.markdown import markdown_report, page_markdown
from ptq.storage.store import Store


@dataclass(frozen=True, slots=True)
class RunReport:
    """The composed documents: file contents by name, and what the run's page shows."""

    sentence: str
    contents: Mapping[str, bytes]
    verdict: Verdict
    page_markdown: str
    result_rows: list[dict[str, Any]]
    check_rows: list[dict[str, Any]]


def check_output_directory(directory: Path) -> None:
    """Creates the output folder.

    Raises:
        UsageError: it cannot be created or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(
            f"output.directory is {directory}, which cannot be written: {error.strerror}. Expected a folder, "
            "existing or new, with write permission; set --output."
        ) from error


def compose_verdict(
    store: Store, config: PtqConfig, findings: RunFindings, *, run_id: str, files: Mapping[str, ArtifactRef]
) -> Verdict:
    """Returns the verdict of a run; `files` are those of the run that are stored already."""
    test = findings.selection.test_split
    comparison = findings.selection.comparison
    chosen = _evaluation_of(findings, findings.selection.candidate).on(test)
    int8 = next(engine.int8 for engine in findings.engines if engine.precision == "int8")
    return Verdict(
        schema_version=1,
        run_id=run_id,
        model=config.model.name,
        checkpoint_sha256=findings.model.checkpoint_sha256,
        config_sha256=digest(config),
        engine=VerdictEngine.model_validate(findings.benchmark.engine),
        fp32=VerdictBaseline.model_validate(findings.baseline.on(test)),
        calibration=_verdict_trials(findings.draws),
        candidates=_verdict_candidates(findings),
        best=VerdictBest(
            id=findings.selection.candidate,
            method=findings.selection.method,
            trial=findings.selection.trial,
            top1_percent=chosen.top1_percent,
            drop_pp=comparison.drop_pp,
            drop_interval_pp=comparison.drop_interval_pp,
            mcnemar_p=comparison.mcnemar_p,
            flipped_images=comparison.flipped,
        ),
        benchmark=tuple(
            VerdictMeasurement(
                precision=measured.precision,
                batch_size=measured.batch_size,
                latency_ms=VerdictLatency.model_validate(measured),
                images_per_s=measured.throughput_images_per_s,
            )
            for measured in findings.benchmark.measurements
        ),
        red_flags=findings.benchmark.red_flags,
        coverage=VerdictCoverage.model_validate(findings.model.coverage),
        int8=VerdictInt8.model_validate(int8),
        graph_checks=VerdictGraphChecks(
            errors=sum(check.errors for check in findings.checks),
            warnings=sum(check.warnings for check in findings.checks),
        ),
        parity=_verdict_parity(findings.parity),
        isas=tuple(
            VerdictIsa(
                isa=each.isa,
                top1_percent=each.metrics.top1_percent,
                drop_pp=findings.baseline.on(test).top1_percent - each.metrics.top1_percent,
                sqnr_db=each.metrics.sqnr_db,
                median_ms=each.median_ms,
            )
            for each in findings.isas
        ),
        gate=findings.decision,
        files={
            name: VerdictFile(uri=store.object_uri(ref), sha256=ref.sha256, size_bytes=ref.size_bytes)
            for name, ref in sorted(files.items())
        },
        in_service=_verdict_published(findings.versus_published),
        versions={"python": platform.python_version(), **library_versions()},
        stage_seconds=_stage_seconds(store, run_id),
    )


def _verdict_parity(parity: ParityRecord) -> VerdictParity:
    parting = parity.parting
    return VerdictParity(
        images=parity.images,
        engine_sqnr_db=parity.engine.sqnr_db,
        file_sqnr_db=parity.file.sqnr_db,
        layer=parting.layer if parting else "",
        cause=parting.cause if parting else None,
    )


def _verdict_published(comparison: PublishedComparison | None) -> VerdictPublished | None:
    if comparison is None:
        return None
    return VerdictPublished(
        version=comparison.version,
        decision=comparison.decision,
        reasons=comparison.reasons,
        top1_percent=comparison.published_top1_percent,
        change_pp=-comparison.paired.drop_pp + 0.0 if comparison.paired else None,
        mcnemar_p=comparison.paired.mcnemar_p if comparison.paired else None,
        latency_ratio={str(item.batch_size): round(item.ratio, 4) for item in comparison.latencies},
        # JSON knows no infinity, which is what a quantizer that was always 0 has.
        amax_factor={item.quantizer: round(min(drift_factor(item), 1e9), 4) for item in comparison.drift},
    )


def _stage_seconds(store: Store, run_id: str) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for note in store.run_stages(run_id):
        seconds[note["stage"]] = round(seconds.get(note["stage"], 0.0) + note["seconds"], 3)
    return seconds


def _evaluation_of(findings: RunFindings, candidate: str) -> EvaluationRecord:
    return next(evaluation for evaluation in findings.candidates if evaluation.candidate == candidate)


def _verdict_trials(draws: CalibrationDraws) -> tuple[VerdictTrial, ...]:
    """The images of every trial, and where their number was adaptive what each layer needed."""
    layers = [length.layers for length in draws.lengths] or [()] * len(draws.indices)
    return tuple(
        VerdictTrial(trial=trial, images=len(draw), layers=needed)
        for trial, (draw, needed) in enumerate(zip(draws.indices, layers, strict=True))
    )


def _verdict_candidates(findings: RunFindings) -> tuple[VerdictCandidate, ...]:
    """One row per trial and method; equal amax tables share one evaluation."""
    test = findings.selection.test_split
    fp32 = findings.baseline.on(test).top1_percent
    evaluated = {evaluation.candidate: evaluation for evaluation in findings.candidates}
    owner: dict[str, str] = {}
    rows = []
    for record in findings.tables:
        name = f"{record.method}-{record.trial}"
        # What was evaluated itself counts as itself: QAT has the amax table of another candidate and other weights.
        source = name if name in evaluated else owner[record.identity]
        owner.setdefault(record.identity, source)
        metrics = evaluated[source].on(test)
        rows.append(
            VerdictCandidate(
                id=name,
                trial=record.trial,
                method=record.method,
                top1_percent=metrics.top1_percent,
                drop_pp=fp32 - metrics.top1_percent,
                loss=metrics.loss,
                same_as="" if source == name else source,
            )
        )
    return tuple(rows)


def build_report(store: Store, config: PtqConfig, findings: RunFindings, *, run_id: str) -> RunReport:
    """Returns every document of a run, composed but not written."""
    graphs = {graph_file_name(findings, index): graph.onnx for index, graph in enumerate(findings.graphs)}
    stored = {"model_fp32.onnx": findings.model.fp32_onnx, **graphs}
    stored |= {record.blob.name: record.blob for record in findings.engines}
    stored |= _tuned_weights(findings)
    evaluations = (findings.baseline, *findings.candidates)
    predictions = combined_predictions({e.candidate: store.get_path(e.predictions) for e in evaluations})
    checks = json.dumps(to_jsonable(findings.checks), indent=1).encode()
    contents = {"predictions.parquet": predictions, "graph_checks.json": checks}
    verdict = compose_verdict(store, config, findings, run_id=run_id, files=stored)
    inputs = report_inputs(store, config, findings, verdict)
    contents |= {
        "results.parquet": parquet_from_frame(results_table(inputs)),
        "benchmark.parquet": parquet_from_frame(benchmark_table(findings.benchmark)),
        "boxplot.png": report_box_plot_png(inputs),
        "report.html": html_report(inputs).encode(),
        "report.md": markdown_report(inputs).encode(),
    }
    stored |= {name: store.put_bytes(data, name) for name, data in contents.items()}
    verdict = compose_verdict(store, config, findings, run_id=run_id, files=stored)
    return RunReport(
        sentence=verdict_sentence(inputs),
        contents=contents,
        verdict=verdict,
        page_markdown=page_markdown(inputs),
        result_rows=json.loads(results_table(inputs).write_json()),
        check_rows=[to_jsonable(finding) for check in findings.checks for finding in check.findings],
    )


def _tuned_weights(findings: RunFindings) -> dict[str, ArtifactRef]:
    """The weights that an accepted QAT has changed, by file name: a checkpoint of the same network."""
    is_tuned = any(attempt.kind == "qat" and attempt.decision.accepted for attempt in findings.attempts)
    return {"weights_qat.safetensors": findings.model.weights} if is_tuned else {}


def lineage(store: Store, config: PtqConfig, findings: RunFindings, *, run_id: str) -> dict[str, Any]:
    """Returns what a published version is and what made it: checkpoint, data, config, code and libraries.

    `objects` are what the version consists of and what its lineage is told from; they are kept as long as the history.
    """
    graph, comparison = findings.graphs[0], findings.selection.comparison
    test = findings.selection.test_split
    objects = {graph_file_name(findings, index): each.onnx for index, each in enumerate(findings.graphs)}
    objects |= {
        "model_fp32.onnx": findings.model.fp32_onnx,
        "amax.json": findings.selection.table,
        "images.parquet": findings.data.table,
        "calibration_images.json": findings.draws.prepared.sha256_of_files,
        "config.json": store.put_bytes(config.model_dump_json().encode(), "config.json"),
        **_tuned_weights(findings),
    }
    return {
        "run_id": run_id,
        "onnx_sha256": graph.onnx.sha256,
        "onnx_size_bytes": graph.onnx.size_bytes,
        "dialect": graph.dialect,
        "network": findings.model.name,
        "checkpoint_sha256": findings.model.checkpoint_sha256,
        "data_sha256": findings.data.table.sha256,
        "config_sha256": digest(config),
        "code_sha256": package_digest(),
        "versions": {"python": platform.python_version(), **library_versions()},
        "method": findings.selection.method,
        "trial": findings.selection.trial,
        "fp32_top1_percent": findings.baseline.on(test).top1_percent,
        "top1_percent": _evaluation_of(findings, findings.selection.candidate).on(test).top1_percent,
        "drop_pp": comparison.drop_pp,
        "test_images": comparison.images,
        "objects": to_jsonable(objects),
    }


def graph_file_name(findings: RunFindings, index: int) -> str:
    """Returns the file name of a run's graph: the evaluated one is `model_int8.onnx`."""
    return "model_int8.onnx" if index == 0 else f"model_int8_{findings.graphs[index].dialect}.onnx"


def report_inputs(store: Store, config: PtqConfig, findings: RunFindings, verdict: Verdict) -> ReportInputs:
    """Returns what the report is rendered from."""
    chosen = _evaluation_of(findings, findings.selection.candidate)
    return ReportInputs(
        verdict=verdict,
        baseline=findings.baseline,
        fp32_by_class=_class_metrics(store, findings, findings.baseline),
        candidates=findings.candidates,
        int8_by_class=_class_metrics(store, findings, chosen),
        selection=findings.selection,
        benchmark=findings.benchmark,
        checks=findings.checks,
        parity=findings.parity,
        engines=findings.engines,
        plan=plan_from_file(store.get_path(findings.model.plan)),
        model=findings.model,
        data=findings.data,
        draws=findings.draws,
        config_yaml=yaml.safe_dump(to_jsonable(config), sort_keys=False),
        machine={"machine": machine_description(), "system": platform.platform(), "python": platform.python_version()},
        warnings=(
            *findings.data.warnings,
            *findings.model.warnings,
            *findings.draws.warnings,
            *findings.benchmark.warnings,
        ),
        attempts=findings.attempts,
        versus_published=findings.versus_published,
    )


def _class_metrics(store: Store, findings: RunFindings, evaluation: EvaluationRecord) -> ClassMetrics:
    """What an evaluation's stored predictions say of each class on the test split."""
    predictions = tables_from_parquet(store.get_path(evaluation.predictions))[findings.selection.test_split]
    return class_metrics(predictions, num_classes=findings.model.num_classes)


def deliver(store: Store, config: PtqConfig, findings: RunFindings, report: RunReport) -> ArtifactRef:
    """Writes the output folder and returns the stored verdict.

    Every file is written under a temporary name first and all are renamed at the end, `verdict.json` last: a
    folder with a verdict of this run is complete.

    Raises:
        ArtifactError: the folder cannot be written; files of an earlier run are untouched.
    """
    directory = Path(config.output.directory)
    verdict = report.verdict.model_dump_json(by_alias=True, indent=1).encode()
    ref = store.put_bytes(verdict, "verdict.json")
    graphs = {graph_file_name(findings, index): graph.onnx for index, graph in enumerate(findings.graphs)}
    objects = {"model_fp32.onnx": findings.model.fp32_onnx, **graphs, **_tuned_weights(findings)}
    objects |= {f"engines/{record.blob.name}": record.blob for record in findings.engines}
    try:
        (directory / "engines").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:
            (Path(temporary) / "engines").mkdir()
            for name, data in {**report.contents, "verdict.json": verdict}.items():
                (Path(temporary) / name).write_bytes(data)
            for name, reference in objects.items():
                (Path(temporary) / name).write_bytes(store.get_bytes(reference))
            for name in [*objects, *report.contents, "verdict.json"]:
                os.replace(Path(temporary) / name, directory / name)
    except OSError as error:
        raise ArtifactError(
            f"The output folder {directory} cannot be written: {error.strerror}. Expected free space and write "
            "permission; the results are in the store, run again with another --output."
        ) from error
    return ref
