"""The commands that work on files, without a store: evaluate, export, validate, benchmark, report, view."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from flows.cli_options import (
    BENCHMARK,
    ENGINE,
    EVALUATE,
    INPUT,
    Engine,
    Json,
    Threads,
    check_choice,
    config_from_options,
    described,
    options_from,
)
from flows.cli_output import FAILED, new_console, print_json, show_tables, show_verdict
from ptq.config import DIALECTS, ENGINES, EXPORT_PRECISIONS, DataConfig, PreprocessingConfig, TrainingConfig
from ptq.errors import UsageError
from ptq.records.verdict import Verdict


@options_from(DataConfig, EVALUATE)
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint or an ONNX file; a path or s3://...")],
    data: Annotated[str, typer.Option(help=described(DataConfig, "path"))],
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "test",
    name: Annotated[str, typer.Option("--model", help="Network of a checkpoint.")] = "resnet50",
    engine: Engine = ENGINE.name,
    threads: Threads = ENGINE.threads,
    isa: Annotated[
        list[str] | None,
        typer.Option(help="Instruction set to evaluate under too, such as avx2, or native; repeat. OpenVINO only."),
    ] = None,
    *,
    as_json: Json = False,
    **preprocessing: Any,
) -> None:
    """Evaluate a checkpoint or an ONNX file: loss, top-1, top-5, confusion matrix."""
    from ptq.api import evaluate_file
    from ptq.report.terminal import table_of_isas, tables_of_metrics

    settings = config_from_options(DataConfig, EVALUATE, {"data": data, **preprocessing})
    check_choice("engine", engine, ENGINES)
    found = evaluate_file(
        model, name=name, data=settings, split=split, engine=engine, threads=threads, isas=tuple(isa or ())
    )
    if as_json:
        print_json(found.to_json())
        return
    show_tables(*tables_of_metrics(found.metrics, found.by_class, class_names=found.class_names))
    if found.by_isa:
        show_tables(table_of_isas(found.by_isa))


def export(
    checkpoint: Annotated[str, typer.Option(help="File with the FP32 weights; a path or s3://...")],
    model: Annotated[str, typer.Option(help=described(TrainingConfig, "model"))] = "resnet50",
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(EXPORT_PRECISIONS)}.")] = EXPORT_PRECISIONS[0],
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Static batch size; repeat; none: dynamic.")
    ] = None,
    channels: Annotated[int, typer.Option(help=described(PreprocessingConfig, "channels"))] = INPUT.channels,
    crop: Annotated[int, typer.Option(help="Side of the input, in pixels.")] = INPUT.crop,
    output: Annotated[Path, typer.Option(help="Folder for the ONNX files.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Export a checkpoint as FP32 or FP16 ONNX, one file per batch size."""
    from ptq.api import export_files

    check_choice("precision", precision, EXPORT_PRECISIONS)
    shape = (channels, crop, crop)
    written = export_files(
        checkpoint, name=model, precision=precision, batch_sizes=batch_size or [], input_shape=shape, directory=output
    )
    if as_json:
        print_json({"files": written})
    else:
        sys.stdout.write("".join(f"{path}\n" for path in written))


def validate(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    dialect: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DIALECTS)}; left out: told from the zero points.")
    ] = None,
    float_layer: Annotated[list[str] | None, typer.Option(help="Layer that may stay in float; repeat.")] = None,
    as_json: Json = False,
) -> None:
    """Check a Q/DQ graph; exit code 1 if there is any error."""
    from ptq.api import check_file
    from ptq.records.base import to_jsonable
    from ptq.report.terminal import table_of_checks

    if dialect is not None:
        check_choice("dialect", dialect, DIALECTS)
    checks = check_file(model, dialect=dialect, float_layers=float_layer or ())
    if as_json:
        print_json({**to_jsonable(checks), "errors": checks.errors, "warnings": checks.warnings})
    else:
        show_tables(table_of_checks(checks))
        new_console().print(f"{len(checks.checks_run)} checks: {checks.errors} errors, {checks.warnings} warnings")
    if checks.errors:
        raise typer.Exit(FAILED)


def benchmark(
    models: Annotated[list[Path], typer.Argument(help="ONNX files, measured side by side.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeat for several.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Float precisions measured for float graphs.")] = None,
    engine: Engine = ENGINE.name,
    threads: Threads = ENGINE.threads,
    duration: Annotated[
        float, typer.Option(help="Seconds measured per file, precision and batch size.")
    ] = BENCHMARK.duration_s,
    as_json: Json = False,
) -> None:
    """Measure latency and throughput of ONNX files side by side."""
    from ptq.api import benchmark_files
    from ptq.records.base import to_jsonable
    from ptq.report.terminal import table_of_benchmark

    check_choice("engine", engine, ENGINES)
    results = benchmark_files(
        models,
        batch_sizes=batch_size or BENCHMARK.batch_sizes,
        precisions=precision or [],
        engine=engine,
        threads=threads,
        duration_s=duration,
    )
    if as_json:
        print_json(to_jsonable(results))
    else:
        show_tables(table_of_benchmark(results))


def report(run: Annotated[Path, typer.Argument(help="Output folder of a run.")], as_json: Json = False) -> None:
    """Print the verdict of a finished run."""
    path = run / "verdict.json"
    if not path.is_file():
        raise UsageError(
            f"{run} holds no verdict.json. Expected the output folder of a finished run of `ptq quantize`."
        )
    try:
        verdict = Verdict.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(
            f"{path} is not a verdict of this version: {error.error_count()} fields do not fit."
        ) from error
    show_verdict(verdict, run, as_json)


def view(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8080,
    browse: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Show a graph in netron until interrupted."""
    if not model.is_file():
        raise UsageError(f"Model {model} does not exist. Give the path of an ONNX file.")
    import netron

    netron.start(str(model), address=("127.0.0.1", port), browse=browse)
    netron.wait()
