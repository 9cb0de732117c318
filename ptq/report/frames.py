"""What does a run leave for a notebook? A row per candidate, and every sample of the benchmark, as Parquet."""

import io

import polars

from ptq.records.benchmark import BenchmarkRecord
from ptq.report.inputs import ReportInputs, evaluation_of


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


def parquet_from_frame(frame: polars.DataFrame) -> bytes:
    """Returns a table as Parquet."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()
