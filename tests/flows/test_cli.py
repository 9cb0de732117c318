import json
import tomllib
from pathlib import Path

import networks
import pytest
import torch
import yaml
from command_line import assert_says, quantize

from ptq.records.verdict import Verdict


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the same job runs twice: only the first one computes."""
    return tmp_path_factory.mktemp("job")


def test_quantize_prints_a_verdict_and_where_the_report_is(run, checkpoint, image_folder, directory):
    code, out, err = run(*quantize(checkpoint, image_folder, directory))
    assert code == 0, err
    assert "Accepted" in out
    assert "report.html" in out
    assert "collect_statistics" in err
    # What images go through, and what will be in INT8, before anything is calibrated.
    lines = " ".join(err.partition("collect_statistics")[0].split())
    assert "Images are resized to 24 and cropped to 24 (bilinear), then mean 0.485/0.456/0.406" in lines
    assert "INT8: 7 of 7 convolutions and linear layers, 100.0 % of their multiply-accumulates." in lines
    code, out, _ = run("report", directory / "out")
    assert code == 0
    assert "Top-1 of every candidate" in out


@pytest.mark.slow
def test_json_is_the_verdict_and_nothing_else(run, checkpoint, image_folder, directory):
    code, out, _ = run(*quantize(checkpoint, image_folder, directory, "--json"))
    assert code == 0
    assert Verdict.model_validate_json(out).best.method == "max"


@pytest.mark.slow
def test_options_may_stand_in_a_file_and_those_given_win(run, checkpoint, image_folder, tmp_path):
    config = {
        "model": {"name": "networks:SmallResNet", "checkpoint": str(checkpoint)},
        "data": {"path": str(image_folder), "preprocessing": {"resize": 24, "crop": 24}},
        "calibration": {"methods": ["max"], "trials": 3, "images": 8},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.05},
        "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0, "max_slowdown": 1000},
        "output": {"store": str(tmp_path / "store"), "directory": str(tmp_path / "out")},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    code, out, err = run("quantize", "--config", tmp_path / "c.yaml", "--trials", 2, "--json")
    assert code == 0, err
    assert len(json.loads(out)["candidates"]) == 2


def test_a_rejected_model_ends_with_exit_code_3(run, checkpoint, image_folder, tmp_path):
    code, out, _ = run(*quantize(checkpoint, image_folder, tmp_path, "--min-speedup", 999))
    assert code == 3
    assert "Rejected" in out
    assert not (tmp_path / "store" / "models" / "small").exists()


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


def test_an_unknown_network_ends_with_exit_code_2(run, checkpoint, image_folder, tmp_path):
    result = run(*quantize(checkpoint, image_folder, tmp_path, "--model", "resnet51"))
    assert_says(result, 2, "resnet51", "resnet50")


def test_an_output_folder_that_cannot_be_written(run, checkpoint, image_folder, tmp_path):
    (tmp_path / "out").write_text("a file")
    result = run(*quantize(checkpoint, image_folder, tmp_path))
    assert_says(result, 2, "output.directory", "cannot be written")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tensorrt_without_a_gpu_says_what_is_missing(run, checkpoint, image_folder, tmp_path):
    result = run(*quantize(checkpoint, image_folder, tmp_path, "--engine", "tensorrt"))
    assert_says(result, 1, "tensorrt cannot run here", "--engine openvino")


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("demo", "train", "quantize", "evaluate", "export", "validate", "benchmark", "report", "view"):
        assert command in out


def test_version_is_that_of_the_project(run):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert run("--version") == (0, f"ptq {project['version']}\n", "")
