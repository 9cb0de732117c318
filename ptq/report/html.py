"""What does the report's page show?"""

from collections.abc import Sequence
from dataclasses import dataclass

from ptq.report.cells import fixed, interval_text, ratio_text, with_unit
from ptq.report.charts import latency_bars_png, report_box_plot_png
from ptq.report.engine_tables import engines_table, int8_table, isas_tables, parity_table
from ptq.report.inputs import (
    ReportInputs,
    class_name,
    float_layers_in_engine,
    run_warnings,
    slow_sentences,
    test_metrics,
    verdict_sentence,
)
from ptq.report.page_parts import Tile, data_uri, page_of
from ptq.report.run_tables import (
    accuracy_table,
    attempts_table,
    calibration_table,
    candidates_table,
    checks_table,
    comparison_table,
    confused_table,
    findings_tables,
    flipped_table,
    latency_table,
    lengths_table,
    per_class_table,
    placement_table,
    provenance_tables,
    spreads_table,
    tables_of_published,
    trials_table,
)
from ptq.wording import engine_text

CLASSES_IN_A_MATRIX = 20


def html_report(inputs: ReportInputs) -> str:
    """Returns the whole report as one HTML file: styles and pictures inside, no script, nothing loaded."""
    findings, infos = findings_tables(inputs.checks)
    classes = inputs.model.num_classes
    return page_of(
        "run.html.j2",
        inputs=inputs,
        verdict=inputs.verdict,
        engine=engine_text(**inputs.verdict.engine.model_dump()),
        sentence=verdict_sentence(inputs),
        tiles=_tiles(inputs),
        warnings=run_warnings(inputs),
        accuracy=accuracy_table(inputs),
        comparison=comparison_table(inputs),
        trials=trials_table(inputs),
        spreads=spreads_table(inputs),
        candidates=candidates_table(inputs),
        attempts=attempts_table(inputs),
        versus_published=tables_of_published(inputs.versus_published) if inputs.versus_published else (),
        boxplot=data_uri(report_box_plot_png(inputs)),
        matrices=_matrices(inputs) if classes <= CLASSES_IN_A_MATRIX else (),
        confused=confused_table(inputs) if classes > CLASSES_IN_A_MATRIX else None,
        per_class=per_class_table(inputs),
        latency=latency_table(inputs),
        latency_bars=data_uri(latency_bars_png(inputs.benchmark)) if inputs.benchmark.measurements else "",
        slow=slow_sentences(inputs),
        int8=int8_table(inputs),
        engines=engines_table(inputs),
        float_in_engine=float_layers_in_engine(inputs),
        placement=placement_table(inputs.plan, inputs.model.coverage),
        parity=parity_table(inputs),
        isas=isas_tables(inputs),
        checks=checks_table(inputs),
        findings=findings,
        infos=infos,
        flipped=flipped_table(inputs),
        calibration=calibration_table(inputs),
        lengths=lengths_table(inputs),
        provenance=provenance_tables(inputs),
    )


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


def _tiles(inputs: ReportInputs) -> list[Tile]:
    best, record = inputs.verdict.best, inputs.benchmark
    interval = f"95 % interval {interval_text(best.drop_interval_pp)}"
    tiles = [Tile("Accuracy drop", f"{fixed(best.drop_pp, 2)} pp", interval)]
    for batch_size in sorted({item.batch_size for item in record.measurements})[:2]:
        fp32, int8 = record.of("fp32", batch_size), record.of("int8", batch_size)
        if fp32 is not None and int8 is not None:
            ratio = fp32.median_ms / int8.median_ms
            detail = f"{int8.median_ms:,.2f} instead of {fp32.median_ms:,.2f} ms"
            tiles.append(Tile(f"Speed-up, batch {batch_size}", f"{ratio_text(ratio)}×", detail, ratio < 1))
    _, int8_metrics = test_metrics(inputs)
    found = inputs.selection.comparison
    changed = f"{found.flipped:,} of {found.images:,} images changed"
    tiles.append(Tile("Agreement with FP32", with_unit(int8_metrics.agreement_percent, 1, "%"), changed))
    share = inputs.verdict.int8
    detail = f"INT8 output: {fixed(share.conv_int8_output_percent, 1)} %"
    tiles.append(Tile("Layers with INT8 input", f"{fixed(share.conv_int8_input_percent, 1)} %", detail))
    return tiles


def _matrices(inputs: ReportInputs) -> tuple[_Matrix, ...]:
    found = (("FP32", inputs.fp32_by_class), ("INT8", inputs.int8_by_class))
    images = f"{inputs.selection.comparison.images:,} {inputs.selection.test_split} images"
    return tuple(_matrix(inputs, by_class.confusion, f"{name}, {images}") for name, by_class in found)


def _matrix(inputs: ReportInputs, confusion: Sequence[Sequence[int]], title: str) -> _Matrix:
    names = [class_name(inputs, i) for i in range(len(confusion))]
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
