"""What can be said on the command line, and which config does it make?

An option that stands for a field of a config takes its type, help and default from that field: a table gives each its
name, and `options_from` adds them to a command. Every other field is set with `--set`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ptq.config import BenchmarkConfig, EngineConfig, PreprocessingConfig, PtqConfig
from ptq.config_file import config_from_mapping, load_yaml
from ptq.errors import UsageError

_Command = TypeVar("_Command", bound=Callable[..., None])
_Config = TypeVar("_Config", bound=BaseModel)

# Fields by the option that sets them: of `DataConfig`, `PtqConfig` and `TrainingConfig`.
EVALUATE = {
    "data": "path",
    **{name: f"preprocessing.{name}" for name in ("channels", "resize", "crop", "mean", "std")},
}
_DATA = {option: f"data.{field}" for option, field in EVALUATE.items()}
QUANTIZE = {
    "model": "model.name",
    "checkpoint": "model.checkpoint",
    **_DATA,
    "method": "calibration.methods",
    "trials": "calibration.trials",
    "calibration_images": "calibration.images",
    "tolerance": "calibration.tolerance_percent",
    "percentile": "calibration.percentiles",
    "seed": "calibration.seed",
    "engine": "engine.name",
    "threads": "engine.threads",
    "isa": "engine.isa",
    "dialect": "quantization.dialects",
    "weight_method": "quantization.weight_method",
    "skip_layer": "quantization.skip_layers",
    "batch_size": "benchmark.batch_sizes",
    "max_drop": "gate.max_drop_pp",
    "min_speedup": "gate.min_speedup_fp32",
    "calibration_split": "data.calibration_split",
    "selection_split": "data.selection_split",
    "test_split": "data.test_split",
    "publish_as": "model.publish_as",
    "store": "output.store",
    "output": "output.directory",
}
TRAIN = _DATA | {
    name: name for name in ("model", "output", "checkpoint", "epochs", "batch_size", "learning_rate", "seed")
}


def options_from(kind: type[BaseModel], fields: Mapping[str, str]) -> Callable[[_Command], _Command]:
    """Gives a command, in place of its `**options`, one option per field; those that it has itself stay as they are.

    An option that is not given is None.
    """

    def decorate(command: _Command) -> _Command:
        own = inspect.signature(command).parameters
        first = [parameter for parameter in own.values() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        last = [parameter for parameter in own.values() if parameter.kind is parameter.KEYWORD_ONLY]
        made = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(kind, path))
            for name, path in fields.items()
            if name not in own
        ]
        command.__signature__ = inspect.Signature([*first, *made, *last])  # type: ignore[attr-defined]
        return command

    return decorate


def config_from_options(
    kind: type[_Config],
    fields: Mapping[str, str],
    options: Mapping[str, Any],
    *,
    file: Path | None = None,
    changes: Iterable[str] | None = None,
) -> _Config:
    """Returns the config of a file, with the options given laid over it, and over both what `--set` says.

    Args:
        kind: the config.
        fields: the field each option sets.
        options: their values, None where an option was not given.
        file: YAML file that `--config` names.
        changes: what `--set` was given, each section.field=value.

    Raises:
        UsageError: the file cannot be read, a change is none, or a value cannot be used.
    """
    content = load_yaml(file) if file else {}
    given = [(fields[name], value) for name, value in options.items() if value is not None and value != []]
    for path, value in [*given, *map(_parsed, changes or ())]:
        content = _merged(content, _nested(path, value))
    source = f"Config file {file} with the options given" if file else "The options given"
    return config_from_mapping(kind, _with_implied_crop(content), source=source)


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UsageError where an option that makes no config has a value that there is not."""
    if value not in choices:
        raise UsageError(f"--{option} is {value!r}; expected one of {', '.join(choices)}.")


def described(kind: type[BaseModel], path: str) -> str:
    """Returns the help of an option that sets this field: its description, and which values there are."""
    field = _field(kind, path)
    value, is_repeated = _value_type(field)
    sentences = [field.description or ""]
    if get_origin(value) is Literal:
        sentences.append(f"One of {', '.join(map(str, get_args(value)))}.")
    if is_repeated:
        sentences.append("Repeat for several.")
    return " ".join(sentences)


def _field(kind: type[BaseModel], path: str) -> FieldInfo:
    *sections, name = path.split(".")
    below: Any = kind
    for section in sections:
        below = below.model_fields[section].annotation
    return below.model_fields[name]


def _value_type(field: FieldInfo) -> tuple[Any, bool]:
    """The type of one value of a field without its bounds, and whether the field has several."""
    is_repeated = get_origin(field.annotation) is tuple
    value = get_args(field.annotation)[0] if is_repeated else field.annotation
    return (get_args(value)[0] if get_origin(value) is Annotated else value), is_repeated


def _annotation(kind: type[BaseModel], path: str) -> Any:
    """What typer makes the option of; values are judged by the config, so that its message is the only one."""
    field = _field(kind, path)
    value, is_repeated = _value_type(field)
    if get_origin(value) is Literal:
        value = type(get_args(value)[0])
    several: Any = list
    default = "" if field.is_required() else field.default
    shown = ", ".join(map(str, default)) if is_repeated else str(default)
    text = described(kind, path) + (f" Default: {shown}." if shown else "")
    return Annotated[(several[value] if is_repeated else value) | None, typer.Option(help=text, show_default=False)]


def _parsed(change: str) -> tuple[str, Any]:
    path, equals, text = change.partition("=")
    if not (path and equals):
        raise UsageError(f"--set is {change!r}; expected section.field=value, such as --set calibration.bins=2048.")
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {path} is {text!r}, which is not valid YAML: {error}.") from error


def _nested(path: str, value: Any) -> dict[str, Any]:
    for step in reversed(path.split(".")):
        value = {step: value}
    return value


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with the changes laid over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict):
            section = result.get(key) or {}
            if not isinstance(section, dict):
                raise UsageError(f"{key} is {section!r} in the config file; expected a section with keys of its own.")
            value = _merged(section, value)
        result[key] = value
    return result


def _with_implied_crop(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a config whose crop, where none is given, is the resized side if that is below the default crop."""
    data = content.get("data", content)
    section = data.get("preprocessing") if isinstance(data, dict) else None
    if isinstance(section, dict) and "crop" not in section and isinstance(section.get("resize"), int):
        section["crop"] = min(section["resize"], INPUT.crop)
    return content


# Defaults of options that make no config.
INPUT, ENGINE, BENCHMARK = PreprocessingConfig(), EngineConfig(), BenchmarkConfig()

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs, nothing else.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any of the fields; options given here win.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="<section.field=value>",
        help="Set any field of ptq/config.py, the value written as in YAML; wins over all else. Repeat for several.",
    ),
]
Engine = Annotated[str, typer.Option(help=described(PtqConfig, "engine.name"))]
Threads = Annotated[int, typer.Option(help=described(PtqConfig, "engine.threads"))]
StoreUri = Annotated[str, typer.Option("--store", help=described(PtqConfig, "output.store"))]
PublishedModel = Annotated[str, typer.Argument(help="Name under which it was published.", show_default=False)]
