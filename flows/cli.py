"""The `ptq` command: what a person types, and what the terminal shows.

Turns options into a config, runs a flow or one core call, and prints tables. Heavy libraries are imported
inside the commands, so that `ptq --help` answers at once. Exit codes: 0 accepted or done, 1 failed or checks
failed, 2 wrong usage or config, 3 rejected by the gate.
"""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from ptq.config import DataConfig, ModelConfig, PtqConfig, TrainingConfig, describe_validation_error, load_yaml
from ptq.errors import PtqError, UsageError
from ptq.extras import extra
from ptq.records.verdict import Verdict

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
FAILED, WRONG_USAGE, REJECTED = 1, 2, 3
# Quiet: the embedded server neither phones home nor gives up while a busy machine starts it.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}
# Of the embedded server; the module tells what for.
_EVENT_LOOP = "tasks.runtime.prefect_server:event_loop"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs, nothing else.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any of the options; options given here win.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of the engine; 0: all cores.")]
Engine = Annotated[str | None, typer.Option(help="auto, openvino, tensorrt or onnxruntime.")]
Channels = Annotated[int | None, typer.Option(help="Channels of the network's input, 1 or 3.")]
Resize = Annotated[int | None, typer.Option(help="Shorter side after resizing, in pixels.")]
Crop = Annotated[
    int | None,
    typer.Option(
        help="Side of the centred crop, in pixels; left out: the config's, or the resized side where that is below 224."
    ),
]
Mean = Annotated[list[float] | None, typer.Option(help="Mean per channel, in units of [0, 1]; repeat per channel.")]
Std = Annotated[list[float] | None, typer.Option(help="Standard deviation per channel; repeat per channel.")]

PublishedModel = Annotated[str, typer.Argument(help="Name under which it was published.", show_default=False)]
StoreUri = Annotated[str, typer.Option("--store", help="Store of artifacts: a folder, file:// or s3:// URI.")]
DEFAULT_STORE = "file://.ptq/store"
_UNTIL_INTERRUPTED_S = 365 * 86_400.0


class Terminal:
    """Shows stages as they end, and bars while they run if the output is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        if self._console.is_terminal and not quiet:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(), console=self._console, transient=True,
            )  # fmt: skip

    def __enter__(self) -> "Terminal":
        from tasks.runtime.progress import add_listener

        add_listener(self)
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        from tasks.runtime.progress import remove_listener

        remove_listener(self)
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Prints one line above the bars."""
        self._console.print(text, markup=False)

    def advanced(self, what: str, done: int, total: int) -> None:
        """Moves the bar of `what`."""
        if self._progress is None:
            return
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total, rate="")
        bar = self._bars[what]
        self._progress.update(bar, completed=done, total=total)
        speed = self._progress.tasks[self._progress.task_ids.index(bar)].speed
        self._progress.update(bar, rate=f"{speed:.{0 if speed >= 10 else 1}f}/s" if speed else "")
        if done >= total:
            self._progress.remove_task(self._bars.pop(what))

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Prints a line for a finished stage."""
        self.say(f"  {stage:<26} {'cached' if cached else f'{seconds:.1f} s'}")


def _environment() -> dict[str, str]:
    """What the embedded server is started with.

    A process started in this folder looks for modules here first, where `tasks` may be somebody else's; it would not
    start.
    """
    package = _EVENT_LOOP.partition(".")[0]
    here, ours = PathFinder.find_spec(package, [os.getcwd()]), find_spec(package)
    is_ours = here is None or (ours is not None and here.origin == ours.origin)
    return _ENVIRONMENT | ({"UVICORN_LOOP": _EVENT_LOOP} if is_ours else {})


def main() -> None:
    """Runs the command; the project's own errors become one message and an exit code."""
    for name, value in _environment().items():
        os.environ.setdefault(name, value)
    # absl configures the root logger on its first record unless it has a handler, and then prints every log twice.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        app()
    except UsageError as error:
        _fail(str(error), WRONG_USAGE)
    except PtqError as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        _fail("Interrupted. Finished stages are kept; the same command goes on from there.", 130)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"ptq: {message}", markup=False)
    if "--json" in sys.argv:
        _print_json({"error": message, "exit_code": code})
    raise SystemExit(code)


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table and without wrapping."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=140, soft_wrap=True)


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _validated(kind: type[BaseModel], content: dict[str, Any], source: str) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UsageError(describe_validation_error(error, source=source)) from error


def _merged(base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with the options that were given laid over it, section by section."""
    result = dict(base)
    for key, value in options.items():
        if isinstance(value, dict):
            section = result.get(key) or {}
            if not isinstance(section, dict):
                raise UsageError(f"{key} is {section!r} in the config file; expected a section with keys of its own.")
            below = _merged(section, value)
            if below:
                result[key] = below
        elif value is not None and value != []:
            result[key] = value
    return result


def _preprocessing(channels: Any, resize: Any, crop: Any, mean: Any, std: Any) -> dict[str, Any]:
    """Returns the preprocessing section of the options."""
    return {"channels": channels, "resize": resize, "crop": crop, "mean": mean, "std": std}


def _with_implied_crop(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a config whose crop, where none is given, is the resized side if that is below the default crop."""
    section = (content.get("data") or {}).get("preprocessing") if isinstance(content.get("data"), dict) else content
    if isinstance(section, dict) and "crop" not in section and isinstance(section.get("resize"), int):
        section["crop"] = min(section["resize"], 224)
    return content


def _run_flow(flow: Any, **arguments: Any) -> Any:
    """Runs a flow and returns its result; the error it failed with is raised as it was."""
    from prefect.logging.handlers import PrefectConsoleHandler
    from prefect.logging.loggers import get_logger

    # The terminal has its own lines; the run's logs go on to the server.
    for logger in (logging.getLogger(), get_logger()):
        for handler in logger.handlers:
            if isinstance(handler, PrefectConsoleHandler):
                handler.setLevel(logging.CRITICAL + 1)
    state = flow(**arguments, return_state=True)
    return state.result(raise_on_failure=True)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        sys.stdout.write(f"ptq {metadata.version('ptq-prefect')}\n")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """INT8 post-training quantization of PyTorch image classifiers, on Prefect."""


@app.command()
def quantize(
    source: Annotated[
        str | None, typer.Argument(help="An FP32 classifier as .onnx, or the checkpoint.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Torchvision classifier, or package.module:factory.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="FP32 weights or an ONNX file; a path or s3://...")] = None,
    data: Annotated[str | None, typer.Option(help="Image folder or manifest; a path or s3://...")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="max, percentile, mse or entropy; repeat for several.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Seeded draws of calibration images.")] = None,
    calibration_images: Annotated[int | None, typer.Option(help="Images in each draw.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Stop a draw once every layer's amax is this sure, in percent of amax.")
    ] = None,
    percentile: Annotated[
        list[float] | None, typer.Option(help="Share of values kept, in percent; repeat for several.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first draw.")] = None,
    engine: Engine = None,
    threads: Threads = None,
    dialect: Annotated[list[str] | None, typer.Option(help="cpu or tensorrt; repeat for both.")] = None,
    weight_method: Annotated[str | None, typer.Option(help="How weights' amax is chosen: max or mse.")] = None,
    skip_layer: Annotated[list[str] | None, typer.Option(help="Layer left in float; repeat for several.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Batch size measured; repeat for several.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest accuracy drop accepted, in percentage points.")
    ] = None,
    min_speedup: Annotated[float | None, typer.Option(help="Least speed-up over FP32 accepted.")] = None,
    channels: Channels = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    calibration_split: Annotated[str | None, typer.Option(help="Split calibration images are drawn from.")] = None,
    selection_split: Annotated[str | None, typer.Option(help="Split the best candidate is chosen on.")] = None,
    test_split: Annotated[str | None, typer.Option(help="Split the verdict is reported on.")] = None,
    publish_as: Annotated[str | None, typer.Option(help="Name under which the model is published.")] = None,
    store: Annotated[str | None, typer.Option(help="Store of artifacts, file:// URI or folder.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for report, graphs and tables.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint or an ONNX file with every method and trial, judge the best, publish it if accepted."""
    if source and checkpoint:
        raise UsageError(f"{source} and --checkpoint {checkpoint} are both given; expected one of them.")
    options = {
        "model": {"name": model, "checkpoint": source or checkpoint, "publish_as": publish_as},
        "data": {
            "path": data, "calibration_split": calibration_split, "selection_split": selection_split,
            "test_split": test_split, "preprocessing": _preprocessing(channels, resize, crop, mean, std),
        },
        "quantization": {"dialects": dialect, "weight_method": weight_method, "skip_layers": skip_layer},
        "calibration": {
            "methods": method, "trials": trials, "images": calibration_images, "percentiles": percentile, "seed": seed,
            "tolerance_percent": tolerance,
        },
        "engine": {"name": engine, "threads": threads},
        "benchmark": {"batch_sizes": batch_size},
        "gate": {"max_drop_pp": max_drop, "min_speedup_fp32": min_speedup},
        "output": {"store": store, "directory": output},
    }  # fmt: skip
    content = _merged(load_yaml(config) if config else {}, options)
    source = f"Config file {config} with the options given" if config else "The options given"
    _quantize(_validated(PtqConfig, _with_implied_crop(content), source), as_json)


def _quantize(config: PtqConfig, as_json: bool) -> None:
    from flows.quantize_model import quantize_model

    with Terminal(quiet=as_json) as terminal:
        terminal.say(f"Quantizing {config.model.name} ({config.model.checkpoint})")
        result = _run_flow(quantize_model, config=config)
    folder = Path(result.output_directory)
    verdict = Verdict.model_validate_json((folder / "verdict.json").read_bytes())
    _show_verdict(verdict, folder, as_json)
    if not result.accepted:
        raise typer.Exit(REJECTED)


def _show_verdict(verdict: Verdict, folder: Path, as_json: bool) -> None:
    if as_json:
        _print_json(json.loads(verdict.model_dump_json(by_alias=True)))
        return
    from ptq.report.terminal import tables_of_verdict

    console = _console()
    for table in tables_of_verdict(verdict):
        console.print(_rich_table(table))
    for flag in verdict.red_flags:
        console.print(flag, style="bold red", markup=False)
    word = "Accepted" if verdict.gate.accepted else "Rejected"
    console.print(f"{word}: {' '.join(verdict.gate.reasons)}", markup=False)
    console.print(f"Report: {folder / 'report.html'}", markup=False)


def _rich_table(table: Any) -> RichTable:
    result = RichTable(title=table.title, title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        result.add_column(column, justify="right" if table.is_numeric(index) else "left")
    for index, row in enumerate(table.rows):
        style = "red" if index in table.alarming else "bold" if index in table.emphasized else ""
        result.add_row(*row, style=style)
    return result


@app.command()
def train(
    data: Annotated[str | None, typer.Option(help="Image folder or manifest; a path or s3://...")] = None,
    model: Annotated[str | None, typer.Option(help="Torchvision classifier, or package.module:factory.")] = None,
    output: Annotated[str | None, typer.Option(help="File that receives the weights.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Weights to start from; a path or s3://...")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and augmentation.")] = None,
    channels: Channels = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all cores.")] = 0,
    store: Annotated[str, typer.Option(help="Store of artifacts.")] = "file://.ptq/store",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Train or fine-tune an FP32 classifier on an image folder."""
    options = {
        "model": model, "output": output, "checkpoint": checkpoint, "epochs": epochs, "batch_size": batch_size,
        "learning_rate": learning_rate, "seed": seed,
        "data": {"path": data, "preprocessing": _preprocessing(channels, resize, crop, mean, std)},
    }  # fmt: skip
    content = _with_implied_crop(_merged(load_yaml(config) if config else {}, options))
    settings = _validated(TrainingConfig, content, "The options given")
    _train(settings, store=store, threads=threads, as_json=as_json, quiet=as_json)


def _train(settings: TrainingConfig, *, store: str, threads: int, as_json: bool, quiet: bool) -> None:
    from flows.train_model import train_model

    with Terminal(quiet=quiet) as terminal:
        terminal.say(f"Training {settings.model} on {settings.data.path}")
        result = _run_flow(train_model, config=settings, store=store, threads=threads)
        if result.held_out_top1_percent is not None:
            terminal.say(f"  top-1 on {settings.data.selection_split}: {result.held_out_top1_percent:.2f} %")
    if as_json:
        _print_json({"checkpoint": settings.output, "held_out_top1_percent": result.held_out_top1_percent})


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Folder for images, checkpoint, store and report.")] = Path("demo"),
    trials: Annotated[int, typer.Option(help="Seeded draws of calibration images.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all cores.")] = 0,
    as_json: Json = False,
) -> None:
    """Run the whole job on 1,797 real handwritten digits: train, quantize, benchmark, gate, publish, report."""
    with extra("demo", needed_by="`ptq demo`"):
        from ptq.data.demo_digits import DEMO, write_digits_folder

    images, store = directory / "digits", (directory / "store").absolute().as_uri()
    write_digits_folder(images, image_size=DEMO.image_size, seed=0)
    preprocessing = {"channels": 1, "resize": DEMO.image_size, "crop": DEMO.image_size, "mean": [0.5], "std": [0.5]}
    data = _validated(DataConfig, {"path": str(images), "preprocessing": preprocessing}, "The demo's data")
    checkpoint = str(directory / f"{DEMO.model}_digits.pth")
    training = TrainingConfig(
        model=DEMO.model, data=data, epochs=DEMO.epochs, batch_size=DEMO.batch_size,
        learning_rate=DEMO.learning_rate, output=checkpoint,
    )  # fmt: skip
    _train(training, store=store, threads=threads, as_json=False, quiet=as_json)
    content = {
        "model": ModelConfig(name=DEMO.model, checkpoint=checkpoint, publish_as=f"{DEMO.model}-digits").model_dump(),
        "data": data.model_dump(),
        "calibration": {"trials": trials, "images": DEMO.calibration_images},
        "engine": {"threads": threads},
        "output": {"store": store, "directory": str(directory / "report")},
    }
    _quantize(_validated(PtqConfig, content, "The demo's config"), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint or an ONNX file; a path or s3://...")],
    data: Annotated[str, typer.Option(help="Image folder or manifest; a path or s3://...")],
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "test",
    name: Annotated[str, typer.Option("--model", help="Network of a checkpoint.")] = "resnet50",
    engine: Annotated[str, typer.Option(help="auto, openvino, tensorrt or onnxruntime.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all cores.")] = 0,
    channels: Channels = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint or an ONNX file: loss, top-1, top-5, confusion matrix."""
    from ptq.api import evaluate_file
    from ptq.report.terminal import tables_of_metrics

    preprocessing = _preprocessing(channels, resize, crop, mean, std)
    content = _with_implied_crop({"data": _merged({}, {"path": data, "preprocessing": preprocessing})})["data"]
    settings = _validated(DataConfig, content, "The options given")
    _check_choice("engine", engine, ("auto", "openvino", "tensorrt", "onnxruntime"))
    found = evaluate_file(model, name=name, data=settings, split=split, engine=engine, threads=threads)
    if as_json:
        _print_json(found.to_json())
        return
    for table in tables_of_metrics(found.metrics, found.by_class, class_names=found.class_names):
        _console().print(_rich_table(table))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Option(help="File with the FP32 weights; a path or s3://...")],
    model: Annotated[str, typer.Option(help="Torchvision classifier, or package.module:factory.")] = "resnet50",
    precision: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32",
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Static batch size; repeat; none: dynamic.")
    ] = None,
    channels: Channels = None,
    crop: Annotated[int, typer.Option(help="Side of the input, in pixels.")] = 224,
    output: Annotated[Path, typer.Option(help="Folder for the ONNX files.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Export a checkpoint as FP32 or FP16 ONNX, one file per batch size."""
    from ptq.api import export_files

    _check_choice("precision", precision, ("fp32", "fp16"))
    shape = (channels or 3, crop, crop)
    written = export_files(
        checkpoint, name=model, precision=precision, batch_sizes=batch_size or [], input_shape=shape, directory=output
    )
    if as_json:
        _print_json({"files": written})
    else:
        sys.stdout.write("".join(f"{path}\n" for path in written))


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"--{option} is {value!r}; expected one of {', '.join(choices)}.")


@app.command()
def validate(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    dialect: Annotated[str | None, typer.Option(help="cpu or tensorrt; left out: told from the zero points.")] = None,
    float_layer: Annotated[list[str] | None, typer.Option(help="Layer that may stay in float; repeat.")] = None,
    as_json: Json = False,
) -> None:
    """Check a Q/DQ graph; exit code 1 if there is any error."""
    from ptq.api import check_file
    from ptq.records.base import to_jsonable
    from ptq.report.terminal import table_of_checks

    if dialect is not None:
        _check_choice("dialect", dialect, ("cpu", "tensorrt"))
    checks = check_file(model, dialect=dialect, float_layers=float_layer or ())
    if as_json:
        _print_json({**to_jsonable(checks), "errors": checks.errors, "warnings": checks.warnings})
    else:
        console = _console()
        console.print(_rich_table(table_of_checks(checks)))
        console.print(f"{len(checks.checks_run)} checks: {checks.errors} errors, {checks.warnings} warnings")
    if checks.errors:
        raise typer.Exit(FAILED)


@app.command()
def benchmark(
    models: Annotated[list[Path], typer.Argument(help="ONNX files, measured side by side.")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeat for several.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Float precisions measured for float graphs.")] = None,
    engine: Annotated[str, typer.Option(help="auto, openvino, tensorrt or onnxruntime.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all cores.")] = 0,
    duration: Annotated[float, typer.Option(help="Seconds measured per file, precision and batch size.")] = 3.0,
    as_json: Json = False,
) -> None:
    """Measure latency and throughput of ONNX files side by side."""
    from ptq.api import benchmark_files
    from ptq.records.base import to_jsonable
    from ptq.report.terminal import table_of_benchmark

    _check_choice("engine", engine, ("auto", "openvino", "tensorrt", "onnxruntime"))
    results = benchmark_files(
        models,
        batch_sizes=batch_size or [1, 32],
        precisions=precision or [],
        engine=engine,
        threads=threads,
        duration_s=duration,
    )
    if as_json:
        _print_json(to_jsonable(results))
    else:
        _console().print(_rich_table(table_of_benchmark(results)))


@app.command()
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
    _show_verdict(verdict, run, as_json)


@app.command()
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


@app.command()
def watch(
    prefix: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix with one folder for each model.")],
    store: StoreUri = DEFAULT_STORE,
    once: Annotated[bool, typer.Option("--once", help="One look, and the wait until what it saw has settled.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
    settle: Annotated[float, typer.Option(min=0.0, help="Seconds for which nobody must have written to a file.")] = 5.0,
    stalled_after: Annotated[
        float, typer.Option(min=0.0, help="Seconds after which a file whose end is missing is announced as it is.")
    ] = 600.0,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Announce nothing of what lies there at the very first watch.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Announce each new checkpoint to the Prefect server once, until interrupted."""
    _check_server()
    from flows.watch_checkpoints import watch_checkpoints

    options: dict[str, Any] = {
        "watch_for_s": 0 if once else _UNTIL_INTERRUPTED_S, "interval_s": interval, "settle_s": settle,
        "stalled_after_s": stalled_after, "skip_existing": skip_existing,
    }  # fmt: skip
    try:
        if as_json:
            _print_json({"announced": _run_flow(watch_checkpoints, prefix=prefix, store=store, **options)})
        else:
            watch_checkpoints(prefix, store, **options)
    except ConnectionError as error:
        _fail(str(error), FAILED)


@app.command()
def receive(
    prefix: Annotated[str, typer.Option(help="s3://bucket/prefix with one folder for each model.")],
    store: StoreUri = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 4201,
) -> None:
    """Take a bucket's notifications over HTTP, with the token of PTQ_RECEIVER_TOKEN, and announce new checkpoints."""
    with extra("server", needed_by="`ptq receive`"):
        from flows.receiver import receive

    receive(prefix, store, host=host, port=port)


def _check_server() -> None:
    """Makes sure that there is a Prefect server that stays, before a flow starts one that does not."""
    from tasks.service.announcements import check_server

    try:
        check_server()
    except ConnectionError as error:
        _fail(str(error), FAILED)


@app.command()
def history(model: PublishedModel, store: StoreUri = DEFAULT_STORE, as_json: Json = False) -> None:
    """List the published versions of a model, oldest first, and what made each of them."""
    from ptq.report.terminal import tables_of_history
    from ptq.storage.registry import existing_store, read_history

    entries = read_history(existing_store(store), model)
    if as_json:
        _print_json({"model": model, "versions": entries})
        return
    for table in tables_of_history(model, entries):
        _console().print(_rich_table(table))


@app.command()
def restore(
    model: PublishedModel,
    version: Annotated[str, typer.Argument(help="Version, or the beginning of it.")],
    store: StoreUri = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Publish an earlier version of a model again."""
    from ptq.records.base import to_jsonable
    from ptq.storage.registry import existing_store, restore_version

    found = restore_version(existing_store(store), model, version, now=datetime.now(UTC))
    if as_json:
        _print_json(to_jsonable(found))
    elif found.replaced == found.version:
        _console().print(f"{model} {found.version} is the latest version already.", markup=False)
    else:
        _console().print(f"Published {model} {found.version} again, replacing {found.replaced}.", markup=False)


@app.command()
def gc(
    store: StoreUri = DEFAULT_STORE,
    keep_days: Annotated[float, typer.Option(help="Days for which the stages of a run are kept.")] = 30.0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove; otherwise only say what would be.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what no published version and no recent run needs; a dry run unless told to delete."""
    from ptq.records.base import to_jsonable
    from ptq.report.terminal import table_of_collection
    from ptq.storage.garbage import collect_garbage
    from ptq.storage.registry import existing_store

    found = collect_garbage(existing_store(store), keep_days=keep_days, now=time.time(), delete=delete)
    if as_json:
        _print_json(to_jsonable(found))
        return
    _console().print(_rich_table(table_of_collection(found)))
    if found.is_dry_run:
        _console().print("Nothing was removed. To remove it, run again with --delete.", markup=False)


if __name__ == "__main__":
    main()
