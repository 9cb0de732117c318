"""Which tables tell a person what the engine really runs, and whether it computes what the file says?"""

from collections.abc import Sequence

from ptq.records.verdict import VerdictIsa
from ptq.report.cells import PRECISIONS, Table, fixed, size_text
from ptq.report.inputs import ReportInputs, int8_engines


def int8_table(inputs: ReportInputs) -> Table:
    """Returns what each INT8 engine runs in INT8."""
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
        for engine in int8_engines(inputs)
    )
    return Table("What the INT8 engine really runs", columns, rows)


def isas_table(found: Sequence[VerdictIsa]) -> Table:
    """Returns INT8 on the test split under each instruction set that the gate asks for."""
    rows = tuple(
        (
            item.isa,
            fixed(item.top1_percent, 2),
            fixed(item.drop_pp, 2, sign=True),
            fixed(item.sqnr_db, 1),
            fixed(item.median_ms, 2),
        )
        for item in found
    )
    columns = ("Instruction set", "Top-1, %", "Drop, pp", "SQNR, dB", "Median at batch 1, ms")
    return Table("INT8 under each instruction set", columns, rows)


def isas_tables(inputs: ReportInputs) -> tuple[Table, ...]:
    """Returns that table for a report; none where the gate asks for no instruction set."""
    return (isas_table(inputs.verdict.isas),) if inputs.verdict.isas else ()


def parity_table(inputs: ReportInputs) -> Table:
    """Returns whether the engine computes what the INT8 file says."""
    found = inputs.parity
    pairs = {
        "INT8 on the engine against FP32": found.engine,
        "The INT8 file in float against FP32": found.file,
        "INT8 on the engine against its file": found.engine_to_file,
    }
    rows = tuple((name, fixed(pair.sqnr_db, 1), fixed(pair.agreement_percent, 1)) for name, pair in pairs.items())
    note = found.parting.sentence if found.parting else "The file is what was decided, and the engine computes it."
    title = f"The engine and its file on {found.images:,} images"
    alarming = (0, 2) if found.parting else ()
    return Table(title, ("Pair", "SQNR, dB", "Same top-1, %"), rows, note, alarming=alarming)


def engines_table(inputs: ReportInputs) -> Table:
    """Returns the built engines."""
    rows = tuple(
        (
            item.precision.upper(),
            str(item.batch_size),
            size_text(item.blob.size_bytes),
            fixed(item.build_s, 1),
            item.blob.sha256,
        )
        for item in sorted(inputs.engines, key=lambda item: (item.batch_size, PRECISIONS.index(item.precision)))
    )
    return Table("Engines built", ("Precision", "Batch", "Size", "Build, s", "SHA-256"), rows)
