"""Is a network whose channels are last, as TensorFlow has them, as whole in INT8 as any other?"""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx_networks import GraphMaker

from ptq.config import QuantizationConfig
from ptq.quantization.prepare_onnx import prepare_onnx_model

FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]
SHAPE = (3, 8, 8)


def convolution(make, name, source, channels, *, affine):
    """A convolution between two transpositions, BatchNorm as factors and shifts behind it, and a cast for nothing."""
    make.node("Transpose", source, output=f"{name}_first", perm=FIRST)
    make.node("Conv", f"{name}_first", make.weight(f"{name}_w", 6, channels, 3, 3), output=f"{name}_y", pads=[1] * 4)
    found = make.node("Transpose", f"{name}_y", output=f"{name}_last", perm=LAST)
    for operator in affine:
        constant = make.weight(
            f"{name}_{operator}", values=np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(1, 1, 1, 6)
        )
        found = make.node(operator, found, constant, output=f"{name}_{operator}_y")
    return make.node("Cast", found, output=f"{name}_cast", to=TensorProto.FLOAT)


def network(path):
    make = GraphMaker()
    found = convolution(make, "stem", "x", 3, affine=("Add", "Sub", "Mul", "Div"))
    found = make.node("Relu", found, output="stem_relu")
    inner = make.node("Relu", convolution(make, "inner", found, 6, affine=("Sub", "Mul", "Add")), output="inner_relu")
    inner = convolution(make, "outer", inner, 6, affine=("Mul", "Add"))
    found = make.node("Relu", make.node("Add", inner, found, output="sum"), output="relu")
    make.node("ReduceMean", found, output="mean", axes=[1, 2], keepdims=0)
    make.node("Gemm", "mean", make.weight("v", 6, 4), make.weight("c", 4), output="y")
    return make.save(path, input_shape=("n", 8, 8, 3))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channels-last")
    found = prepare_onnx_model(
        checkpoint=network(folder / "m.onnx"), class_count=4, has_named_classes=True, input_shape=SHAPE,
        quantization=QuantizationConfig(), directory=folder,
    )  # fmt: skip
    return folder / "m.onnx", found


def test_no_transposition_and_no_factor_is_left(prepared):
    operators = [node.op_type for node in onnx.load(prepared[1].files["fp32_onnx"]).graph.node]
    assert sorted(operators) == sorted(["Conv", "Relu"] * 3 + ["Add", "ReduceMean", "Gemm"])


def test_every_layer_and_the_residual_add_are_quantized(prepared):
    coverage, plan = prepared[1].coverage, prepared[1].plan
    assert (coverage.int8_layers, coverage.layers) == (4, 4)
    assert (plan.quantized_residual_adds, plan.residual_adds) == (1, 1)
    assert any("channels last" in note for note in prepared[1].warnings)


def test_the_function_stays(prepared):
    path, found = prepared
    images = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)

    def run(file, given):
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: given})[0]

    expected = run(path, np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(run(found.files["fp32_onnx"], images), expected, rtol=1e-4, atol=1e-4)


def test_the_same_file_gives_the_same_bytes(prepared, tmp_path):
    path, found = prepared
    again = prepare_onnx_model(
        checkpoint=path, class_count=4, has_named_classes=True, input_shape=SHAPE, quantization=QuantizationConfig(),
        directory=tmp_path,
    )  # fmt: skip
    for name, file in found.files.items():
        assert file.read_bytes() == again.files[name].read_bytes()
