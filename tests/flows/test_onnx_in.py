"""From an ONNX file to a published model, without the PyTorch network."""

import hashlib
import json

import networks
import onnx
import onnx_networks
import pytest
from pydantic import ValidationError

from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from ptq.errors import CheckpointError
from ptq.records.verdict import Verdict
from ptq.storage.store import open_store

pytestmark = pytest.mark.usefixtures("prefect_backend")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network of four classes as another exporter's settings write it: static batch, BatchNorm unfolded."""
    path = tmp_path_factory.mktemp("model") / "small net.onnx"
    onnx_networks.exported(networks.small_resnet(), path, opset=13, folded=False)
    return path


def config_of(file, images, directory, **sections):
    content = {
        "model": {"checkpoint": str(file)},
        "data": {"path": str(images), "preprocessing": {"resize": 24, "crop": 24}},
        "calibration": {"trials": 2, "images": 16, "methods": ["max", "entropy"]},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
        "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
        "output": {"store": f"file://{directory / 'store'}", "directory": str(directory / "output")},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    return PtqConfig.model_validate(content)


@pytest.fixture(scope="module")
def finished(prefect_backend, model, image_folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = config_of(model, image_folder, directory, quantization={"dialects": ["cpu", "tensorrt"]})
    return config, directory, quantize_model(config)


def verdict_in(directory):
    return Verdict.model_validate_json((directory / "output" / "verdict.json").read_bytes())


def test_an_onnx_file_ends_as_a_published_int8_model(finished):
    config, directory, result = finished
    verdict = verdict_in(directory)
    assert result.accepted
    assert verdict.model == "small net"
    assert verdict.graph_checks.errors == 0
    assert verdict.int8.conv_int8_input_percent == 100
    latest = open_store(config.output.store).latest("small-net")
    assert latest["onnx_sha256"] == verdict.files["model_int8.onnx"].sha256


def test_both_dialects_and_every_candidate_are_there(finished):
    _, directory, _ = finished
    assert {"model_int8.onnx", "model_int8_tensorrt.onnx", "model_fp32.onnx"} <= {
        path.name for path in (directory / "output").iterdir()
    }
    assert len(verdict_in(directory).candidates) == 2 * 2


def test_channels_are_equalized_as_on_the_pytorch_way(finished):
    config, _, result = finished
    store = open_store(config.output.store)
    records = {
        note["stage"]: store.read_stage(note["stage"], note["key"]).record
        for note in store.run_stages(result.run_id)
        if note["stage"] in ("prepare_model", "equalize_channels")
    }
    before, after = records["prepare_model"], records["equalize_channels"]
    assert before["weights"] != after["weights"]
    assert before["fp32_onnx"] == after["fp32_onnx"]


def test_biases_are_corrected_as_on_the_pytorch_way(finished):
    config, directory, result = finished
    store = open_store(config.output.store)
    stages = [note for note in store.run_stages(result.run_id) if note["stage"] == "correct_biases"]
    assert len(stages) == 2
    fp32, int8 = (onnx.load(directory / "output" / name) for name in ("model_fp32.onnx", "model_int8.onnx"))
    biases = [
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}["block1.conv1.bias"]
        for graph in (fp32, int8)
    ]
    assert not (biases[0] == biases[1]).all()


@pytest.mark.slow
def test_a_second_run_from_an_empty_store_gives_the_same_bytes(finished, model, image_folder, tmp_path):
    _, directory, _ = finished
    quantize_model(config_of(model, image_folder, tmp_path, quantization={"dialects": ["cpu", "tensorrt"]}))
    for name in ("model_fp32.onnx", "model_int8.onnx", "model_int8_tensorrt.onnx"):
        first, second = (
            hashlib.sha256((root / "output" / name).read_bytes()).hexdigest() for root in (directory, tmp_path)
        )
        assert first == second, name


@pytest.mark.slow
def test_a_changed_file_is_loaded_again(finished, model, image_folder):
    config, _, _ = finished
    before = model.read_bytes()
    changed = onnx.load(model)
    changed.graph.doc_string = "another"
    try:
        model.write_bytes(changed.SerializeToString())
        result = quantize_model(config)
    finally:
        model.write_bytes(before)
    computed = {note["stage"] for note in open_store(config.output.store).run_stages(result.run_id)
                if not note["cached"]}  # fmt: skip
    assert "prepare_model" in computed


@pytest.mark.parametrize(
    ("fallback", "field"),
    [({"per_layer_method": True}, "per_layer_method"), ({"float_layers": 2}, "float_layers"),
     ({"qat_epochs": 1}, "qat_epochs")],
)  # fmt: skip
def test_a_fallback_that_needs_the_pytorch_network_is_refused_before_any_work(fallback, field, model, tmp_path):
    with pytest.raises(ValidationError, match=f"fallback.{field} works on the PyTorch network"):
        config_of(model, "images", tmp_path, fallback=fallback)


def test_another_networks_name_beside_an_onnx_file_is_refused(model, tmp_path):
    with pytest.raises(ValidationError, match="an ONNX file holds its own network; leave name out"):
        config_of(model, "images", tmp_path, model={"name": "resnet18"})


def test_weights_without_a_network_are_refused():
    with pytest.raises(ValidationError, match="name is missing"):
        PtqConfig.model_validate({"model": {"checkpoint": "a.pth"}, "data": {"path": "images"}})


def test_a_config_survives_its_json_form(model, tmp_path):
    config = config_of(model, "images", tmp_path)
    assert PtqConfig.model_validate_json(config.model_dump_json()) == config


def test_a_model_of_other_classes_is_refused(image_folder, tmp_path):
    path = tmp_path / "seven.onnx"
    onnx_networks.exported(networks.small_resnet(num_classes=7), path)
    with pytest.raises(CheckpointError, match="has 7 outputs, and the data has 4 classes"):
        quantize_model(config_of(path, image_folder, tmp_path))


def options(images, directory):
    (directory / "quick.yaml").write_text("benchmark: {duration_s: 0.05, warmup_ms: 1.0}\n")
    return [
        "--config", directory / "quick.yaml", "--data", images, "--resize", 24, "--crop", 24, "--method", "max",
        "--trials", 1, "--calibration-images", 8, "--engine", "openvino", "--threads", 1, "--batch-size", 1,
        "--max-drop", 100, "--min-speedup", 0, "--store", directory / "store", "--output", directory / "out", "--json",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_takes_the_file_alone(run, model, image_folder, tmp_path):
    code, out, err = run("quantize", model, *options(image_folder, tmp_path))
    assert code == 0, err
    assert json.loads(out)["model"] == "small net"
    code, out, _ = run("validate", tmp_path / "out" / "model_int8.onnx", "--dialect", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["errors"] == 0


def test_a_file_and_a_checkpoint_together_are_wrong_usage(run, model, image_folder, tmp_path):
    code, out, _ = run("quantize", model, "--checkpoint", "a.pth", *options(image_folder, tmp_path))
    assert code == 2
    assert "expected one of them" in json.loads(out)["error"]


def test_a_fallback_is_wrong_usage_on_the_command_line(run, model, image_folder, tmp_path):
    arguments = options(image_folder, tmp_path)
    (tmp_path / "quick.yaml").write_text("fallback: {qat_epochs: 2}\n")
    code, out, _ = run("quantize", model, *arguments)
    assert code == 2
    assert "fallback.qat_epochs works on the PyTorch network" in json.loads(out)["error"]


def test_a_file_that_is_no_model_fails_with_one_message(run, image_folder, tmp_path):
    (tmp_path / "a.onnx").write_text("no model")
    code, out, _ = run("quantize", tmp_path / "a.onnx", *options(image_folder, tmp_path))
    assert code == 1
    assert "is not an ONNX model" in json.loads(out)["error"]
