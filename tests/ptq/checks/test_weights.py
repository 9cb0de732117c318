"""Faults of quantized weights: granularity, axis, count and fit of their scales."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from checked_graphs import (
    Builder,
    Case,
    assert_found_alone,
    largest_along,
    node_of,
    problems,
    put,
    set_axis,
    sound_graph,
    values_of,
    write,
)
from onnx import ModelProto

from ptq.checks.run import check_graph


def one_weight_channel_is_zero(model: ModelProto) -> None:
    values = values_of(model, "left.weight")
    values[5] = 0
    put(model, "left.weight", values)
    scale = values_of(model, "left.weight.scale")
    scale[5] = np.finfo(np.float32).tiny
    put(model, "left.weight.scale", scale)


def weight_is_per_tensor(model: ModelProto) -> None:
    largest = np.abs(values_of(model, "mix.weight")).max()
    put(model, "mix.weight.scale", np.array(largest / 127, np.float32))
    put(model, "mix.weight.zero_point", np.array(0, np.int8))
    set_axis(model, "mix.weight", None)


def weight_axis_becomes(name: str, axis: int | None) -> Callable[[ModelProto], None]:
    return lambda model: set_axis(model, f"{name}.weight", axis)


def weight_scales_are_one_short(model: ModelProto) -> None:
    put(model, "stem.weight.scale", values_of(model, "stem.weight.scale")[:-1])
    put(model, "stem.weight.zero_point", np.zeros(7, np.int8))


def weight_scales_follow_the_wrong_axis(model: ModelProto) -> None:
    put(model, "block2.conv2.weight.scale", largest_along(values_of(model, "block2.conv2.weight"), 1) / np.float32(127))


def weight_scales_become(factor: float) -> Callable[[ModelProto], None]:
    name = "block1.conv1.weight.scale"
    return lambda model: put(model, name, values_of(model, name) * np.float32(factor))


def a_weight_is_stored_as_int8(model: ModelProto) -> None:
    scale = values_of(model, "left.weight.scale").reshape(-1, 1, 1, 1)
    put(model, "left.int8", np.round(values_of(model, "left.weight") / scale).astype(np.int8))
    model.graph.node.remove(node_of(model, "left.weight/Q"))
    node_of(model, "left.weight/DQ").input[0] = "left.int8"


CASES = {
    "weight channel all zero": Case(
        fault=one_weight_channel_is_zero, check="weight-channel-zero", severity="warning", node="left.weight/Q"
    ),
    "weight per tensor": Case(
        fault=weight_is_per_tensor, check="weight-per-channel", severity="warning", node="mix.weight/Q"
    ),
    "axis 1 on a square convolution": Case(
        fault=weight_axis_becomes("block1.conv2", 1), check="weight-axis", node="block1.conv2.weight/Q"
    ),
    "axis 1 on another convolution": Case(
        fault=weight_axis_becomes("stem", 1), check="weight-axis", node="stem.weight/Q"
    ),
    "axis 1 on a Gemm with transB": Case(fault=weight_axis_becomes("fc", 1), check="weight-axis", node="fc.weight/Q"),
    "axis not given": Case(
        fault=weight_axis_becomes("block1.conv2", None), check="weight-axis", node="block1.conv2.weight/Q"
    ),
    "weight scales one short": Case(
        fault=weight_scales_are_one_short, check="weight-scale-count", node="stem.weight/Q"
    ),
    "weight scales along the wrong axis": Case(
        fault=weight_scales_follow_the_wrong_axis, check="weight-scale-fit", node="block2.conv2.weight/Q"
    ),
    "weight scales a hundred times too large": Case(
        fault=weight_scales_become(100), check="weight-scale-fit", node="block1.conv1.weight/Q"
    ),
    "weights saturate": Case(
        fault=weight_scales_become(0.5), check="weight-saturation", severity="warning", node="block1.conv1.weight/Q"
    ),
    "pairs that add up to more than 16 bits": Case(
        fault=weight_scales_become(0.5),
        check="weight-pair-sums",
        severity="warning",
        node="block1.conv1.weight/Q",
        dialect="cpu",
    ),
    "weight stored as int8": Case(
        fault=a_weight_is_stored_as_int8, check="weight-prequantized", severity="warning", node="left.weight/DQ"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_seeded_fault_is_reported_by_its_own_check_alone(tmp_path, case):
    assert_found_alone(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_onnx_checker_lets_the_fault_pass(case):
    onnx.checker.check_model(case.model(), full_check=True)


def upsampler(*, transposed_axis: int, linear_axis: int) -> ModelProto:
    """A transposed convolution, and a linear layer exported as Transpose and MatMul, with weights of square shape."""
    build = Builder("tensorrt")
    images = build.activation("images_q", "images", never_negative=False)
    stem = build.activation("stem_q", build.conv("stem", images, 3, 8, 3), never_negative=False)
    up = build.op("ConvTranspose", "up", stem, build.weight("up", (8, 8, 2, 2), transposed_axis), strides=[2, 2])
    pooled = build.op("GlobalAveragePool", "gap", build.activation("gap_q", up, never_negative=False))
    features = build.activation("fc_q", build.op("Flatten", "flatten", pooled), never_negative=False)
    weight = build.op("Transpose", "transpose", build.weight("fc", (8, 8), linear_axis), perm=[1, 0])
    build.op("MatMul", "fc", features, weight)
    return build.model("logits", classes=8)


def test_the_output_channels_follow_the_operator_and_a_transpose(tmp_path):
    assert problems(check_graph(write(upsampler(transposed_axis=1, linear_axis=0), tmp_path))) == set()
    checks = check_graph(write(upsampler(transposed_axis=0, linear_axis=1), tmp_path))
    assert {(found.check, found.node) for found in checks.findings if found.severity == "error"} == {
        ("weight-axis", "up.weight/Q"),
        ("weight-scale-fit", "up.weight/Q"),
        ("weight-axis", "fc.weight/Q"),
        ("weight-scale-fit", "fc.weight/Q"),
    }


def test_weights_clipped_by_a_least_squares_search_fit_their_axis(tmp_path):
    model = sound_graph()
    clip = np.random.default_rng(3).uniform(0.9, 1.0, 16).astype(np.float32)
    put(model, "block2.conv2.weight.scale", values_of(model, "block2.conv2.weight.scale") * clip)
    assert ("weight-scale-fit", "error") not in problems(check_graph(write(model, tmp_path)))


def test_stored_codes_that_use_half_of_their_range_are_no_error(tmp_path):
    model = sound_graph("cpu")
    a_weight_is_stored_as_int8(model)
    put(model, "left.int8", values_of(model, "left.int8") // 8)
    assert problems(check_graph(write(model, tmp_path), dialect="cpu")) == set()
