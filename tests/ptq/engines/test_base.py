import numpy as np
import pytest

from ptq.engines import open_engine, tensorrt
from ptq.engines.base import int8_share, pad_batch, require_batch_size, require_classifier, time_calls
from ptq.errors import EngineBuildError, UsageError
from ptq.records.graph import LayerReport

needs_no_gpu = pytest.mark.skipif(tensorrt.find_problem() == "", reason="TensorRT is usable on this machine")


def layer(kind: str, input_type: str, output_type: str, name: str = "layer") -> LayerReport:
    return LayerReport(name=name, kind=kind, input_type=input_type, output_type=output_type, kernel="kernel")


def test_a_full_batch_is_passed_on_without_a_copy():
    images = np.ones((2, 1, 2, 2), np.float32)

    assert pad_batch(images, shape=(2, 1, 2, 2)) is images


def test_a_short_batch_is_padded_with_zero_images():
    padded = pad_batch(np.ones((1, 1, 1, 2), np.float32), shape=(3, 1, 1, 2))

    assert padded.tolist() == [[[[1, 1]]], [[[0, 0]]], [[[0, 0]]]]


def test_more_images_than_the_batch_size_are_refused():
    with pytest.raises(ValueError, match="got 3 images, expected 1 to 2"):
        pad_batch(np.ones((3, 1, 1, 1), np.float32), shape=(2, 1, 1, 1))


def test_no_image_at_all_is_refused():
    with pytest.raises(ValueError, match="got 0 images, expected 1 to 2"):
        pad_batch(np.ones((0, 1, 1, 1), np.float32), shape=(2, 1, 1, 1))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\), expected \(n, 3, 4, 4\)"):
        pad_batch(np.ones((1, 3, 8, 8), np.float32), shape=(1, 3, 4, 4))


def test_images_of_another_type_are_refused():
    with pytest.raises(ValueError, match="images are uint8, expected float32"):
        pad_batch(np.ones((1, 1, 1, 1), np.uint8), shape=(1, 1, 1, 1))


def test_the_share_counts_int8_and_uint8_of_convolutions_and_linear_layers_only():
    layers = [
        layer("convolution", "uint8", "int8"),
        layer("convolution", "int8", "fp32"),
        layer("linear", "int8", "fp32"),
        layer("convolution", "fp32", "uint8", name="stem"),
        layer("pooling", "uint8", "uint8"),
    ]

    share = int8_share(layers)

    assert (share.layers, share.int8_input_percent, share.int8_output_percent) == (4, 75.0, 50.0)
    assert share.float_layers == ("stem",)


def test_the_share_counts_every_reformat():
    assert int8_share([layer("reformat", "fp32", "int8"), layer("reformat", "int8", "fp32")]).reformats == 2


def test_without_layers_nothing_ran_in_int8():
    share = int8_share([])

    assert (share.layers, share.int8_input_percent, share.int8_output_percent) == (0, 0.0, 0.0)


def test_timing_makes_the_least_number_of_calls_when_the_duration_is_short():
    calls: list[int] = []

    latencies_ms, elapsed_s = time_calls(lambda: calls.append(1), warmup_ms=0, duration_s=1e-9, min_iterations=7)

    assert len(latencies_ms) == 7
    assert len(calls) == 8
    assert sum(latencies_ms) / 1000 == pytest.approx(elapsed_s)


def test_timing_goes_on_until_the_duration_has_passed():
    latencies_ms, elapsed_s = time_calls(lambda: None, warmup_ms=0, duration_s=0.01, min_iterations=1)

    assert elapsed_s >= 0.01
    assert len(latencies_ms) > 1


def test_warm_up_calls_are_not_in_the_latencies():
    calls: list[int] = []

    latencies_ms, _ = time_calls(lambda: calls.append(1), warmup_ms=5, duration_s=1e-9, min_iterations=1)

    assert len(latencies_ms) == 1
    assert len(calls) > 10


def test_a_graph_with_two_outputs_is_refused():
    with pytest.raises(EngineBuildError, match="observed.onnx has 1 inputs and 2 outputs; expected one of each"):
        require_classifier("observed.onnx", inputs=1, outputs=2)


def test_an_engine_for_another_batch_size_is_refused():
    with pytest.raises(EngineBuildError, match="is 1, and 32 was asked for. Export .* batch size 32"):
        require_batch_size(1, asked=32)


def test_an_unknown_engine_lists_the_engines_there_are():
    with pytest.raises(UsageError, match="'tvm'. The engines are auto, openvino, tensorrt, onnxruntime"):
        open_engine("tvm", threads=1)


def test_a_negative_number_of_threads_is_refused():
    with pytest.raises(UsageError, match="engine.threads is -1. Expected 0, for all cores"):
        open_engine("openvino", threads=-1)


@needs_no_gpu
def test_tensorrt_without_a_gpu_says_what_is_missing_and_what_to_do():
    with pytest.raises(EngineBuildError, match=r"cannot run here: .*--engine openvino.*pip install .\[tensorrt\]"):
        open_engine("tensorrt", threads=1)


@needs_no_gpu
def test_auto_takes_openvino_where_tensorrt_is_not_usable():
    assert open_engine("auto", threads=1).identity().name == "openvino"


def test_the_reference_engine_opens_by_name_with_its_threads():
    identity = open_engine("onnxruntime", threads=2).identity()

    assert (identity.name, identity.threads) == ("onnxruntime", 2)


def test_zero_threads_are_all_the_cores_of_the_process():
    assert open_engine("openvino", threads=0).identity().threads >= 1
