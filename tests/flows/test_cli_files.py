import json

import pytest
from command_line import SIZE, assert_says


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


def test_a_folder_without_a_verdict_is_no_run(run, tmp_path):
    assert_says(run("report", tmp_path), 2, "holds no verdict.json")
