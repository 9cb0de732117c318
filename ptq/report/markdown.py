"""What does the report say as Markdown?"""

import re
from collections.abc import Iterable, Sequence

from ptq.report.cells import Table
from ptq.report.charts import report_box_plot_png
from ptq.report.engine_tables import int8_table, isas_tables, parity_table
from ptq.report.inputs import ReportInputs, run_warnings, slow_sentences, verdict_sentence
from ptq.report.page_parts import data_uri
from ptq.report.run_tables import (
    WORST_SHOWN,
    accuracy_table,
    attempts_table,
    calibration_table,
    checks_table,
    comparison_table,
    findings_tables,
    flipped_table,
    latency_table,
    lengths_table,
    placement_table,
    provenance_tables,
    spreads_table,
    tables_of_published,
    trials_table,
)


def markdown_text(text: str) -> str:
    r"""Returns text in which Markdown finds neither markup nor HTML.

    >>> print(markdown_text("a|b <i>"))
    a\|b &lt;i&gt;
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(re.sub(r"([\\`*|\[\]])", r"\\\1", text).split())


def markdown_report(inputs: ReportInputs) -> str:
    """Returns the same facts, shorter, as GitHub Markdown; the picture is expected beside it as `boxplot.png`."""
    findings, _ = findings_tables(inputs.checks)
    warnings = run_warnings(inputs)
    slow = [f"**{markdown_text(sentence)}**\n" for sentence in slow_sentences(inputs)]
    parts = [
        f"# INT8 quantization of {markdown_text(inputs.verdict.model)}\n",
        f"**{markdown_text(verdict_sentence(inputs))}**\n",
        *_markdown_list(inputs.verdict.gate.reasons),
        *(["## Warnings\n", *_markdown_list(warnings)] if warnings else []),
        "## Accuracy\n",
        *map(_markdown_table, (accuracy_table(inputs), comparison_table(inputs))),
        "## Methods and trials\n",
        *map(_markdown_table, (trials_table(inputs), spreads_table(inputs))),
        f"{markdown_text(inputs.selection.spread_sentence)} {markdown_text(inputs.selection.reason)}\n",
        *([_markdown_table(attempts_table(inputs))] if inputs.attempts else []),
        "![Top-1 of the methods over the trials](boxplot.png)\n",
        *(["## Against the version in service\n"] if inputs.versus_published else []),
        *map(_markdown_table, tables_of_published(inputs.versus_published) if inputs.versus_published else ()),
        "## Speed\n",
        _markdown_table(latency_table(inputs)),
        *slow,
        "## What ran in INT8\n",
        *map(_markdown_table, isas_tables(inputs)),
        *map(_markdown_table, (int8_table(inputs), parity_table(inputs))),
        _markdown_table(placement_table(inputs.plan, inputs.model.coverage)),
        "## Graph checks\n",
        _markdown_table(checks_table(inputs)),
        *([_markdown_table(findings)] if findings.rows else []),
        "## Images whose prediction changed\n",
        _markdown_table(flipped_table(inputs)),
        "## Calibration and provenance\n",
        _markdown_table(calibration_table(inputs)),
        *([_markdown_table(lengths_table(inputs, limit=WORST_SHOWN))] if inputs.draws.lengths else []),
        *map(_markdown_table, provenance_tables(inputs)),
    ]
    return "\n".join(parts)


def _markdown_list(items: Iterable[str]) -> list[str]:
    return ["\n".join(f"- {markdown_text(item)}" for item in items) + "\n"]


def _markdown_table(table: Table) -> str:
    """A GitHub table below its title in bold; numbers flush right."""
    rules = ["---:" if table.is_numeric(column) else "---" for column in range(len(table.columns))]
    columns, *rows = ([markdown_text(cell) for cell in row] for row in (table.columns, *table.rows))
    body = pipe_table(columns, rules, rows)
    note = f"\n\n{markdown_text(table.note)}" if table.note else ""
    return f"**{markdown_text(table.title)}**\n\n{body}{note}\n"


def pipe_table(columns: Sequence[str], rules: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of cells that are Markdown already; `rules` say how each column is set."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rules, *rows))


def page_markdown(inputs: ReportInputs) -> str:
    """Returns the Markdown report with its picture inside, for a page that cannot load a file beside it."""
    return markdown_report(inputs).replace("(boxplot.png)", f"({data_uri(report_box_plot_png(inputs))})")
