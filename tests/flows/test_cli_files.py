import json

import pytest
from command_line import SIZE, assert_says

from ptq.config import ISAS
from ptq.engines.isa import playable_isas


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


@pytest.mark.skipif(not playable_isas(), reason="kernels of this processor cannot be limited")
@pytest.mark.slow
def test_a_file_is_evaluated_under_each_instruction_set(run, checkpoint, image_folder, tmp_path):
    model = ["--model", "networks:SmallResNet"]
    code, out, _ = run("export", "--checkpoint", checkpoint, *model, "--crop", 24, "--output", tmp_path)
    assert code == 0
    oldest, newest = playable_isas()[0], playable_isas()[-1]
    evaluate = ["evaluate", out.split()[0], "--data", image_folder, *SIZE, "--engine", "openvino", "--threads", 1]
    code, out, err = run(*evaluate, "--isa", oldest, "--isa", "native", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [each["isa"] for each in found["by_isa"]] == [oldest, newest]
    for each in found["by_isa"]:
        # In FP32 every instruction set agrees with ONNX Runtime.
        assert each["metrics"]["agreement_percent"] == 100
        assert each["metrics"]["sqnr_db"] > 80
        assert each["median_ms"] > 0
    code, out, _ = run(*evaluate, "--isa", "native")
    assert code == 0
    assert "OpenVINO under each instruction set" in out
    assert newest in out


@pytest.mark.parametrize(
    ("isa", "code", "parts"),
    [
        ("avx3", 2, ["The instruction set is 'avx3'", "avx512_core_vnni", "or `native`"]),
        *[(isa, 1, [f"has no {isa}; it has", "Take one of these"]) for isa in ISAS if isa not in playable_isas()][-1:],
    ],
)
def test_an_instruction_set_that_cannot_be_had_is_named_before_any_work(run, image_folder, tmp_path, isa, code, parts):
    evaluate = ["evaluate", tmp_path / "none.onnx", "--data", image_folder, *SIZE, "--engine", "openvino"]
    assert_says(run(*evaluate, "--isa", isa), code, *parts)


def test_an_engine_without_instruction_sets_is_named(run, image_folder, tmp_path):
    evaluate = ["evaluate", tmp_path / "none.onnx", "--data", image_folder, *SIZE, "--engine", "onnxruntime"]
    assert_says(run(*evaluate, "--isa", "native"), 2, "engine is onnxruntime", "--engine openvino")
