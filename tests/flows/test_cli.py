import json
import sys
import tomllib
from pathlib import Path

import networks
import pytest
import torch
import yaml

from flows import cli
from ptq.records.verdict import Verdict


@pytest.fixture
def run(monkeypatch, capsys, prefect_backend):
    """Runs the command in this process and returns exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptq", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth"
    torch.save(networks.small_resnet().state_dict(), path)
    return path


SIZE = ["--resize", 24, "--crop", 24]


def quantize(checkpoint, images, directory, *more):
    # What is measured here is the command, not the model.
    (directory / "quick.yaml").write_text("benchmark: {duration_s: 0.05, warmup_ms: 1.0}\n")
    return [
        "quantize", "--config", directory / "quick.yaml", "--model", "networks:SmallResNet", "--checkpoint", checkpoint,
        "--data", images, *SIZE, "--method", "max", "--trials", 1, "--calibration-images", 8,
        "--engine", "openvino", "--threads", 1, "--batch-size", 1, "--max-drop", 100, "--min-speedup", 0,
        "--publish-as", "small", "--store", directory / "store", "--output", directory / "out", *more,
    ]  # fmt: skip


def test_quantize_prints_a_verdict_and_where_the_report_is(run, checkpoint, image_folder, tmp_path):
    code, out, err = run(*quantize(checkpoint, image_folder, tmp_path))
    assert code == 0, err
    assert "Accepted" in out
    assert "report.html" in out
    assert "collect_statistics" in err
    code, out, _ = run("report", tmp_path / "out")
    assert code == 0
    assert "Top-1 of every candidate" in out


def test_json_is_the_verdict_and_nothing_else(run, checkpoint, image_folder, tmp_path):
    code, out, _ = run(*quantize(checkpoint, image_folder, tmp_path, "--json"))
    assert code == 0
    assert Verdict.model_validate_json(out).best.method == "max"


def test_options_may_stand_in_a_file_and_those_given_win(run, checkpoint, image_folder, tmp_path):
    config = {
        "model": {"name": "networks:SmallResNet", "checkpoint": str(checkpoint)},
        "data": {"path": str(image_folder), "preprocessing": {"resize": 24, "crop": 24}},
        "calibration": {"methods": ["max", "mse"], "trials": 3, "images": 8},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.05},
        "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0},
        "output": {"store": str(tmp_path / "store"), "directory": str(tmp_path / "out")},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    code, out, err = run("quantize", "--config", tmp_path / "c.yaml", "--trials", 2, "--json")
    assert code == 0, err
    assert len(json.loads(out)["candidates"]) == 4


def test_a_rejected_model_ends_with_exit_code_3(run, checkpoint, image_folder, tmp_path):
    code, out, _ = run(*quantize(checkpoint, image_folder, tmp_path, "--min-speedup", 999))
    assert code == 3
    assert "Rejected" in out
    assert not (tmp_path / "store" / "models" / "small").exists()


def test_train_evaluate_export_validate_and_benchmark_one_model(run, image_folder, tmp_path):
    weights = tmp_path / "trained.pth"
    code, _, err = run(
        "train", "--data", image_folder, "--model", "networks:SmallResNet", "--epochs", 3, "--batch-size", 32,
        "--learning-rate", 0.1, *SIZE, "--output", weights, "--threads", 1, "--store", tmp_path / "store",
    )  # fmt: skip
    assert code == 0, err
    evaluate = ["--data", image_folder, "--model", "networks:SmallResNet", *SIZE, "--engine", "openvino"]
    code, out, _ = run("evaluate", weights, *evaluate, "--json")
    assert code == 0
    found = json.loads(out)
    # Four quarters of which one is bright: three epochs tell them apart far better than chance.
    assert found["top1_percent"] > 60
    right = [row[label] for label, row in enumerate(found["confusion"])]
    assert 100 * sum(right) / found["images"] == pytest.approx(found["top1_percent"])
    assert found["recall_percent"] == pytest.approx([100 * count / 12 for count in right])
    code, out, _ = run("evaluate", weights, *evaluate)
    assert code == 0
    assert "Confusion matrix: rows are labels" in out
    code, out, _ = run("export", "--checkpoint", weights, "--model", "networks:SmallResNet", "--crop", 24,
                       "--batch-size", 1, "--batch-size", 4, "--output", tmp_path / "onnx")  # fmt: skip
    assert code == 0
    files = out.split()
    assert len(files) == 2
    code, out, _ = run("validate", files[0], "--json")
    assert code == 0
    assert json.loads(out)["errors"] == 0
    code, out, _ = run("benchmark", *files, "--duration", 0.05, "--engine", "openvino", "--threads", 1)
    assert code == 0
    assert "FP32" in out


def assert_says(result, code, *parts):
    found, _, err = result
    assert "Traceback" not in err
    message = " ".join(err.split())
    for part in parts:
        assert part in message, message
    assert found == code


def test_a_missing_checkpoint(run, checkpoint, image_folder, tmp_path):
    result = run(*quantize(tmp_path / "none.pth", image_folder, tmp_path))
    assert_says(result, 1, "none.pth does not exist", "Give the path")
    assert not (tmp_path / "out" / "verdict.json").exists()


def test_a_checkpoint_of_another_architecture_names_the_first_keys(run, checkpoint, image_folder, tmp_path):
    result = run(*quantize(checkpoint, image_folder, tmp_path, "--model", "resnet18"))
    assert_says(result, 1, "does not fit resnet18", "layer1.0.conv1.weight", "Check --model")


def test_a_checkpoint_for_other_classes_names_the_head(run, image_folder, tmp_path):
    torch.save(networks.small_resnet(num_classes=7).state_dict(), tmp_path / "seven.pth")
    result = run(*quantize(tmp_path / "seven.pth", image_folder, tmp_path))
    assert_says(result, 1, "fc.weight is (7, 16), the model has (4, 16)", "number of class folders")


def test_a_pickle_that_is_no_state_dict(run, image_folder, tmp_path):
    torch.save({"epoch": 1}, tmp_path / "epoch.pth")
    result = run(*quantize(tmp_path / "epoch.pth", image_folder, tmp_path))
    assert_says(result, 1, "holds a dict with the keys ['epoch'], not a state dict", "Save model.state_dict()")


def copied(image_folder, tmp_path):
    import shutil

    shutil.copytree(image_folder, tmp_path / "images")
    return tmp_path / "images"


def test_a_corrupt_image_is_named(run, checkpoint, image_folder, tmp_path):
    images = copied(image_folder, tmp_path)
    victim = images / "test" / "north-east" / next((images / "test" / "north-east").iterdir()).name
    victim.write_bytes(victim.read_bytes()[:200])
    assert_says(run(*quantize(checkpoint, images, tmp_path)), 1, victim.name)


def test_an_empty_class_folder_is_named(run, checkpoint, image_folder, tmp_path):
    images = copied(image_folder, tmp_path)
    (images / "train" / "empty-class").mkdir()
    assert_says(run(*quantize(checkpoint, images, tmp_path)), 1, "empty-class")


def test_a_class_that_only_the_test_split_has_is_named(run, checkpoint, image_folder, tmp_path):
    images = copied(image_folder, tmp_path)
    (images / "test" / "north-east").rename(images / "test" / "upwards")
    assert_says(run(*quantize(checkpoint, images, tmp_path)), 1, "upwards")


def test_fewer_images_than_asked(run, checkpoint, image_folder, tmp_path):
    result = run(*quantize(checkpoint, image_folder, tmp_path, "--calibration-images", 500))
    assert_says(result, 1, "500", "96", "calibration")


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--method", "kl", ["calibration.methods", "kl", "'max', 'percentile', 'mse' or 'entropy'"]),
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


def test_an_unknown_network_ends_with_exit_code_2(run, checkpoint, image_folder, tmp_path):
    result = run(*quantize(checkpoint, image_folder, tmp_path, "--model", "resnet51"))
    assert_says(result, 2, "resnet51", "resnet50")


def test_an_unknown_key_in_the_config_file_is_named(run, tmp_path):
    (tmp_path / "c.yaml").write_text("calibration: {image: 3}\n")
    assert_says(run("quantize", "--config", tmp_path / "c.yaml"), 2, "calibration.image is not a known key")


def test_an_output_folder_that_cannot_be_written(run, checkpoint, image_folder, tmp_path):
    (tmp_path / "out").write_text("a file")
    result = run(*quantize(checkpoint, image_folder, tmp_path))
    assert_says(result, 2, "output.directory", "cannot be written")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tensorrt_without_a_gpu_says_what_is_missing(run, checkpoint, image_folder, tmp_path):
    result = run(*quantize(checkpoint, image_folder, tmp_path, "--engine", "tensorrt"))
    assert_says(result, 1, "tensorrt cannot run here", "--engine openvino")


def test_a_folder_without_a_verdict_is_no_run(run, tmp_path):
    assert_says(run("report", tmp_path), 2, "holds no verdict.json")


def test_version_is_that_of_the_project(run):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert run("--version") == (0, f"ptq {project['version']}\n", "")


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "train", "quantize", "evaluate", "export", "validate", "benchmark", "report", "view"):
        assert command in out


def test_a_published_model_has_a_history_that_can_be_restored_and_a_store_to_clean(
    run, checkpoint, image_folder, tmp_path
):
    store = tmp_path / "store"
    for more in ([], ["--weight-method", "mse"]):
        code, _, err = run(*quantize(checkpoint, image_folder, tmp_path, *more))
        assert code == 0, err
    code, out, _ = run("history", "small", "--store", store, "--json")
    first, second = json.loads(out)["versions"]
    assert code == 0
    assert second["replaced"] == first["version"]
    assert first["checkpoint_sha256"] == second["checkpoint_sha256"]
    assert first["config_sha256"] != second["config_sha256"]
    assert first["data_sha256"] == first["objects"]["images.parquet"]["sha256"]
    assert {"code_sha256", "versions", "published_at", "top1_percent", "fp32_top1_percent", "drop_pp"} <= set(first)
    code, out, _ = run("restore", "small", first["version"][:8], "--store", store)
    assert (code, first["version"] in out) == (0, True)
    code, out, _ = run("history", "small", "--store", store)
    assert (code, out.count(first["version"])) == (0, 5)
    code, out, _ = run("gc", "--store", store, "--json")
    assert (code, json.loads(out)["is_dry_run"]) == (0, True)
    code, out, _ = run("gc", "--store", store, "--delete")
    assert (code, "Removed" in out) == (0, True)


def test_history_and_restore_of_what_is_not_there_are_wrong_usage(run, tmp_path):
    (tmp_path / "store" / "objects").mkdir(parents=True)
    code, _, err = run("history", "small", "--store", tmp_path / "store")
    assert (code, "The models there are: none" in err) == (2, True)
    code, _, err = run("restore", "small", "aa", "--store", tmp_path / "store")
    assert code == 2


@pytest.mark.parametrize("command", [("history", "small"), ("restore", "small", "aa"), ("gc", "--delete")])
def test_a_store_that_does_not_exist_is_wrong_usage_and_is_not_created(run, tmp_path, command):
    code, _, err = run(*command, "--store", tmp_path / "stroe")
    assert (code, "stroe does not exist. Expected the store of an earlier run." in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "stroe").exists()
