"""What did a run find, told to a person?

Records in, documents out: one HTML file that needs nothing else, Markdown, tables for a terminal and for Parquet.
Every fact is put into a `Table` once; the three presentations share it. Nothing is measured or decided here.
"""

import heapq
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars

from ptq.charts import box_plot_png, latency_bars_png
from ptq.config import in_method_order
from ptq.evaluation.predictions import ClassMetrics
from ptq.pages import data_uri, markdown_text, page_template
from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.records.calibration import CalibrationDraws, LayerLength
from ptq.records.data import DataRecord
from ptq.records.decision import Attempt, ServedComparison
from ptq.records.evaluation import EvaluationRecord, Selection, SplitMetrics
from ptq.records.graph import EngineRecord, GraphChecks
from ptq.records.plan import ModelRecord, PlacementPlan
from ptq.records.verdict import Verdict, VerdictCandidate
from ptq.served_tables import tables_of_served
from ptq.tables import (
    PRECISION_ORDER,
    Table,
    drop_phrase,
    fixed,
    interval_text,
    percent_change,
    percent_pair,
    probability,
    ratio_text,
    signed_count,
    size_text,
    with_unit,
)

FLIPPED_IMAGES_SHOWN = 50
CLASSES_IN_A_MATRIX = 20
CLASSES_IN_A_TABLE = 50
WORST_SHOWN = 20
LAYERS_IN_A_SENTENCE = 8


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Everything a report tells. `candidates` holds one evaluation per amax table, `verdict.candidates` every name.

    `fp32_by_class` and `int8_by_class`, of the chosen candidate, are of the test split.
    """

    verdict: Verdict
    baseline: EvaluationRecord
    fp32_by_class: ClassMetrics
    candidates: tuple[EvaluationRecord, ...]
    int8_by_class: ClassMetrics
    selection: Selection
    benchmark: BenchmarkRecord
    checks: tuple[GraphChecks, ...]
    engines: tuple[EngineRecord, ...]
    plan: PlacementPlan
    model: ModelRecord
    data: DataRecord
    draws: CalibrationDraws
    config_yaml: str
    machine: Mapping[str, str]
    warnings: tuple[str, ...]
    attempts: tuple[Attempt, ...] = ()
    served: ServedComparison | None = None


def verdict_sentence(inputs: ReportInputs) -> str:
    """Returns the decision, the accuracy with its uncertainty and the speed, as text of one or two sentences."""
    best, gate, images = inputs.verdict.best, inputs.verdict.gate, inputs.selection.comparison.images
    is_tuned = any(attempt.kind == "qat" and attempt.decision.accepted for attempt in inputs.attempts)
    tuned = ", weights changed by QAT" if is_tuned else ""
    fact = (
        f"INT8 ({best.method}, trial {best.trial}{tuned}) reaches {fixed(best.top1_percent, 1)} % top-1 on {images:,} "
        f"{inputs.selection.test_split} images, {drop_phrase(best.drop_pp)} "
        f"(95 % interval {interval_text(best.drop_interval_pp)} pp, McNemar {probability(best.mcnemar_p)})"
        f"{_speed_phrase(inputs.benchmark)}."
    )
    if gate.accepted:
        return f"Accepted: {fact}"
    reason = gate.reasons[0].rstrip(".") if gate.reasons else "the gate gave no reason"
    return f"Rejected: {reason}. {fact}"


def results_table(inputs: ReportInputs) -> polars.DataFrame:
    """Returns a row per candidate, those that share an amax table included, in the order of the verdict."""
    selection = inputs.selection
    rows = []
    for candidate in inputs.verdict.candidates:
        evaluation = evaluation_of(inputs, candidate.id)
        metrics = evaluation.on(selection.test_split)
        rows.append(
            {
                "id": candidate.id,
                "trial": candidate.trial,
                "method": candidate.method,
                "top1_percent": candidate.top1_percent,
                "drop_pp": candidate.drop_pp,
                "loss": candidate.loss,
                "sqnr_db": metrics.sqnr_db,
                "agreement_percent": metrics.agreement_percent,
                "selection_top1_percent": evaluation.on(selection.selection_split).top1_percent,
                "same_as": candidate.same_as,
                "chosen": candidate.id == selection.candidate,
            }
        )
    return polars.DataFrame(rows, schema_overrides={"sqnr_db": polars.Float64, "agreement_percent": polars.Float64})


def benchmark_table(record: BenchmarkRecord) -> polars.DataFrame:
    """Returns a row per precision and batch size, with every raw sample in milliseconds in the column `samples_ms`."""
    numbers = ("median_ms", "mean_ms", "p90_ms", "p95_ms", "p99_ms", "throughput_images_per_s")
    lists = ("rounds_median_ms", "samples_ms")
    schema: dict[str, polars.DataType | type[polars.DataType]] = {
        "precision": polars.String,
        "batch_size": polars.Int64,
    }
    schema |= dict.fromkeys(numbers, polars.Float64)
    schema |= dict.fromkeys(lists, polars.List(polars.Float64))
    rows = [
        {name: list(value) if isinstance(value := getattr(item, name), tuple) else value for name in schema}
        for item in record.measurements
    ]
    return polars.DataFrame(rows, schema=schema)


def boxplot_png(inputs: ReportInputs) -> bytes:
    """Returns the box plot of the methods over the trials on the test split, the same bytes as in the HTML report."""
    by_method: dict[str, list[float]] = {method: [] for method in methods_of(inputs)}
    for candidate in sorted(inputs.verdict.candidates, key=lambda item: item.trial):
        by_method[candidate.method].append(candidate.top1_percent)
    trials, name = len(inputs.draws.indices), inputs.verdict.model
    title = f"{name if len(name) <= 28 else name[:27] + '…'}: {inputs.selection.test_split}, "
    title += f"{trials} draws" if trials != 1 else "1 draw"
    title += f" of {_images_per_draw(inputs.draws)} images"
    return box_plot_png(by_method, fp32_top1_percent=inputs.verdict.fp32.top1_percent, title=title)


def terminal_tables(inputs: ReportInputs) -> tuple[Table, ...]:
    """Returns the tables a person wants at the end of a run: accuracy, candidates, speed and what ran in INT8."""
    tables = [_accuracy_table(inputs), _comparison_table(inputs), _trials_table(inputs), _latency_table(inputs)]
    return (*tables, _int8_table(inputs), _checks_table(inputs))


def html_report(inputs: ReportInputs) -> str:
    """Returns the whole report as one HTML file: styles and pictures inside, no script, nothing loaded."""
    template = page_template("report_template.html.j2")
    findings, infos = _findings_tables(inputs.checks)
    classes = inputs.model.num_classes
    page = template.render(
        inputs=inputs,
        verdict=inputs.verdict,
        sentence=verdict_sentence(inputs),
        tiles=_tiles(inputs),
        warnings=run_warnings(inputs),
        accuracy=_accuracy_table(inputs),
        comparison=_comparison_table(inputs),
        trials=_trials_table(inputs),
        spreads=_spreads_table(inputs),
        candidates=_candidates_table(inputs),
        attempts=_attempts_table(inputs),
        served=tables_of_served(inputs.served) if inputs.served else (),
        boxplot=data_uri(boxplot_png(inputs)),
        matrices=_matrices(inputs) if classes <= CLASSES_IN_A_MATRIX else (),
        confused=_confused_table(inputs) if classes > CLASSES_IN_A_MATRIX else None,
        per_class=_per_class_table(inputs),
        latency=_latency_table(inputs),
        latency_bars=data_uri(latency_bars_png(inputs.benchmark)) if inputs.benchmark.measurements else "",
        slow=_slow_sentences(inputs),
        int8=_int8_table(inputs),
        engines=_engines_table(inputs),
        float_in_engine=_float_layers_in_engine(inputs),
        placement=_placement_table(inputs.plan),
        checks=_checks_table(inputs),
        findings=findings,
        infos=infos,
        flipped=_flipped_table(inputs),
        calibration=_calibration_table(inputs),
        lengths=_lengths_table(inputs),
        provenance=_provenance_tables(inputs),
    )
    return page.strip() + "\n"


def markdown_report(inputs: ReportInputs) -> str:
    """Returns the same facts, shorter, as GitHub Markdown; the picture is expected beside it as `boxplot.png`."""
    findings, _ = _findings_tables(inputs.checks)
    warnings = run_warnings(inputs)
    slow = [f"**{markdown_text(sentence)}**\n" for sentence in _slow_sentences(inputs)]
    float_layers = _first_names(inputs.plan.float_layers) or "none"
    parts = [
        f"# INT8 quantization of {markdown_text(inputs.verdict.model)}\n",
        f"**{markdown_text(verdict_sentence(inputs))}**\n",
        *_markdown_list(inputs.verdict.gate.reasons),
        *(["## Warnings\n", *_markdown_list(warnings)] if warnings else []),
        "## Accuracy\n",
        *map(_markdown_table, (_accuracy_table(inputs), _comparison_table(inputs))),
        "## Methods and trials\n",
        *map(_markdown_table, (_trials_table(inputs), _spreads_table(inputs))),
        f"{markdown_text(inputs.selection.spread_sentence)} {markdown_text(inputs.selection.reason)}\n",
        *([_markdown_table(_attempts_table(inputs))] if inputs.attempts else []),
        "![Top-1 of the methods over the trials](boxplot.png)\n",
        *(["## Against the version in service\n"] if inputs.served else []),
        *map(_markdown_table, tables_of_served(inputs.served) if inputs.served else ()),
        "## Speed\n",
        _markdown_table(_latency_table(inputs)),
        *slow,
        "## What ran in INT8\n",
        *map(_markdown_table, (_int8_table(inputs), _placement_table(inputs.plan))),
        f"Layers left in float by the placement: {markdown_text(float_layers)}.\n",
        "## Graph checks\n",
        _markdown_table(_checks_table(inputs)),
        *([_markdown_table(findings)] if findings.rows else []),
        "## Images whose prediction changed\n",
        _markdown_table(_flipped_table(inputs)),
        "## Calibration and provenance\n",
        _markdown_table(_calibration_table(inputs)),
        *([_markdown_table(_lengths_table(inputs, limit=WORST_SHOWN))] if inputs.draws.lengths else []),
        *map(_markdown_table, _provenance_tables(inputs)),
    ]
    return "\n".join(parts)


def _accuracy_table(inputs: ReportInputs) -> Table:
    fp32, int8 = _test_metrics(inputs)
    rows = (
        ("Top-1, %", fp32.top1_percent, int8.top1_percent, 2),
        ("Top-5, %", fp32.top5_percent, int8.top5_percent, 2),
        ("Loss", fp32.loss, int8.loss, 4),
    )
    return Table(
        f"FP32 and INT8 on {fp32.images:,} {fp32.split} images",
        ("Metric", "FP32", "INT8", "Change"),
        tuple(
            (name, fixed(a, digits), fixed(b, digits), fixed(b - a, digits, sign=True)) for name, a, b, digits in rows
        ),
    )


def _comparison_table(inputs: ReportInputs) -> Table:
    _, int8 = _test_metrics(inputs)
    found = inputs.selection.comparison
    rows = (
        ("Accuracy drop", f"{fixed(found.drop_pp, 2)} pp"),
        ("95 % interval of the drop", f"{interval_text(found.drop_interval_pp)} pp"),
        ("McNemar test, exact, two-sided", probability(found.mcnemar_p)),
        ("Correct only in FP32 / only in INT8", f"{found.fp32_only_correct:,} / {found.int8_only_correct:,}"),
        ("Predictions changed", f"{found.flipped:,} of {found.images:,}"),
        ("Top-1 agreement with FP32", with_unit(int8.agreement_percent, 2, "%")),
        ("SQNR of the logits", with_unit(int8.sqnr_db, 1, "dB")),
    )
    return Table("INT8 against FP32, image by image", ("Comparison", "Value"), rows)


def _trials_table(inputs: ReportInputs) -> Table:
    found = {(item.trial, item.method): item for item in inputs.verdict.candidates}
    methods = methods_of(inputs)
    rows = []
    for trial in sorted({item.trial for item in inputs.verdict.candidates}):
        cells = [found.get((trial, method)) for method in methods]
        rows.append((str(trial), *(_trial_cell(cell, inputs.selection.candidate) for cell in cells)))
    shared = sum(bool(item.same_as) for item in inputs.verdict.candidates)
    note = f"* chosen. FP32: {fixed(inputs.verdict.fp32.top1_percent, 2)} %."
    if shared:
        note += (
            f" {shared} of {len(found)} candidates have the amax table of another; each such table is evaluated once."
        )
    return Table(f"Top-1 in percent on {inputs.selection.test_split}", ("Trial", *methods), tuple(rows), note)


def _spreads_table(inputs: ReportInputs) -> Table:
    rows = tuple(
        (
            spread.method,
            *(
                fixed(value, 2)
                for value in (spread.mean_top1_percent, spread.min_top1_percent, spread.max_top1_percent)
            ),
            fixed(spread.std_pp, 2),
        )
        for spread in inputs.selection.spreads
    )
    columns = ("Method", "Mean, %", "Least, %", "Most, %", "Standard deviation, pp")
    return Table("Top-1 of each method over the calibration draws", columns, rows)


def _candidates_table(inputs: ReportInputs) -> Table:
    selection = inputs.selection
    names = ("Candidate", "Trial", "Method", "Top-1, %", "Drop, pp", "Loss", "SQNR, dB", "Agreement, %")
    columns = (*names, f"Top-1 on {selection.selection_split}, %", "Same as")
    rows, chosen = [], []
    for index, row in enumerate(results_table(inputs).iter_rows(named=True)):
        digits = {"top1_percent": 2, "drop_pp": 2, "loss": 4, "sqnr_db": 1, "agreement_percent": 2}
        numbers = [fixed(row[name], count) for name, count in (digits | {"selection_top1_percent": 2}).items()]
        rows.append((row["id"], str(row["trial"]), row["method"], *numbers, row["same_as"]))
        if row["chosen"]:
            chosen.append(index)
    return Table("Every candidate", columns, tuple(rows), emphasized=tuple(chosen))


def _attempts_table(inputs: ReportInputs) -> Table:
    rows = tuple(
        (
            attempt.what,
            attempt.candidate,
            fixed(attempt.comparison.drop_pp, 2),
            f"{interval_text(attempt.comparison.drop_interval_pp)}",
            "accepted" if attempt.decision.accepted else f"rejected: {attempt.decision.reasons[0]}",
        )
        for attempt in inputs.attempts
    )
    accepted = tuple(index for index, attempt in enumerate(inputs.attempts) if attempt.decision.accepted)
    columns = ("Attempt", "Candidate", "Drop, pp", "95 % interval, pp", "Result")
    note = "Every attempt was judged on the same test images as the candidate before it."
    return Table("What was tried before giving up", columns, rows, note, emphasized=accepted)


def _confused_table(inputs: ReportInputs) -> Table:
    fp32, int8 = inputs.fp32_by_class, inputs.int8_by_class
    pairs = (
        (max(b, a), b, a, true, predicted)
        for true, (row, row8) in enumerate(zip(fp32.confusion, int8.confusion, strict=True))
        for predicted, (a, b) in enumerate(zip(row, row8, strict=True))
        if true != predicted and (a or b)
    )
    worst = heapq.nlargest(WORST_SHOWN, pairs, key=lambda pair: (pair[:3], -pair[3], -pair[4]))
    rows = tuple(
        (_class_name(inputs, true), _class_name(inputs, predicted), f"{a:,}", f"{b:,}", signed_count(b - a))
        for _, b, a, true, predicted in worst
    )
    columns = ("Class", "Predicted as", "Images, FP32", "Images, INT8", "Change")
    return Table(f"The {len(rows)} most confused pairs of classes", columns, rows)


def _per_class_table(inputs: ReportInputs) -> Table:
    fp32, int8 = inputs.fp32_by_class, inputs.int8_by_class
    classes = range(len(fp32.recall_percent))
    shown: Sequence[int] = classes
    title = f"Recall and precision per class on {inputs.selection.test_split}, %"
    if len(classes) > CLASSES_IN_A_TABLE:
        pairs = enumerate(zip(fp32.recall_percent, int8.recall_percent, strict=True))
        change = {i: after - before for i, (before, after) in pairs if before is not None and after is not None}
        shown = sorted(change, key=lambda i: (change[i], i))[:WORST_SHOWN]
        title += f": the {len(shown)} of {len(classes):,} classes that lost most recall"
    rows = tuple(
        (
            _class_name(inputs, i),
            f"{sum(fp32.confusion[i]):,}",
            *percent_pair(fp32.recall_percent[i], int8.recall_percent[i]),
            *percent_pair(fp32.precision_percent[i], int8.precision_percent[i]),
        )
        for i in shown
    )
    recall, precision = ("Recall FP32", "Recall INT8"), ("Precision FP32", "Precision INT8")
    columns = ("Class", "Images", *recall, "Change, pp", *precision, "Change, pp")
    note = "n/a: the class has no image (recall) or is never predicted (precision)."
    return Table(title, columns, rows, note if any("n/a" in row for row in rows) else "")


def _latency_table(inputs: ReportInputs) -> Table:
    record = inputs.benchmark
    measured = sorted(record.measurements, key=lambda item: (item.batch_size, PRECISION_ORDER[item.precision]))
    digits = 3 if min((item.median_ms for item in measured), default=1.0) < 1 else 2
    rows = []
    for item in measured:
        times = (item.median_ms, item.mean_ms, item.p90_ms, item.p95_ms, item.p99_ms)
        base = record.of("fp32", item.batch_size)
        changes = (
            ("ref.", "ref.")
            if item is base
            else ("n/a", "n/a")
            if base is None
            else (
                percent_change(item.median_ms, base.median_ms),
                percent_change(item.throughput_images_per_s, base.throughput_images_per_s),
            )
        )
        speed = f"{item.throughput_images_per_s:,.1f}"
        cells = (item.precision.upper(), str(item.batch_size), *(f"{value:,.{digits}f}" for value in times), speed)
        rows.append((*cells, *changes))
    slower = {(slow.precision, slow.batch_size) for slow, _ in _slower_than_float(record)}
    columns = ("Precision", "Batch", "Median, ms", "Mean, ms", "p90, ms", "p95, ms", "p99, ms", "Images/s")
    return Table(
        f"Latency and throughput on {record.engine.name} {record.engine.version}",
        (*columns, "Median latency against FP32, %", "Throughput against FP32, %"),
        tuple(rows),
        "Latency is the time of one batch. Precisions were measured in turns on the same machine.",
        alarming=tuple(i for i, item in enumerate(measured) if (item.precision, item.batch_size) in slower),
        emphasized=tuple(i for i, item in enumerate(measured) if item.precision == "int8"),
    )


def _int8_table(inputs: ReportInputs) -> Table:
    columns = ("Batch", "Convolutions and linears", "INT8 input, %", "INT8 output, %", "Reformats", "Left in float")
    rows = tuple(
        (
            str(engine.batch_size),
            f"{engine.int8.layers:,}",
            fixed(engine.int8.int8_input_percent, 1),
            fixed(engine.int8.int8_output_percent, 1),
            f"{engine.int8.reformats:,}",
            f"{len(engine.int8.float_layers):,}",
        )
        for engine in _int8_engines(inputs)
    )
    return Table("What the INT8 engine really runs", columns, rows)


def _engines_table(inputs: ReportInputs) -> Table:
    rows = tuple(
        (
            item.precision.upper(),
            str(item.batch_size),
            size_text(item.blob.size_bytes),
            fixed(item.build_s, 1),
            item.blob.sha256,
        )
        for item in sorted(inputs.engines, key=lambda item: (item.batch_size, PRECISION_ORDER[item.precision]))
    )
    return Table("Engines built", ("Precision", "Batch", "Size", "Build, s", "SHA-256"), rows)


def _placement_table(plan: PlacementPlan) -> Table:
    unsigned = sum(spec.never_negative for spec in plan.activations)
    traced = "operations: the graph was traced" if plan.traced else "modules only: the graph could not be traced"
    rows = (
        ("Quantizers placed by", traced),
        ("Layers quantized", f"{len(plan.quantized_layers):,}"),
        ("Layers left in float", f"{len(plan.float_layers):,}"),
        ("Residual adds quantized", f"{plan.quantized_residual_adds:,} of {plan.residual_adds:,}"),
        (
            "Activation quantizers",
            f"{len(plan.activations):,}, of which {unsigned:,} on tensors that are never negative",
        ),
        ("Weight quantizers", f"{len(plan.weights):,}"),
    )
    return Table("Placement of the quantizers", ("Fact", "Value"), rows)


def _checks_table(inputs: ReportInputs) -> Table:
    rows = tuple(
        (
            found.graph,
            f"{len(found.checks_run):,}",
            f"{found.errors:,}",
            f"{found.warnings:,}",
            f"{len(found.findings) - found.errors - found.warnings:,}",
        )
        for found in inputs.checks
    )
    alarming = tuple(index for index, found in enumerate(inputs.checks) if found.errors)
    return Table("Findings per graph", ("Graph", "Checks run", "Errors", "Warnings", "Notes"), rows, alarming=alarming)


def _findings_tables(checks: tuple[GraphChecks, ...]) -> tuple[Table, Table]:
    """Errors and warnings, errors first; and what is only worth knowing."""
    order = {"error": 0, "warning": 1, "info": 2}
    found = sorted(
        ((check.graph, finding) for check in checks for finding in check.findings),
        key=lambda pair: order[pair[1].severity],
    )
    rows = [(f.severity, f.check, f.node or "whole graph", f.message, f.remedy, graph) for graph, f in found]
    width = 6 if len(checks) > 1 else 5
    columns = ("Severity", "Check", "Node", "Message", "Remedy", "Graph")[:width]
    serious = tuple(row[:width] for row in rows if row[0] != "info")
    infos = tuple(row[:width] for row in rows if row[0] == "info")
    alarming = tuple(index for index, row in enumerate(serious) if row[0] == "error")
    return Table("Errors and warnings", columns, serious, alarming=alarming), Table("Notes", columns, infos)


def _flipped_table(inputs: ReportInputs) -> Table:
    images, total = inputs.selection.flipped_images[:FLIPPED_IMAGES_SHOWN], inputs.selection.comparison.flipped
    rows = []
    for image in images:
        lost, won = image.fp32_prediction == image.label, image.int8_prediction == image.label
        names = (_class_name(inputs, i) for i in (image.label, image.fp32_prediction, image.int8_prediction))
        rows.append((image.path, *names, "lost" if lost else "won" if won else "wrong in both"))
    title = "Images whose prediction changed"
    title += f": the first {len(images)} of {total:,}" if len(images) < total else f": {total:,}"
    return Table(title, ("Image", "Label", "FP32 says", "INT8 says", "Effect"), tuple(rows))


def _calibration_table(inputs: ReportInputs) -> Table:
    indices = inputs.draws.indices
    rows = (
        ("Trials, each a seeded draw", f"{len(indices):,}"),
        ("Images per draw", _images_per_draw(inputs.draws)),
        ("Different images over all draws", f"{len(set().union(*indices)):,}"),
        ("Images prepared", f"{inputs.draws.prepared.images:,}"),
        ("Methods", ", ".join(methods_of(inputs))),
    )
    return Table("Calibration draws", ("Fact", "Value"), rows)


def _lengths_table(inputs: ReportInputs, *, limit: int | None = None) -> Table:
    """Images each layer needed, those that needed most first; without rows where the length was fixed."""
    lengths = inputs.draws.lengths
    by_layer = list(zip(*(length.layers for length in lengths), strict=True))
    by_layer.sort(key=lambda layers: max(_need(layer) for layer in layers), reverse=True)
    rows = tuple((layers[0].name, *map(_need_text, layers)) for layers in by_layer[:limit])
    more = len(by_layer) - len(rows)
    note = "Half the width of the last 95 % interval of amax, in percent of amax, stands in brackets."
    note += f" {more} layers that needed fewer are left out." if more else ""
    alarming = tuple(i for i, layers in enumerate(by_layer[:limit]) if any(x.images_needed is None for x in layers))
    columns = ("Layer", *(f"Trial {trial}" for trial in range(len(lengths))))
    return Table("Images each layer needed for a tight amax", columns, rows, note, alarming=alarming)


def _need(layer: LayerLength) -> tuple[float, float]:
    never = float("inf")
    return layer.images_needed or never, never if layer.interval_percent is None else layer.interval_percent


def _need_text(layer: LayerLength) -> str:
    needed = "not reached" if layer.images_needed is None else f"{layer.images_needed:,}"
    return f"{needed} ({with_unit(layer.interval_percent, 1, '%')})"


def _provenance_tables(inputs: ReportInputs) -> tuple[Table, ...]:
    verdict, data, engine = inputs.verdict, inputs.data, inputs.benchmark.engine
    clock = inputs.benchmark.clock_mhz
    identity = (
        ("Run", verdict.run_id),
        (
            "Model",
            f"{inputs.model.name}, published as {verdict.model}"
            if inputs.model.name != verdict.model
            else verdict.model,
        ),
        ("Input", " x ".join(map(str, inputs.model.input_shape))),
        ("Classes", f"{inputs.model.num_classes:,}"),
        ("Checkpoint SHA-256", verdict.checkpoint_sha256),
        ("Configuration SHA-256", verdict.config_sha256),
        ("Images at", data.root),
        ("Index of the images, SHA-256", data.table.sha256),
        ("Images in more than one split", f"{data.duplicates_across_splits:,}"),
        (
            "Engine",
            f"{engine.name} {engine.version} on {engine.device}"
            + (f", {engine.threads} threads" if engine.threads else ""),
        ),
        ("Measured on", inputs.benchmark.machine + (f" at {clock:,.0f} MHz" if clock else "")),
    )
    splits = tuple((s.split, f"{s.images:,}", f"{sum(not n for n in s.images_per_class):,}") for s in data.splits)
    total = sum(verdict.stage_seconds.values())
    stages = tuple(
        (name, f"{seconds:,.1f}", fixed(100 * seconds / total if total else 0.0, 1))
        for name, seconds in verdict.stage_seconds.items()
    )
    files = tuple((name, size_text(item.size_bytes), item.sha256) for name, item in verdict.files.items())
    return (
        Table("Identity", ("Fact", "Value"), identity),
        Table("Splits", ("Split", "Images", "Classes without images"), splits),
        Table("Time spent", ("Stage", "Seconds", "Share, %"), stages, f"In all {total:,.1f} s."),
        Table("Library versions", ("Library", "Version"), tuple(verdict.versions.items())),
        Table("Machine", ("Property", "Value"), tuple((str(k), str(v)) for k, v in inputs.machine.items())),
        Table("Files", ("File", "Size", "SHA-256"), files),
    )


@dataclass(frozen=True, slots=True)
class _Tile:
    """One headline figure."""

    label: str
    value: str
    detail: str
    alarming: bool = False


@dataclass(frozen=True, slots=True)
class _MatrixCell:
    """A count of a confusion matrix: `heat` is its share of the class in percent."""

    count: int
    heat: float
    right: bool
    description: str


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A confusion matrix as it is drawn; `heads` are the names above the columns."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[_MatrixCell, ...]], ...]


def _tiles(inputs: ReportInputs) -> list[_Tile]:
    best, record = inputs.verdict.best, inputs.benchmark
    interval = f"95 % interval {interval_text(best.drop_interval_pp)}"
    tiles = [_Tile("Accuracy drop", f"{fixed(best.drop_pp, 2)} pp", interval)]
    for batch_size in sorted({item.batch_size for item in record.measurements})[:2]:
        fp32, int8 = record.of("fp32", batch_size), record.of("int8", batch_size)
        if fp32 is not None and int8 is not None:
            ratio = fp32.median_ms / int8.median_ms
            detail = f"{int8.median_ms:,.2f} instead of {fp32.median_ms:,.2f} ms"
            tiles.append(_Tile(f"Speed-up, batch {batch_size}", f"{ratio_text(ratio)}×", detail, ratio < 1))
    _, int8_metrics = _test_metrics(inputs)
    found = inputs.selection.comparison
    changed = f"{found.flipped:,} of {found.images:,} images changed"
    tiles.append(_Tile("Agreement with FP32", with_unit(int8_metrics.agreement_percent, 1, "%"), changed))
    share = inputs.verdict.int8
    detail = f"INT8 output: {fixed(share.conv_int8_output_percent, 1)} %"
    tiles.append(_Tile("Layers with INT8 input", f"{fixed(share.conv_int8_input_percent, 1)} %", detail))
    return tiles


def _matrices(inputs: ReportInputs) -> tuple[_Matrix, ...]:
    found = (("FP32", inputs.fp32_by_class), ("INT8", inputs.int8_by_class))
    images = f"{inputs.selection.comparison.images:,} {inputs.selection.test_split} images"
    return tuple(_matrix(inputs, by_class.confusion, f"{name}, {images}") for name, by_class in found)


def _matrix(inputs: ReportInputs, confusion: Sequence[Sequence[int]], title: str) -> _Matrix:
    names = [_class_name(inputs, i) for i in range(len(confusion))]
    # Long names would push a matrix off the page, so the columns then carry the number that the rows show.
    numbered = len(names) > 6 or max(map(len, names), default=0) > 12
    rows = []
    for true, counts in enumerate(confusion):
        total = sum(counts)
        cells = tuple(
            _MatrixCell(
                count,
                100 * count / total if total else 0.0,
                true == predicted,
                f"{names[true]} predicted as {names[predicted]}: {count:,} of {total:,}",
            )
            for predicted, count in enumerate(counts)
        )
        rows.append((f"{true} · {names[true]}" if numbered else names[true], cells))
    heads = tuple(str(i) for i in range(len(names))) if numbered else tuple(names)
    return _Matrix(title, heads, tuple(rows))


def evaluation_of(inputs: ReportInputs, candidate_id: str) -> EvaluationRecord:
    """The evaluation of a candidate, or of the one whose amax table it has."""
    same_as = {item.id: item.same_as for item in inputs.verdict.candidates}
    wanted = same_as.get(candidate_id) or candidate_id
    for evaluation in inputs.candidates:
        if evaluation.candidate == wanted:
            return evaluation
    raise ValueError(
        f"Candidate {wanted!r} of the verdict has no evaluation. "
        f"Expected one of {[item.candidate for item in inputs.candidates]}."
    )


def _test_metrics(inputs: ReportInputs) -> tuple[SplitMetrics, SplitMetrics]:
    """FP32 and the chosen INT8 candidate on the test split."""
    split = inputs.selection.test_split
    return inputs.baseline.on(split), evaluation_of(inputs, inputs.selection.candidate).on(split)


def methods_of(inputs: ReportInputs) -> tuple[str, ...]:
    """Returns the methods of the candidates, in the order in which tables show them."""
    return in_method_order(item.method for item in inputs.verdict.candidates)


def _class_name(inputs: ReportInputs, index: int) -> str:
    names = inputs.model.class_names or inputs.data.class_names
    return names[index] if index < len(names) else str(index)


def _int8_engines(inputs: ReportInputs) -> list[EngineRecord]:
    found = (engine for engine in inputs.engines if engine.precision == "int8")
    return sorted(found, key=lambda engine: engine.batch_size)


def _float_layers_in_engine(inputs: ReportInputs) -> tuple[str, ...]:
    return _unique(name for engine in _int8_engines(inputs) for name in engine.int8.float_layers)


def _slower_than_float(record: BenchmarkRecord) -> list[tuple[Measurement, Measurement]]:
    """INT8 and the fastest float precision, at each batch size where INT8 is the slower."""
    found = []
    for int8 in (item for item in record.measurements if item.precision == "int8"):
        floats = [m for m in record.measurements if m.batch_size == int8.batch_size and m.precision != "int8"]
        fastest = min(floats, key=lambda item: item.median_ms, default=int8)
        if fastest.median_ms < int8.median_ms:
            found.append((int8, fastest))
    return found


def _slow_sentences(inputs: ReportInputs) -> list[str]:
    """For each batch size at which INT8 does not pay: by how much, and which layers are at fault."""
    sentences = []
    for int8, fastest in _slower_than_float(inputs.benchmark):
        percent = 100 * (int8.median_ms / fastest.median_ms - 1)
        sentence = (
            f"INT8 is slower than {fastest.precision.upper()} at batch {int8.batch_size}: {int8.median_ms:,.2f} ms "
            f"against {fastest.median_ms:,.2f} ms, {percent:.1f} % longer."
        )
        engines = _int8_engines(inputs)
        engine = next((item for item in engines if item.batch_size == int8.batch_size), engines[0] if engines else None)
        if engine is not None:
            names = _first_names(engine.int8.float_layers)
            count = (
                f"{len(engine.int8.float_layers)} of {engine.int8.layers} convolutions and linear layers ran in float"
            )
            sentence += f" {count}: {names};" if names else f" {count};"
            converted = _first_names(engine.int8.reformat_layers)
            sentence += f" the engine converts between types {engine.int8.reformats} times"
            sentence += f": {converted}." if converted else "."
        sentences.append(sentence)
    return sentences


def _first_names(names: Sequence[str]) -> str:
    """The names in one line; a long list is cut, as the page lists all of them elsewhere."""
    more = len(names) - LAYERS_IN_A_SENTENCE
    return ", ".join(names[:LAYERS_IN_A_SENTENCE]) + (f" and {more} more" if more > 0 else "")


def run_warnings(inputs: ReportInputs) -> tuple[str, ...]:
    """Every warning of the run once, in the order of the stages."""
    groups = (inputs.warnings, inputs.draws.warnings, inputs.model.warnings, inputs.plan.warnings)
    return _unique(warning for group in (*groups, inputs.benchmark.warnings) for warning in group)


def _images_per_draw(draws: CalibrationDraws) -> str:
    counts = sorted({len(draw) for draw in draws.indices})
    if not counts:
        return "0"
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _speed_phrase(record: BenchmarkRecord) -> str:
    """The speed at the smallest batch size measured in both precisions; empty where there is none."""
    for batch_size in sorted({item.batch_size for item in record.measurements}):
        fp32, int8 = record.of("fp32", batch_size), record.of("int8", batch_size)
        if fp32 is not None and int8 is not None:
            ratio = fp32.median_ms / int8.median_ms
            if ratio >= 1:
                return f", and is {ratio_text(ratio)} times as fast at batch {batch_size}"
            return f", and takes {ratio_text(1 / ratio)} times as long at batch {batch_size}"
    return ""


def _trial_cell(candidate: VerdictCandidate | None, chosen: str) -> str:
    if candidate is None:
        return "n/a"
    return f"{fixed(candidate.top1_percent, 2)}{' *' if candidate.id == chosen else ''}"


def _markdown_list(items: Iterable[str]) -> list[str]:
    return ["\n".join(f"- {markdown_text(item)}" for item in items) + "\n"]


def _markdown_table(table: Table) -> str:
    """A GitHub table below its title in bold; numbers flush right."""
    rules = ["---:" if table.is_numeric(column) else "---" for column in range(len(table.columns))]
    lines = [table.columns, rules, *table.rows]
    body = "\n".join(f"| {' | '.join(c if line is rules else markdown_text(c) for c in line)} |" for line in lines)
    note = f"\n\n{markdown_text(table.note)}" if table.note else ""
    return f"**{markdown_text(table.title)}**\n\n{body}{note}\n"


def page_markdown(inputs: ReportInputs) -> str:
    """Returns the Markdown report with its picture inside, for a page that cannot load a file beside it."""
    return markdown_report(inputs).replace("(boxplot.png)", f"({data_uri(boxplot_png(inputs))})")


def parquet_from_frame(frame: polars.DataFrame) -> bytes:
    """Returns a table as Parquet."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()
