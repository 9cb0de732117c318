"""Faults of scales and zero points, and of the numbers of an activation."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from checked_graphs import (
    CLASSES,
    Builder,
    Case,
    assert_found_alone,
    bottleneck,
    insert,
    node_of,
    problems,
    put,
    set_axis,
    sound_graph,
    values_of,
    write,
)
from onnx import ModelProto, helper

from ptq.checks.run import check_graph


def scale_becomes(value: float) -> Callable[[ModelProto], None]:
    return lambda model: put(model, "block1.inner_q.scale", np.array(value, np.float32))


def one_weight_scale_is_zero(model: ModelProto) -> None:
    scale = values_of(model, "block1.conv1.weight.scale")
    scale[3] = 0
    put(model, "block1.conv1.weight.scale", scale)


def one_weight_channel_is_huge(model: ModelProto) -> None:
    for name in ("left.weight", "left.weight.scale"):
        values = values_of(model, name)
        values[2] *= 1e5
        put(model, name, values)


def zero_point_is_five(model: ModelProto) -> None:
    put(model, "block1.inner_q.zero_point", np.array(5, np.int8))


def weight_zero_point_is_minus_three(model: ModelProto) -> None:
    zero_points = values_of(model, "mix.weight.zero_point")
    zero_points[-1] = -3
    put(model, "mix.weight.zero_point", zero_points)


def zero_point_is_uint8(name: str) -> Callable[[ModelProto], None]:
    return lambda model: put(model, f"{name}.zero_point", values_of(model, f"{name}.zero_point").astype(np.uint8))


def zero_point_is_missing(model: ModelProto) -> None:
    for suffix in ("Q", "DQ"):
        del node_of(model, f"block1.inner_q/{suffix}").input[2]


def scale_is_computed(model: ModelProto) -> None:
    insert(model, "fc_q/Q", helper.make_node("Abs", ["fc_q.scale"], ["computed"], name="abs"))
    for suffix in ("Q", "DQ"):
        node_of(model, f"fc_q/{suffix}").input[1] = "computed"


def activation_is_per_channel(model: ModelProto) -> None:
    put(model, "block1.inner_q.scale", np.full(8, 0.02, np.float32))
    put(model, "block1.inner_q.zero_point", np.zeros(8, np.int8))
    set_axis(model, "block1.inner_q", 1)


CASES = {
    "scale 0": Case(fault=scale_becomes(0), check="qdq-scale-positive", node="block1.inner_q/Q"),
    "scale NaN": Case(fault=scale_becomes(np.nan), check="qdq-scale-positive", node="block1.inner_q/Q"),
    "scale infinite": Case(fault=scale_becomes(np.inf), check="qdq-scale-positive", node="block1.inner_q/Q"),
    "scale negative": Case(fault=scale_becomes(-0.02), check="qdq-scale-positive", node="block1.inner_q/Q"),
    "scale denormal": Case(fault=scale_becomes(1e-40), check="qdq-scale-positive", node="block1.inner_q/Q"),
    "scale of one weight channel 0": Case(
        fault=one_weight_scale_is_zero, check="qdq-scale-positive", node="block1.conv1.weight/Q"
    ),
    "scale tiny": Case(fault=scale_becomes(1e-9), check="qdq-scale-tiny", severity="warning", node="block1.inner_q/Q"),
    "scales far apart": Case(
        fault=one_weight_channel_is_huge, check="qdq-scale-ratio", severity="warning", node="left.weight/Q"
    ),
    "zero point 5": Case(fault=zero_point_is_five, check="zero-point-zero", node="block1.inner_q/Q"),
    "zero point of a weight": Case(
        fault=weight_zero_point_is_minus_three, check="zero-point-zero", node="mix.weight/Q"
    ),
    "uint8 for TensorRT": Case(
        fault=zero_point_is_uint8("block1.inner_q"), check="zero-point-type", node="block1.inner_q/Q"
    ),
    "uint8 weight": Case(
        fault=zero_point_is_uint8("mix.weight"), check="zero-point-type", node="mix.weight/Q", dialect="cpu"
    ),
    "uint8 behind a convolution": Case(
        fault=zero_point_is_uint8("block2.identity_q"),
        check="uint8-never-negative",
        node="block2.identity_q/Q",
        dialect="cpu",
    ),
    "uint8 images": Case(
        fault=zero_point_is_uint8("images_q"), check="uint8-never-negative", node="images_q/Q", dialect="cpu"
    ),
    "zero point missing": Case(fault=zero_point_is_missing, check="zero-point-present", node="block1.inner_q/DQ"),
    "scale computed": Case(fault=scale_is_computed, check="qdq-scale-constant", node="fc_q/Q"),
    "activation per channel": Case(
        fault=activation_is_per_channel, check="activation-per-tensor", node="block1.inner_q/Q"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_seeded_fault_is_reported_by_its_own_check_alone(tmp_path, case):
    assert_found_alone(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_onnx_checker_lets_the_fault_pass(case):
    onnx.checker.check_model(case.model(), full_check=True)


@pytest.mark.parametrize("through", ["Constant", "Identity"])
def test_scales_may_come_from_constant_nodes_and_identities(tmp_path, through):
    model = sound_graph()
    moved = [tensor for tensor in model.graph.initializer if tensor.name.endswith((".scale", ".zero_point"))]
    for tensor in moved:
        if through == "Constant":
            model.graph.initializer.remove(tensor)
            node = helper.make_node("Constant", [], [tensor.name], name=f"{tensor.name}/const", value=tensor)
        else:
            node = helper.make_node("Identity", [f"{tensor.name}.raw"], [tensor.name], name=f"{tensor.name}/same")
            tensor.name += ".raw"
        model.graph.node.insert(0, node)
    assert len(moved) == 42
    assert problems(check_graph(write(model, tmp_path))) == set()


def test_a_clip_from_zero_proves_a_tensor_never_negative_and_one_from_below_does_not(tmp_path):
    model = bottleneck(quantize_identity=True, dialect="cpu")
    assert problems(check_graph(write(model, tmp_path))) == set()
    put(model, "low", np.array(-1, np.float32))
    assert problems(check_graph(write(model, tmp_path))) == {("uint8-never-negative", "error")}


def depthwise_graph() -> ModelProto:
    """A 3 x 3 convolution and a depthwise one, whose input has a scale per channel, as NNCF writes it for CPUs."""
    build = Builder("cpu")
    images = build.activation("images_q", "images", never_negative=False)
    stem = build.op("Relu", "stem/relu", build.conv("stem", images, 3, 8, 3))
    stem = build.qdq("stem_q", stem, np.full(8, 0.02, np.float32), np.zeros(8, np.uint8), axis=1)
    deep = build.op("Conv", "deep", stem, build.weight("deep", (8, 1, 3, 3), 0), group=8, kernel_shape=[3, 3])
    pooled = build.op("GlobalAveragePool", "gap", build.activation("gap_q", deep, never_negative=False))
    features = build.activation("fc_q", build.op("Flatten", "flatten", pooled), never_negative=False)
    build.op("Gemm", "fc", features, build.weight("fc", (CLASSES, 8), 0), transB=1)
    return build.model("logits")


def test_one_scale_per_channel_before_a_depthwise_convolution_is_an_error_for_tensorrt_alone(tmp_path):
    path = write(depthwise_graph(), tmp_path)
    assert problems(check_graph(path, dialect="cpu")) == {("activation-depthwise", "warning")}
    assert ("activation-per-tensor", "error") in problems(check_graph(path, dialect="tensorrt"))
