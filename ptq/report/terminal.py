"""Which tables does a command print?

Verdicts, metrics, findings and measurements as finished tables. How a terminal draws them is the command's
business; the page of a run is `report`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ptq.evaluation.benchmark import FileMeasurement
from ptq.evaluation.predictions import ClassMetrics
from ptq.records.evaluation import IsaEvaluation, SplitMetrics
from ptq.records.graph import GraphChecks, GraphFinding
from ptq.records.verdict import Verdict, VerdictCoverage, VerdictMeasurement, VerdictParity, VerdictPublished
from ptq.report.cells import Table, fixed, interval_text, percent_change, probability
from ptq.report.engine_tables import isas_table
from ptq.storage.garbage import Collection
from ptq.wording import first_names

CLASSES_SHOWN = 20
NODES_SHOWN = 3


def tables_of_verdict(verdict: Verdict) -> tuple[Table, ...]:
    """Returns what a person wants at the end of a run: accuracy, every candidate, speed, what ran in INT8."""
    in_service = (_in_service(verdict.in_service),) if verdict.in_service else ()
    parity = (_parity(verdict.parity),) if verdict.parity else ()
    isas = (isas_table(verdict.isas),) if verdict.isas else ()
    coverage = (_coverage(verdict.coverage),) if verdict.coverage else ()
    return _accuracy(verdict), _trials(verdict), *coverage, _latency(verdict), *isas, *parity, *in_service


def _coverage(found: VerdictCoverage) -> Table:
    rows = [("INT8", str(found.int8_layers), f"{fixed(found.int8_macs_percent, 1)} % of multiply-accumulates")]
    for reason in dict.fromkeys(layer.reason for layer in found.in_float):
        names = [layer.name for layer in found.in_float if layer.reason == reason]
        rows.append(("Float", str(len(names)), f"{first_names(names)}: {reason}"))
    if found.batchnorms:
        rows.append(("Float", str(found.batchnorms), "BatchNorms that no layer could take in"))
    return Table(f"{found.layers:,} convolutions and linear layers", ("Type", "Layers", "What"), tuple(rows))


def _in_service(found: VerdictPublished) -> Table:
    rows: list[tuple[str, str]] = [("Decision", found.decision)]
    if found.change_pp is not None and found.mcnemar_p is not None:
        change = f"{fixed(found.change_pp, 2, sign=True)} pp from {fixed(found.top1_percent, 2)} %"
        rows.append(("Top-1", f"{change}, McNemar {probability(found.mcnemar_p)}"))
    for batch_size, ratio in found.latency_ratio.items():
        rows.append((f"Latency at batch {batch_size}", f"{fixed(ratio, 2)} times"))
    moved = max(found.amax_factor.items(), key=lambda item: item[1], default=None)
    if moved:
        rows.append(("Largest drift of amax", f"{fixed(moved[1], 2)} times, {moved[0]}"))
    return Table(f"Against version {found.version} in service", ("Comparison", "New model"), tuple(rows))


def _accuracy(verdict: Verdict) -> Table:
    best = verdict.best
    rows = (
        ("FP32", fixed(verdict.fp32.top1_percent, 2), "", "", ""),
        (
            f"INT8, {best.method}, trial {best.trial}",
            fixed(best.top1_percent, 2),
            fixed(best.drop_pp, 2, sign=True),
            interval_text(best.drop_interval_pp),
            probability(best.mcnemar_p),
        ),
    )
    columns = ("Model", "Top-1, %", "Drop, pp", "95 % interval, pp", "McNemar")
    return Table(f"{verdict.model} on {verdict.fp32.n_images:,} test images", columns, rows, emphasized=(1,))


def _trials(verdict: Verdict) -> Table:
    trials = sorted({candidate.trial for candidate in verdict.candidates})
    top1 = {(candidate.method, candidate.trial): candidate.top1_percent for candidate in verdict.candidates}
    methods = tuple(dict.fromkeys(candidate.method for candidate in verdict.candidates))
    rows = []
    for method in methods:
        marks = [" *" if (method, trial) == (verdict.best.method, verdict.best.trial) else "" for trial in trials]
        cells = (f"{fixed(top1.get((method, trial)), 2)}{mark}" for trial, mark in zip(trials, marks, strict=True))
        rows.append((method, *cells))
    columns = ("Method", *(f"Trial {trial}" for trial in trials))
    return Table("Top-1 of every candidate, %; * is the chosen one", columns, tuple(rows))


def _latency(verdict: Verdict) -> Table:
    float32 = {item.batch_size: item for item in verdict.benchmark if item.precision == "fp32"}
    best_float = {
        size: min(item.latency_ms.median for item in verdict.benchmark if item.batch_size == size and _is_float(item))
        for size in {item.batch_size for item in verdict.benchmark if _is_float(item)}
    }
    rows, slow = [], []
    for index, item in enumerate(verdict.benchmark):
        base = float32.get(item.batch_size) if item.precision != "fp32" else None
        if not _is_float(item) and item.latency_ms.median >= best_float.get(item.batch_size, float("inf")):
            slow.append(index)
        rows.append(
            (
                item.precision.upper(),
                str(item.batch_size),
                fixed(item.latency_ms.median, 3),
                fixed(item.latency_ms.p99, 3),
                fixed(item.images_per_s, 1),
                _change(item.latency_ms.median, base.latency_ms.median if base else None),
                _change(item.images_per_s, base.images_per_s if base else None),
            )
        )
    columns = ("Precision", "Batch", "Median, ms", "p99, ms", "Images/s", "Latency, %", "Throughput, %")
    title = f"Latency on {verdict.engine.name} {verdict.engine.version}, changes against FP32"
    int8 = tuple(index for index, item in enumerate(verdict.benchmark) if not _is_float(item))
    return Table(title, columns, tuple(rows), alarming=tuple(slow), emphasized=int8)


def _change(value: float, reference: float | None) -> str:
    return "ref." if reference is None else percent_change(value, reference)


def _is_float(item: VerdictMeasurement) -> bool:
    return item.precision != "int8"


def tables_of_metrics(
    metrics: SplitMetrics, by_class: ClassMetrics, *, class_names: Sequence[str]
) -> tuple[Table, ...]:
    """Returns loss and accuracy, and for up to 20 classes the confusion matrix with recall and precision."""
    summary = Table(
        f"{metrics.images:,} images of {metrics.split}",
        ("Top-1, %", "Top-5, %", "Loss"),
        ((fixed(metrics.top1_percent, 2), fixed(metrics.top5_percent, 2), fixed(metrics.loss, 4)),),
    )
    if len(by_class.confusion) > CLASSES_SHOWN:
        return (summary,)
    names = [*class_names, *(str(index) for index in range(len(class_names), len(by_class.confusion)))]
    rows = tuple(
        (name, *(f"{count:,}" for count in row), fixed(recall, 1), fixed(precision, 1))
        for name, row, recall, precision in zip(
            names, by_class.confusion, by_class.recall_percent, by_class.precision_percent, strict=True
        )
    )
    columns = ("True class", *names, "Recall, %", "Precision, %")
    return summary, Table("Confusion matrix: rows are labels, columns predictions", columns, rows)


def table_of_isas(found: Sequence[IsaEvaluation]) -> Table:
    """Returns a row for each instruction set that a file was evaluated under."""
    rows = tuple(
        (
            item.isa,
            fixed(item.metrics.top1_percent, 2),
            fixed(item.metrics.sqnr_db, 1),
            fixed(item.metrics.agreement_percent, 2),
            fixed(item.median_ms, 2),
        )
        for item in found
    )
    columns = ("Instruction set", "Top-1, %", "SQNR, dB", "Same top-1, %", "Median at batch 1, ms")
    note = "SQNR and same top-1 refer to the same file, computed in float by ONNX Runtime."
    return Table("OpenVINO under each instruction set", columns, rows, note)


def _parity(found: VerdictParity) -> Table:
    rows = [
        ("INT8 on the engine", f"{fixed(found.engine_sqnr_db, 1)} dB"),
        ("The INT8 file in float", f"{fixed(found.file_sqnr_db, 1)} dB"),
    ]
    if found.cause:
        rows.append(("They part first at", f"{found.layer or 'no single layer'}: {found.cause}"))
    alarming = (0, 2) if found.cause else ()
    title = f"SQNR against FP32 on {found.images:,} images"
    return Table(title, ("Model", "Value"), tuple(rows), alarming=alarming)


def table_of_checks(checks: GraphChecks) -> Table:
    """Returns a row for each check that found something, errors first, with its first nodes and first message."""
    order = {"error": 0, "warning": 1, "info": 2}
    groups: dict[tuple[str, str], list[GraphFinding]] = {}
    for finding in sorted(checks.findings, key=lambda finding: order[finding.severity]):
        groups.setdefault((finding.severity, finding.check), []).append(finding)
    rows = tuple(
        (severity, check, f"{len(group):,}", _first_nodes(group), group[0].message, group[0].remedy)
        for (severity, check), group in groups.items()
    )
    errors = tuple(index for index, (severity, _) in enumerate(groups) if severity == "error")
    columns = ("Severity", "Check", "Found", "First nodes", "First message", "Remedy")
    return Table(f"Findings in {checks.graph}", columns, rows, alarming=errors)


def _first_nodes(group: Sequence[GraphFinding]) -> str:
    names = list(dict.fromkeys(finding.node or "whole graph" for finding in group))
    return first_names(names, NODES_SHOWN)


def table_of_benchmark(results: Sequence[FileMeasurement]) -> Table:
    """Returns latency and throughput of ONNX files; changes are against the first file of the same batch size."""
    reference: dict[int, FileMeasurement] = {}
    rows = []
    for result in results:
        item = result.measurement
        base = reference.setdefault(item.batch_size, result).measurement
        rows.append(
            (
                result.file,
                item.precision.upper(),
                str(item.batch_size),
                fixed(item.median_ms, 3),
                fixed(item.p90_ms, 3),
                fixed(item.p99_ms, 3),
                fixed(item.throughput_images_per_s, 1),
                "ref." if item is base else percent_change(item.median_ms, base.median_ms),
                f"{result.int8.int8_input_percent:.0f} / {result.int8.int8_output_percent:.0f}",
            )
        )
    columns = (
        "File",
        "Precision",
        "Batch",
        "Median, ms",
        "p90, ms",
        "p99, ms",
        "Images/s",
        "Latency, %",
        "INT8 in / out, %",
    )
    return Table("Latency and throughput", columns, tuple(rows))


def tables_of_history(model: str, entries: Sequence[Mapping[str, Any]]) -> tuple[Table, Table]:
    """Returns what each published version reaches, and what made it; the latest version is the last row.

    Digests are shortened to 12 digits; what an entry does not say is empty.
    """
    last = (len(entries) - 1,)
    versions = tuple(
        (
            str(entry["sequence"]),
            entry["version"],
            entry.get("published_at", ""),
            fixed(entry.get("fp32_top1_percent"), 2),
            fixed(entry.get("top1_percent"), 2),
            fixed(entry.get("drop_pp"), 2),
            f"{entry.get('method', '')}, trial {entry.get('trial', '')}",
            entry["replaced"],
            str(entry.get("restored_from", "")),
        )
        for entry in entries
    )
    lineage = tuple(
        (
            str(entry["sequence"]),
            entry["version"],
            *(entry.get(f"{what}_sha256", "")[:12] for what in ("checkpoint", "data", "config", "code")),
            entry.get("run_id", ""),
        )
        for entry in entries
    )
    titles = (
        "#",
        "Version",
        "Published",
        "FP32 top-1, %",
        "INT8 top-1, %",
        "Drop, pp",
        "Candidate",
        "Replaced",
        "From #",
    )
    made_of = ("#", "Version", "Checkpoint", "Data", "Config", "Code", "Run")
    return (
        Table(f"Versions of {model}", titles, versions, emphasized=last),
        Table("What made them (SHA-256)", made_of, lineage, emphasized=last),
    )


def table_of_collection(found: Collection) -> Table:
    """Returns counts and bytes of what is kept and of what is removed, by kind."""
    word = "Would go" if found.is_dry_run else "Removed"
    rows = tuple(
        (kept.kind, f"{kept.count:,}", f"{kept.size_bytes:,}", f"{gone.count:,}", f"{gone.size_bytes:,}")
        for kept, gone in zip(found.kept, found.removed, strict=True)
    )
    return Table("Store", ("Kind", "Kept", "Bytes", word, "Bytes"), rows)
