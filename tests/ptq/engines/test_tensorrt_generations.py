"""Does the adapter build, inspect and run with the names that each TensorRT generation has?"""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from ptq.engines.tensorrt import TensorRtEngine
from ptq.errors import EngineBuildError
from tests.ptq.engines.test_tensorrt import save_classifier
from tests.support.recorded_tensorrt import GENERATIONS, CpuTorch, Recorded, Release

IMAGES = np.random.default_rng(2).normal(size=(3, 3, 16, 16)).astype(np.float32)
STRONG = GENERATIONS[1:]


def settings(precision, batch_size=4):
    return {"precision": precision, "batch_size": batch_size, "float_remainder": "fp32"}


@pytest.fixture
def open_release(monkeypatch):
    def open_it(version, **options):
        release = Release(version)
        monkeypatch.setitem(sys.modules, "tensorrt", release.module())
        engine = TensorRtEngine(**options)
        engine._torch = CpuTorch(torch)
        return engine, release

    return open_it


@pytest.mark.parametrize("version", GENERATIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_graph_is_built_loaded_and_run_with_the_names_of_the_release(version, precision, tmp_path, open_release):
    path = save_classifier(tmp_path / "a.onnx", quantized=precision == "int8")
    engine, _ = open_release(version)
    built = engine.build(path, **settings(precision))
    found = engine.load(built.blob, **settings(precision))(IMAGES)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"images": IMAGES})[0]
    # Float16 has 11 bits, and one code of the pooled activations is 1 % of the logits.
    tolerance = 1e-5 if precision == "fp32" else 0.02
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)
    expected_type = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}[precision]
    assert {layer.input_type for layer in built.layers if layer.kind == "convolution"} == {expected_type}


@pytest.mark.parametrize("version", STRONG)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_strongly_typed_release_gets_a_graph_with_fp16_tensors_and_no_precision_flag(
    version, precision, tmp_path, open_release
):
    engine, release = open_release(version)
    engine.build(save_classifier(tmp_path / "a.onnx", quantized=precision == "int8"), **settings(precision))
    parsed = onnx.load_model_from_string(release.parsed)
    kinds = {tensor.data_type for tensor in parsed.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    assert parsed.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert release.network_flags == {"STRONGLY_TYPED"}
    assert release.set_flags == {"TF32"}


def test_release_8_gets_the_file_as_it_is_with_flags_for_int8_and_fp16(tmp_path, open_release):
    path = save_classifier(tmp_path / "a.onnx", quantized=True)
    engine, release = open_release("8.6.0")
    engine.build(path, **settings("int8"))
    assert release.parsed == path.read_bytes()
    assert release.network_flags == {"EXPLICIT_BATCH"}
    assert release.set_flags == {"INT8", "FP16", "TF32"}


@pytest.mark.parametrize("version", GENERATIONS)
def test_fp32_is_built_without_tf32_from_the_file_as_it_is(version, tmp_path, open_release):
    path = save_classifier(tmp_path / "a.onnx", quantized=False)
    engine, release = open_release(version)
    engine.build(path, **settings("fp32"))
    assert release.parsed == path.read_bytes()
    assert (release.set_flags, release.cleared_flags) == (frozenset(), {"TF32"})


@pytest.mark.parametrize("version", GENERATIONS)
def test_a_free_batch_dimension_gets_a_profile_of_equal_bounds(version, tmp_path, open_release):
    engine, release = open_release(version)
    built = engine.build(save_classifier(tmp_path / "a.onnx", quantized=False), **settings("fp32", 7))
    assert release.profile.get_shape("images") == ((7, 3, 16, 16),) * 3
    with pytest.raises(EngineBuildError, match="is 7, and 4 was asked for"):
        engine.load(built.blob, **settings("fp32", 4))


@pytest.mark.parametrize("version", GENERATIONS)
def test_the_settings_of_a_build_are_recorded(version, tmp_path, open_release):
    engine, _ = open_release(version)
    built = engine.build(save_classifier(tmp_path / "a.onnx", quantized=True), **settings("int8"))
    found = dict(setting.split(": ", 1) for setting in built.settings)
    assert found["optimization level"] == "3"
    assert found["timing cache"] == "none before"
    assert found["device memory"] == "4096 bytes"
    assert found["engine size"] == f"{len(built.blob)} bytes"
    assert found["typing"] == ("by flags" if version.startswith("8") else "strong")
    assert ("CUDNN" in found["tactic sources"]) == (not version.startswith("11"))


def test_the_timing_cache_of_a_build_is_known_to_the_next_engine(tmp_path, open_release):
    path = save_classifier(tmp_path / "a.onnx", quantized=True)
    first = open_release("10.16.1.11")[0].build(path, **settings("int8"))
    again = open_release("10.16.1.11", timing_cache=first.timing_cache)[0].build(path, **settings("int8"))
    assert first.timing_cache
    assert "timing cache: knew every kernel" in again.settings


def test_the_timing_cache_of_another_release_is_replaced(tmp_path, open_release):
    path = save_classifier(tmp_path / "a.onnx", quantized=True)
    old = open_release("8.6.0")[0].build(path, **settings("int8"))
    new = open_release("11.4.0.106", timing_cache=old.timing_cache)[0].build(path, **settings("int8"))
    assert new.timing_cache.startswith(b"11.4")


def huge_weight(path):
    """A float graph with a weight that float16 does not hold."""
    model = onnx.load(save_classifier(path, quantized=False))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full((10, 16), 1e6, np.float32), "fc.weight"))
    onnx.save(model, path)
    return path


def test_a_graph_beyond_float16_is_built_by_flags_where_the_release_has_them(tmp_path, open_release):
    engine, release = open_release("10.16.1.11")
    built = engine.build(huge_weight(tmp_path / "a.onnx"), **settings("fp16"))
    assert release.set_flags == {"FP16", "TF32"}
    assert "float part: FP32 graph, FP16 by flag" in built.settings


def test_a_graph_beyond_float16_is_an_error_where_types_come_from_the_graph_alone(tmp_path, open_release):
    engine, _ = open_release("11.4.0.106")
    with pytest.raises(EngineBuildError, match=r"cannot become the FP16 graph .*Constant fc\.weight holds 1e\+06"):
        engine.build(huge_weight(tmp_path / "a.onnx"), **settings("fp16"))


@pytest.mark.parametrize("version", GENERATIONS)
def test_what_the_parser_refuses_is_said(version, tmp_path, open_release):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(EngineBuildError, match=r"cannot parse a\.onnx|no ONNX model"):
        open_release(version)[0].build(path, **settings("int8"))


@pytest.mark.parametrize("version", GENERATIONS)
def test_a_build_that_fails_gives_the_reason_of_the_log(version, tmp_path, open_release):
    engine, release = open_release(version)
    release.fails_to_build = True
    with pytest.raises(EngineBuildError, match=r"cannot build a\.onnx as int8 for batches of 4 \(out of memory\)"):
        engine.build(save_classifier(tmp_path / "a.onnx", quantized=True), **settings("int8"))


def test_an_engine_of_another_release_is_refused(tmp_path, open_release):
    blob = open_release("8.6.0")[0].build(save_classifier(tmp_path / "a.onnx", quantized=True), **settings("int8")).blob
    with pytest.raises(EngineBuildError, match="another version.*Build the engine again"):
        open_release("11.4.0.106")[0].load(blob, **settings("int8"))


@pytest.mark.parametrize("version", GENERATIONS)
def test_transfers_are_measured_apart_from_compute(version, tmp_path, open_release):
    engine, _ = open_release(version)
    built = engine.build(save_classifier(tmp_path / "a.onnx", quantized=False), **settings("fp32", 3))
    runner = engine.load(built.blob, **settings("fp32", 3))
    found = runner.timed_transfers(IMAGES, warmup_ms=1.0, iterations=5)
    assert {len(part) for part in (found.upload_ms, found.compute_ms, found.download_ms, found.enqueue_ms)} == {5}
    assert min(found.compute_ms) > 0
    assert found.elapsed_s >= sum(found.upload_ms + found.compute_ms + found.download_ms) / 1000


@pytest.mark.parametrize(
    ("version", "kind", "name"),
    [("11.4.0.106", "IBuilderConfig", "int8_calibrator"), ("10.16.1.11", "ICudaEngine", "get_binding_shape"),
     ("8.6.0", "ICudaEngine", "device_memory_size_v2"), ("11.4.0.106", "ICudaEngine", "device_memory_size")],
)  # fmt: skip
def test_the_record_lacks_what_the_release_lacks(version, kind, name):
    recorded = Recorded(kind, Release(version), **{name: 1})
    with pytest.raises(AttributeError, match=f"{kind} of TensorRT {version} has no {name}"):
        getattr(recorded, name)
    with pytest.raises(AttributeError, match=f"has no {name}"):
        setattr(recorded, name, 2)
