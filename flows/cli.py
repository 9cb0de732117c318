"""The `ptq` command: what a person types.

Turns options into a config and runs a flow; the other commands are in the files beside this one. Heavy libraries are
imported inside the commands, so that `ptq --help` answers at once.
"""

import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import cli_files, cli_service, cli_store
from flows.cli_environment import prepare_environment
from flows.cli_options import (
    ENGINE,
    QUANTIZE,
    TRAIN,
    Changes,
    ConfigFile,
    Json,
    StoreUri,
    Threads,
    config_from_options,
    described,
    options_from,
)
from flows.cli_output import FAILED, REJECTED, WRONG_USAGE, Terminal, fail, print_json, run_flow, show_verdict
from ptq.config import DEFAULT_STORE, DataConfig, ModelConfig, PtqConfig, TrainingConfig
from ptq.config_file import config_from_mapping
from ptq.errors import PtqError, UsageError
from ptq.extras import extra
from ptq.records.verdict import Verdict

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Runs the command; the project's own errors become one message and an exit code."""
    prepare_environment()
    # absl configures the root logger on its first record unless it has a handler, and then prints every log twice.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        app()
    except UsageError as error:
        fail(str(error), WRONG_USAGE)
    except PtqError as error:
        fail(str(error), FAILED)
    except KeyboardInterrupt:
        fail("Interrupted. Finished stages are kept; the same command goes on from there.", 130)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        sys.stdout.write(f"ptq {metadata.version('ptq-prefect')}\n")
        raise typer.Exit


@app.callback()
def root(
    is_version_asked: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """INT8 post-training quantization of PyTorch image classifiers, on Prefect."""


@app.command()
@options_from(PtqConfig, QUANTIZE)
def quantize(
    source: Annotated[
        str | None, typer.Argument(help="An FP32 classifier as .onnx, or the checkpoint.", show_default=False)
    ] = None,
    *,
    config: ConfigFile = None,
    changes: Changes = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Quantize a checkpoint or an ONNX file with every method and trial, judge the best, publish it if accepted."""
    if source and options["checkpoint"]:
        raise UsageError(f"{source} and --checkpoint {options['checkpoint']} are both given; expected one of them.")
    if source:
        options["checkpoint"] = source
    _quantize(config_from_options(PtqConfig, QUANTIZE, options, file=config, changes=changes), as_json)


def _quantize(config: PtqConfig, as_json: bool) -> None:
    from flows.quantize_model import quantize_model

    with Terminal(quiet=as_json) as terminal:
        terminal.say(f"Quantizing {config.model.name} ({config.model.checkpoint})")
        result = run_flow(quantize_model, config=config)
    folder = Path(result.output_directory)
    verdict = Verdict.model_validate_json((folder / "verdict.json").read_bytes())
    show_verdict(verdict, folder, as_json)
    if not result.accepted:
        raise typer.Exit(REJECTED)


@app.command()
@options_from(TrainingConfig, TRAIN)
def train(
    *,
    threads: Threads = ENGINE.threads,
    store: StoreUri = DEFAULT_STORE,
    config: ConfigFile = None,
    changes: Changes = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train or fine-tune an FP32 classifier on an image folder."""
    settings = config_from_options(TrainingConfig, TRAIN, options, file=config, changes=changes)
    _train(settings, store=store, threads=threads, as_json=as_json, quiet=as_json)


def _train(settings: TrainingConfig, *, store: str, threads: int, as_json: bool, quiet: bool) -> None:
    from flows.train_model import train_model

    with Terminal(quiet=quiet) as terminal:
        terminal.say(f"Training {settings.model} on {settings.data.path}")
        result = run_flow(train_model, config=settings, store=store, threads=threads)
        if result.held_out_top1_percent is not None:
            terminal.say(f"  top-1 on {settings.data.selection_split}: {result.held_out_top1_percent:.2f} %")
    if as_json:
        print_json({"checkpoint": settings.output, "held_out_top1_percent": result.held_out_top1_percent})


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Folder for images, checkpoint, store and report.")] = Path("demo"),
    trials: Annotated[int, typer.Option(help=described(PtqConfig, "calibration.trials"))] = 5,
    threads: Threads = ENGINE.threads,
    as_json: Json = False,
) -> None:
    """Run the whole job on 1,797 real handwritten digits: train, quantize, benchmark, gate, publish, report."""
    with extra("demo", needed_by="`ptq demo`"):
        from ptq.data.demo_digits import DEMO, write_digits_folder

    images, store = directory / "digits", (directory / "store").absolute().as_uri()
    write_digits_folder(images, image_size=DEMO.image_size, seed=0)
    preprocessing = {"channels": 1, "resize": DEMO.image_size, "crop": DEMO.image_size, "mean": [0.5], "std": [0.5]}
    data = config_from_mapping(
        DataConfig, {"path": str(images), "preprocessing": preprocessing}, source="The demo's data"
    )
    checkpoint = str(directory / f"{DEMO.model}_digits.pth")
    training = TrainingConfig(
        model=DEMO.model,
        data=data,
        epochs=DEMO.epochs,
        batch_size=DEMO.batch_size,
        learning_rate=DEMO.learning_rate,
        output=checkpoint,
    )
    _train(training, store=store, threads=threads, as_json=False, quiet=as_json)
    content = {
        "model": ModelConfig(name=DEMO.model, checkpoint=checkpoint, publish_as=f"{DEMO.model}-digits").model_dump(),
        "data": data.model_dump(),
        "calibration": {"trials": trials, "images": DEMO.calibration_images},
        "engine": {"threads": threads},
        "output": {"store": store, "directory": str(directory / "report")},
    }
    _quantize(config_from_mapping(PtqConfig, content, source="The demo's config"), as_json)


for command in (
    cli_files.evaluate,
    cli_files.export,
    cli_files.validate,
    cli_files.benchmark,
    cli_files.report,
    cli_files.view,
    cli_service.watch,
    cli_service.receive,
    cli_store.history,
    cli_store.restore,
    cli_store.gc,
):
    app.command()(command)


if __name__ == "__main__":
    main()
