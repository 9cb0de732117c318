"""Which tables tell a person what a run found?

Records in, finished tables out: every fact is put into a `Table` once, and the page, Markdown and the terminal share
it. Nothing is measured or decided here.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence

from ptq.evaluation.versus_published import NOTABLE_DRIFT, drift_factor
from ptq.records.benchmark import Measurement
from ptq.records.calibration import LayerLength
from ptq.records.decision import PublishedComparison
from ptq.records.graph import GraphChecks
from ptq.records.plan import Coverage, PlacementPlan
from ptq.records.verdict import VerdictCandidate
from ptq.report.cells import (
    PRECISIONS,
    Table,
    fixed,
    interval_text,
    percent_change,
    percent_pair,
    probability,
    signed_count,
    size_text,
    with_unit,
)
from ptq.report.engine_tables import int8_table, isas_tables, parity_table
from ptq.report.frames import results_table
from ptq.report.inputs import (
    ReportInputs,
    class_name,
    images_per_draw,
    methods_of,
    slower_than_float,
    test_metrics,
)
from ptq.wording import engine_text, first_names

FLIPPED_IMAGES_SHOWN = 50
CLASSES_IN_A_TABLE = 50
WORST_SHOWN = 20
LAYERS_SHOWN = 10
# The times of the latency table, in milliseconds, by column: a number to add is one entry.
LATENCIES: Mapping[str, Callable[[Measurement], float]] = {
    "Median, ms": lambda item: item.median_ms,
    "Mean, ms": lambda item: item.mean_ms,
    "p90, ms": lambda item: item.p90_ms,
    "p95, ms": lambda item: item.p95_ms,
    "p99, ms": lambda item: item.p99_ms,
}


def terminal_tables(inputs: ReportInputs) -> tuple[Table, ...]:
    """Returns the tables a person wants at the end of a run: accuracy, candidates, speed and what ran in INT8."""
    tables = [accuracy_table(inputs), comparison_table(inputs), trials_table(inputs), latency_table(inputs)]
    return (*tables, *isas_tables(inputs), int8_table(inputs), parity_table(inputs), checks_table(inputs))


def accuracy_table(inputs: ReportInputs) -> Table:
    """Returns accuracy of FP32 and INT8 on the test split."""
    fp32, int8 = test_metrics(inputs)
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


def comparison_table(inputs: ReportInputs) -> Table:
    """Returns the paired comparison of INT8 with FP32."""
    _, int8 = test_metrics(inputs)
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


def trials_table(inputs: ReportInputs) -> Table:
    """Returns top-1 of each method in each trial."""
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


def spreads_table(inputs: ReportInputs) -> Table:
    """Returns the spread of each method over the trials."""
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


def candidates_table(inputs: ReportInputs) -> Table:
    """Returns one row per candidate."""
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


def attempts_table(inputs: ReportInputs) -> Table:
    """Returns what was tried after a rejection."""
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


def confused_table(inputs: ReportInputs) -> Table:
    """Returns the pairs of classes that are taken for each other most."""
    fp32, int8 = inputs.fp32_by_class, inputs.int8_by_class
    pairs = (
        (max(b, a), b, a, true, predicted)
        for true, (row, row8) in enumerate(zip(fp32.confusion, int8.confusion, strict=True))
        for predicted, (a, b) in enumerate(zip(row, row8, strict=True))
        if true != predicted and (a or b)
    )
    worst = heapq.nlargest(WORST_SHOWN, pairs, key=lambda pair: (pair[:3], -pair[3], -pair[4]))
    rows = tuple(
        (class_name(inputs, true), class_name(inputs, predicted), f"{a:,}", f"{b:,}", signed_count(b - a))
        for _, b, a, true, predicted in worst
    )
    columns = ("Class", "Predicted as", "Images, FP32", "Images, INT8", "Change")
    return Table(f"The {len(rows)} most confused pairs of classes", columns, rows)


def per_class_table(inputs: ReportInputs) -> Table:
    """Returns recall and precision of each class."""
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
            class_name(inputs, i),
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


def latency_table(inputs: ReportInputs) -> Table:
    """Returns latency and throughput of each precision and batch size."""
    record = inputs.benchmark
    measured = sorted(record.measurements, key=lambda item: (item.batch_size, PRECISIONS.index(item.precision)))
    digits = 3 if min((item.median_ms for item in measured), default=1.0) < 1 else 2
    rows = []
    for item in measured:
        times = (value(item) for value in LATENCIES.values())
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
    slower = {(slow.precision, slow.batch_size) for slow, _ in slower_than_float(record)}
    columns = ("Precision", "Batch", *LATENCIES, "Images/s")
    return Table(
        f"Latency and throughput on {record.engine.name} {record.engine.version}",
        (*columns, "Median latency against FP32, %", "Throughput against FP32, %"),
        tuple(rows),
        "Latency is the time of one batch. Precisions were measured in turns on the same machine.",
        alarming=tuple(i for i, item in enumerate(measured) if (item.precision, item.batch_size) in slower),
        emphasized=tuple(i for i, item in enumerate(measured) if item.precision == "int8"),
    )


def placement_table(plan: PlacementPlan, coverage: Coverage) -> Table:
    """Returns where the plan puts quantizers, and how much of the network they reach."""
    share = f"{coverage.int8_macs_percent:.1f} % of the multiply-accumulates"
    reasons = dict.fromkeys(layer.reason for layer in coverage.in_float)
    in_float = "; ".join(
        f"{first_names([layer.name for layer in coverage.in_float if layer.reason == reason])}: {reason}"
        for reason in reasons
    )
    unsigned = sum(spec.never_negative for spec in plan.activations)
    traced = "operations: the graph was traced" if plan.traced else "modules only: the graph could not be traced"
    rows = (
        ("Quantizers placed by", traced),
        ("Convolutions and linear layers in INT8", f"{coverage.int8_layers:,} of {coverage.layers:,}, {share}"),
        ("Layers left in float", in_float or "none"),
        ("BatchNorms that no layer could take in", f"{coverage.batchnorms:,}"),
        ("Residual adds quantized", f"{plan.quantized_residual_adds:,} of {plan.residual_adds:,}"),
        (
            "Activation quantizers",
            f"{len(plan.activations):,}, of which {unsigned:,} on tensors that are never negative",
        ),
        ("Weight quantizers", f"{len(plan.weights):,}"),
    )
    return Table("Placement of the quantizers", ("Fact", "Value"), rows)


def checks_table(inputs: ReportInputs) -> Table:
    """Returns the findings of the graph checks."""
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


def findings_tables(checks: tuple[GraphChecks, ...]) -> tuple[Table, Table]:
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


def flipped_table(inputs: ReportInputs) -> Table:
    """Returns the images whose prediction changed."""
    images, total = inputs.selection.flipped_images[:FLIPPED_IMAGES_SHOWN], inputs.selection.comparison.flipped
    rows = []
    for image in images:
        lost, won = image.fp32_prediction == image.label, image.int8_prediction == image.label
        names = (class_name(inputs, i) for i in (image.label, image.fp32_prediction, image.int8_prediction))
        rows.append((image.path, *names, "lost" if lost else "won" if won else "wrong in both"))
    title = "Images whose prediction changed"
    title += f": the first {len(images)} of {total:,}" if len(images) < total else f": {total:,}"
    return Table(title, ("Image", "Label", "FP32 says", "INT8 says", "Effect"), tuple(rows))


def calibration_table(inputs: ReportInputs) -> Table:
    """Returns how the ranges were calibrated."""
    indices = inputs.draws.indices
    rows = (
        ("Trials, each a seeded draw", f"{len(indices):,}"),
        ("Images per draw", images_per_draw(inputs.draws)),
        ("Different images over all draws", f"{len(set().union(*indices)):,}"),
        ("Images prepared", f"{inputs.draws.prepared.images:,}"),
        ("Methods", ", ".join(methods_of(inputs))),
    )
    return Table("Calibration draws", ("Fact", "Value"), rows)


def lengths_table(inputs: ReportInputs, *, limit: int | None = None) -> Table:
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


def provenance_tables(inputs: ReportInputs) -> tuple[Table, ...]:
    """Returns what the result was made of and on."""
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
            engine_text(engine.name, engine.version, engine.device, engine.isa)
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


def _trial_cell(candidate: VerdictCandidate | None, chosen: str) -> str:
    if candidate is None:
        return "n/a"
    return f"{fixed(candidate.top1_percent, 2)}{' *' if candidate.id == chosen else ''}"


def tables_of_published(comparison: PublishedComparison) -> tuple[Table, ...]:
    """Returns the comparison with the version in service and, where the two were compared, the drift of amax."""
    title = f"Against version {comparison.version} in service: {comparison.decision}"
    rows = [*_accuracy_rows(comparison), *_latency_rows(comparison)]
    if not rows:
        return (Table(title, ("Comparison", "Value"), tuple(("Reason", reason) for reason in comparison.reasons)),)
    return Table(title, ("Comparison", "In service", "New", "Change"), tuple(rows)), _drift_table(comparison)


def _accuracy_rows(comparison: PublishedComparison) -> list[tuple[str, ...]]:
    paired = comparison.paired
    if paired is None or comparison.published_top1_percent is None or comparison.new_top1_percent is None:
        return []
    low, high = paired.drop_interval_pp
    change = f"{fixed(-paired.drop_pp, 2, sign=True)} pp"
    return [
        (
            f"Top-1 on {paired.images:,} images, %",
            fixed(comparison.published_top1_percent, 2),
            fixed(comparison.new_top1_percent, 2),
            change,
        ),
        ("95 % interval of the change, pp", "", "", interval_text((-high, -low))),
        ("McNemar test, exact, two-sided", "", "", probability(paired.mcnemar_p)),
        (
            "Images that only this one gets right",
            f"{paired.fp32_only_correct:,}",
            f"{paired.int8_only_correct:,}",
            f"{paired.flipped:,} predictions differ",
        ),
    ]


def _latency_rows(comparison: PublishedComparison) -> list[tuple[str, ...]]:
    return [
        (
            f"Median latency at batch {item.batch_size}, ms",
            fixed(item.published_median_ms, 3),
            fixed(item.new_median_ms, 3),
            f"{fixed(100 * (item.ratio - 1), 1, sign=True)} %",
        )
        for item in comparison.latencies
    ]


def _drift_table(comparison: PublishedComparison) -> Table:
    shown = comparison.drift[:LAYERS_SHOWN]
    rows = tuple(
        (item.quantizer, f"{item.published_amax:.4g}", f"{item.new_amax:.4g}", fixed(drift_factor(item), 2))
        for item in shown
    )
    note = f"The {len(shown)} largest of {len(comparison.drift)} quantizers that both have."
    if comparison.quantizers_of_one_alone:
        note += f" {len(comparison.quantizers_of_one_alone)} are in one of the two alone."
    alarming = tuple(index for index, item in enumerate(shown) if drift_factor(item) > NOTABLE_DRIFT)
    return Table("Drift of amax", ("Quantizer", "In service", "New", "Factor"), rows, note, alarming=alarming)
