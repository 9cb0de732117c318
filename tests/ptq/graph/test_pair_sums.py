"""Templates whose weights no processor saturates, made of layers of every kind."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptq.graph.pair_sums import limit_pair_sums, outputs_first
from ptq.numerics.saturation import LARGEST_INPUT, LARGEST_SUM, largest_sums
from ptq.records.plan import PlacementPlan, QuantizerSpec

GENERATOR = np.random.default_rng(3)
# Operator, shape of the weight, output-channel axis, groups.
LAYERS = {
    "conv": ("Conv", (8, 4, 3, 3), 0, 1),
    "grouped": ("Conv", (8, 3, 3, 3), 0, 2),
    "depthwise": ("Conv", (8, 1, 3, 3), 0, 8),
    "transposed": ("ConvTranspose", (6, 4, 2, 2), 1, 2),
    "gemm": ("Gemm", (5, 6), 0, 1),
    "matmul": ("MatMul", (6, 5), 1, 1),
}


def outputs(name):
    _, shape, axis, _ = LAYERS[name]
    return shape[axis]


def template(path, *, per_tensor=()):
    """A file with each layer on an input of its own: only weights and their scales are read."""
    nodes, constants, inputs = [], [], []
    for name, (operator, shape, axis, groups) in LAYERS.items():
        weight = GENERATOR.standard_normal(shape).astype(np.float32)
        others = tuple(index for index in range(len(shape)) if index != axis)
        scale = (np.abs(weight).max(axis=others) / 127).astype(np.float32)
        scale = scale.max() if name in per_tensor else scale
        for suffix, values in (
            ("", weight),
            (".scale", np.asarray(scale)),
            (".zero_point", np.zeros_like(scale, np.int8)),
        ):
            constants.append(numpy_helper.from_array(np.asarray(values), f"{name}.weight{suffix}"))
        pair = [f"{name}.weight.scale", f"{name}.weight.zero_point"]
        options = {"group": groups} if "Conv" in operator else {"transB": 1} if operator == "Gemm" else {}
        nodes += [
            helper.make_node("QuantizeLinear", [f"{name}.weight", *pair], [f"{name}.q"], axis=axis),
            helper.make_node("DequantizeLinear", [f"{name}.q", *pair], [f"{name}.dq"], axis=axis),
            helper.make_node(operator, [f"{name}.x", f"{name}.dq"], [f"{name}.y"], name=name, **options),
        ]
        inputs.append(helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, None))
    outputs_of = [helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None) for name in LAYERS]
    graph = helper.make_graph(nodes, "g", inputs, outputs_of, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def plan():
    weights = tuple(QuantizerSpec(f"{name}.weight", "weight", "", axis, False, (name,))
                    for name, (_, _, axis, _) in LAYERS.items())  # fmt: skip
    return PlacementPlan(weights, tuple(LAYERS), (), 0, 0, True, ())


def sums_of(path, name):
    operator, _, axis, groups = LAYERS[name]
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    weight = outputs_first(values[f"{name}.weight"], axis, operator, groups)
    scale = values[f"{name}.weight.scale"]
    scale = np.tile(np.atleast_1d(scale), len(weight) // scale.size)
    return largest_sums(weight, scale, np.full(weight.shape[1] * groups, LARGEST_INPUT), groups=groups)


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_can_saturate_any_more(tmp_path, plan, name):
    before = template(tmp_path / "native.onnx")
    limit_pair_sums(before, tmp_path / "portable.onnx", plan=plan)
    assert sums_of(tmp_path / "portable.onnx", name).max() <= LARGEST_SUM
    assert (sums_of(before, name).max() > LARGEST_SUM) == (name != "depthwise")


def test_nothing_but_scales_of_weights_changes_and_what_grew_is_counted(tmp_path, plan):
    before, after = template(tmp_path / "native.onnx"), tmp_path / "portable.onnx"
    found = limit_pair_sums(before, after, plan=plan)
    models = [onnx.load(path) for path in (before, after)]
    first, second = ({tensor.name: numpy_helper.to_array(tensor) for tensor in m.graph.initializer} for m in models)
    changed = {name for name in first if not np.array_equal(first[name], second[name])}
    assert changed == {f"{name}.weight.scale" for name in LAYERS} - {"depthwise.weight.scale"}
    factors = [second[name] / first[name] for name in changed]
    assert min(each.min() for each in factors) == 1.0
    assert found.scales == sum(map(outputs, LAYERS))
    assert found.grown == sum(int((each > 1).sum()) for each in factors)
    assert found.layers == len(LAYERS) - 1
    assert found.largest_factor == max(each.max() for each in factors) <= 2.01
    del models[0].graph.initializer[:], models[1].graph.initializer[:]
    assert models[0] == models[1]


def test_a_weight_with_one_scale_keeps_one(tmp_path, plan):
    before = template(tmp_path / "native.onnx", per_tensor={"conv"})
    limit_pair_sums(before, tmp_path / "portable.onnx", plan=plan)
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "portable.onnx").graph.initializer}
    assert values["conv.weight.scale"].shape == ()
    assert sums_of(tmp_path / "portable.onnx", "conv").max() <= LARGEST_SUM
