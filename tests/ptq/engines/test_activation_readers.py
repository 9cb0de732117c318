import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import openvino
import psutil
import pytest
import torch
from networks import Untraceable, small_resnet
from onnx import TensorProto, helper, numpy_helper

from ptq.config import QuantizationConfig
from ptq.engines import open_activation_readers
from ptq.engines.base import StreamingReader
from ptq.errors import EngineBuildError
from ptq.quantization.prepare_torch import prepare_torch_model

SHAPE = (3, 16, 16)


def image(seed):
    return np.random.default_rng(seed).standard_normal((1, *SHAPE)).astype(np.float32)


def observed_graph(directory, network, name):
    torch.save(network.state_dict(), directory / "small.pth")
    model = prepare_torch_model(
        name=name, checkpoint=directory / "small.pth", class_count=4, has_named_classes=True, input_shape=SHAPE,
        quantization=QuantizationConfig(), directory=directory,
    )  # fmt: skip
    return model.files["observed_onnx"]


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    return observed_graph(tmp_path_factory.mktemp("model"), small_resnet(), "networks:SmallResNet")


def outputs_of(graph, pixels):
    """The observed tensors as plain outputs of the graph."""
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled([pixels]).values())[1:]


def test_a_reader_gives_the_graphs_own_outputs_to_the_bit(observed):
    (reader,) = open_activation_readers(observed, workers=1)
    found, expected = reader(image(0)), outputs_of(observed, image(0))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_model_that_cannot_be_traced_is_read_too(tmp_path):
    graph = observed_graph(tmp_path, Untraceable(), "networks:Untraceable")
    (reader,) = open_activation_readers(graph, workers=1)
    pairs = zip(reader(image(0)), outputs_of(graph, image(0)), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)


def test_what_a_reader_gave_stays_when_it_reads_on(observed):
    (reader,) = open_activation_readers(observed, workers=1)
    first = reader(image(0))
    reader(image(1))
    assert all(np.array_equal(*pair) for pair in zip(first, outputs_of(observed, image(0)), strict=True))


def test_every_tensor_is_handed_over_once(observed):
    (reader,) = open_activation_readers(observed, workers=1)
    assert isinstance(reader, StreamingReader)
    seen = []
    reader.stream(image(0), lambda index, tensor: seen.append(index))
    assert sorted(seen) == list(range(len(outputs_of(observed, image(0)))))


def test_readers_that_run_at_the_same_time_keep_to_their_own_images(observed):
    readers = open_activation_readers(observed, workers=2)

    def read(number):
        return [[tensor.tobytes() for tensor in readers[number](image(seed))] for seed in range(number, 40, 2)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read, range(2)))
    for number in range(2):
        expected = [[t.tobytes() for t in outputs_of(observed, image(seed))] for seed in range(number, 6, 2)]
        assert found[number][: len(expected)] == expected


def test_an_error_of_the_observer_comes_out_as_it_is_and_the_reader_goes_on(observed):
    (reader,) = open_activation_readers(observed, workers=1)
    calls = []

    def refuse(index, tensor):
        calls.append(index)
        raise KeyError("no such tensor")

    with pytest.raises(KeyError, match="no such tensor"):
        reader.stream(image(0), refuse)
    assert len(calls) == 1
    assert len(reader(image(0))) == len(outputs_of(observed, image(0)))


def test_a_reader_that_is_dropped_is_freed_with_its_graph(observed):
    (reader,) = open_activation_readers(observed, workers=1)
    reader(image(0))
    alive = weakref.ref(reader)
    del reader
    gc.collect()
    assert alive() is None


@pytest.mark.slow
def test_readers_that_are_dropped_do_not_keep_the_weights(tmp_path):
    weight = np.random.default_rng(0).standard_normal((768, 16_384)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["observed"]),
        helper.make_node("Relu", ["observed"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, *SHAPE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16_384]) for name in ("logits", "observed")],
        [numpy_helper.from_array(weight, "weight")],
    )
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    used = []
    for _ in range(6):
        (reader,) = open_activation_readers(path, workers=1)
        reader(image(0))
        del reader
        gc.collect()
        used.append(psutil.Process().memory_info().rss)
    # The first ones fill the allocator's own store; then less than one copy of the weights is left by four.
    assert used[-1] - used[1] < weight.nbytes


def test_a_file_that_is_no_graph_is_an_error(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineBuildError, match=r"cannot build the calibration graph broken\.onnx"):
        open_activation_readers(path, workers=1)
