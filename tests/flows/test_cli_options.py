import ast
import re
from pathlib import Path
from typing import get_args

import pytest
import typer
from command_line import assert_says, quantize

from flows import cli
from flows.cli_options import EVALUATE, QUANTIZE, TRAIN, config_from_options, described
from ptq.config import DIALECTS, ENGINES, METHODS, CalibrationConfig, DataConfig, Precision, PtqConfig, TrainingConfig

COMMANDS = typer.main.get_command(cli.app).commands
GIVEN = {"model": "resnet18", "checkpoint": "a.pth", "data": "images"}


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--method", "kl", ["calibration.methods", "kl", f"{', '.join(map(repr, METHODS[:-1]))} or {METHODS[-1]!r}"]),
        ("--engine", "tvm", ["engine.name", "tvm", "openvino"]),
        ("--weight-method", "entropy", ["quantization.weight_method", "entropy", "'max' or 'mse'"]),
        ("--percentile", 101, ["calibration.percentiles.0 is 101", "less than or equal to 100"]),
        ("--tolerance", -1, ["calibration.tolerance_percent is -1", "greater than or equal to 0"]),
        ("--tolerance", 5, ["tolerance_percent is 5 and images 8", "at least 32 images"]),
        ("--trials", 0, ["calibration.trials is 0", "greater than or equal to 1"]),
        ("--crop", 32, ["crop is 32 and resize 24"]),
        ("--publish-as", "../evil", ["model.publish_as"]),
        ("--store", "ftp://x/y", ["output.store is 'ftp://x/y'", "file://"]),
    ],
)
def test_a_wrong_option_ends_with_exit_code_2(run, checkpoint, image_folder, tmp_path, option, value, parts):
    result = run(*quantize(checkpoint, image_folder, tmp_path, option, value))
    assert_says(result, 2, *parts)


def test_an_unknown_key_in_the_config_file_is_named(run, tmp_path):
    (tmp_path / "c.yaml").write_text("calibration: {image: 3}\n")
    assert_says(run("quantize", "--config", tmp_path / "c.yaml"), 2, "calibration.image is not a known key")


def changed(*changes, options=(), file=None):
    return config_from_options(PtqConfig, QUANTIZE, {**GIVEN, **dict(options)}, file=file, changes=changes)


def test_what_is_set_wins_over_an_option_and_an_option_over_the_file(run, monkeypatch, tmp_path):
    configs = []
    monkeypatch.setattr(cli, "_quantize", lambda config, as_json: configs.append(config))
    (tmp_path / "c.yaml").write_text("calibration: {trials: 3, images: 8, seed: 7}\n")
    options = ["--config", tmp_path / "c.yaml", "--trials", 2, "--calibration-images", 9]
    code, _, err = run("quantize", "a.onnx", "--data", "images", *options, "--set", "calibration.trials=4")
    assert code == 0, err
    calibration = configs[0].calibration
    assert (calibration.trials, calibration.images, calibration.seed) == (4, 9, 7)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("fallback.per_layer_method=true", "fallback.per_layer_method", True),
        ("gate.min_speedup_fp16=1.5", "gate.min_speedup_fp16", 1.5),
        ("calibration.methods=[mse, max]", "calibration.methods", ("mse", "max")),
        ("data.preprocessing.interpolation=bicubic", "data.preprocessing.interpolation", "bicubic"),
        ("data.preprocessing={resize: 300, crop: 96}", "data.preprocessing.crop", 96),
        ("output.store=s3://bucket/prefix?x=1", "output.store", "s3://bucket/prefix?x=1"),
    ],
)
def test_any_field_is_set_by_its_section_and_name_with_a_value_as_in_yaml(change, field, value):
    found = changed(change)
    for step in field.split("."):
        found = getattr(found, step)
    assert found == value


def test_an_empty_list_that_is_set_takes_the_place_of_the_one_in_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("quantization: {skip_layers: [fc]}\n")
    assert changed(file=tmp_path / "c.yaml").quantization.skip_layers == ("fc",)
    assert changed("quantization.skip_layers=[]", file=tmp_path / "c.yaml").quantization.skip_layers == ()


def test_of_two_changes_of_one_field_the_last_one_holds():
    assert changed("calibration.bins=1024", "calibration.bins=8192").calibration.bins == 8192


@pytest.mark.parametrize("how", [{"options": {"resize": 32}}, {"changes": ["data.preprocessing.resize=32"]}])
def test_the_crop_is_at_most_the_resized_side_where_none_is_given(how):
    found = config_from_options(PtqConfig, QUANTIZE, {**GIVEN, **how.get("options", {})}, changes=how.get("changes"))
    assert found.data.preprocessing.crop == 32


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("gates.max_drop_pp=1", ["gates is not a known key, expected one of model, data, quantization, calibration"]),
        ("gate.max_drop=1", ["gate.max_drop is not a known key, expected one of max_drop_pp, min_speedup_fp32"]),
        ("calibration.trials=0", ["calibration.trials is 0", "greater than or equal to 1"]),
        ("calibration.trials=many", ["calibration.trials is 'many'", "valid integer"]),
        ("calibration.bins=1000", ["calibration.bins is 1000", "1024, 2048, 4096 or 8192"]),
        ("calibration=5", ["calibration is 5", "valid dictionary"]),
        ("calibration.trials", ["--set is 'calibration.trials'; expected section.field=value, such as --set calib"]),
        ("=3", ["--set is '=3'; expected section.field=value"]),
        ("calibration.methods=[max", ["--set calibration.methods is '[max', which is not valid YAML"]),
    ],
)
def test_a_change_that_cannot_be_used_is_wrong_usage_and_says_what_there_is(run, change, parts):
    options = ["--model", "resnet18", "--checkpoint", "a.pth", "--data", "images"]
    assert_says(run("quantize", *options, "--set", change), 2, *parts)


def test_training_takes_changes_too():
    options = {"data": "images", "epochs": 3}
    found = config_from_options(TrainingConfig, TRAIN, options, changes=["augment=false", "data.test_split=val"])
    assert (found.epochs, found.augment, found.data.test_split) == (3, False, "val")


def test_a_source_and_a_checkpoint_are_one_too_many(run):
    result = run("quantize", "a.onnx", "--checkpoint", "b.onnx", "--data", "images")
    assert_says(result, 2, "a.onnx and --checkpoint b.onnx are both given; expected one of them")


@pytest.mark.parametrize(
    ("command", "kind", "fields"),
    [("quantize", PtqConfig, QUANTIZE), ("train", TrainingConfig, TRAIN), ("evaluate", DataConfig, EVALUATE)],
)
def test_every_option_has_the_help_of_the_field_it_sets(command, kind, fields):
    helps = {parameter.name: parameter.help for parameter in COMMANDS[command].params if parameter.name in fields}
    assert set(helps) == set(fields)
    assert [name for name in fields if not helps[name].startswith(described(kind, fields[name]))] == []


def test_help_names_the_values_there_are_and_the_default():
    helps = {parameter.name: parameter.help for parameter in COMMANDS["quantize"].params if parameter.name in QUANTIZE}
    assert helps["engine"].endswith(f"One of {', '.join(ENGINES)}. Default: auto.")
    chosen = CalibrationConfig().methods
    assert helps["method"].endswith(f"One of {', '.join(METHODS)}. Repeat for several. Default: {', '.join(chosen)}.")
    assert helps["mean"].endswith("Default: 0.485, 0.456, 0.406.")
    assert "Default" not in helps["checkpoint"]


def test_no_file_of_the_command_line_lists_engines_dialects_methods_or_precisions():
    names = {*ENGINES, *DIALECTS, *METHODS, *get_args(Precision)} - set(QUANTIZE)
    files = sorted(Path(cli.__file__).parent.glob("cli*.py"))
    assert len(files) == 7
    texts = [
        (file.name, node.value)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [text for text in texts if names & set(re.findall(r"\w+", text[1]))] == []
