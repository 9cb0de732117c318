"""Faults of layers: inputs that stay in float, and what must not be quantized."""

import numpy as np
import onnx
import pytest
from checked_graphs import (
    Case,
    add_pair,
    assert_found_alone,
    insert,
    message_of,
    node_of,
    pair_is_removed,
    problems,
    put,
    remove_pair,
    rewire,
    sound_graph,
    values_of,
    write,
)
from onnx import ModelProto, helper

from ptq.checks.run import check_graph


def bias_is_int32(model: ModelProto) -> None:
    put(model, "bias_int32", np.arange(8, dtype=np.int32))
    put(model, "bias.scale", np.full(8, 1e-4, np.float32))
    put(model, "bias.zero_point", np.zeros(8, np.int32))
    inputs = ["bias_int32", "bias.scale", "bias.zero_point"]
    insert(model, "left", helper.make_node("DequantizeLinear", inputs, ["bias.out"], name="bias/DQ", axis=0))
    rewire(model, "left", "left.bias", "bias.out")


def bias_has_a_pair(model: ModelProto) -> None:
    add_pair(model, "bias", "left.bias", "left")


def output_is_quantized(model: ModelProto) -> None:
    node_of(model, "fc").output[0] = "raw"
    model.graph.node.append(helper.make_node("Identity", ["raw"], ["logits"], name="end"))
    add_pair(model, "logits_q", "raw", "end")


def softmax_reads_quantized_logits(model: ModelProto) -> None:
    node_of(model, "fc").output[0] = "raw"
    model.graph.node.append(helper.make_node("Softmax", ["raw"], ["logits"], name="softmax"))
    add_pair(model, "logits_q", "raw", "softmax")


CASES = {
    "activation pair missing": Case(
        fault=pair_is_removed("block1.inner_q"), check="layer-quantized", node="block1.conv2"
    ),
    "weight pair missing": Case(fault=pair_is_removed("left.weight"), check="layer-quantized", node="left"),
    "weight pair of the last layer missing": Case(
        fault=pair_is_removed("fc.weight"), check="layer-quantized", node="fc"
    ),
    "bias int32": Case(fault=bias_is_int32, check="bias-float", node="left"),
    "bias behind Q/DQ": Case(fault=bias_has_a_pair, check="bias-float", node="left"),
    "output quantized": Case(fault=output_is_quantized, check="output-float", node="logits_q/DQ"),
    "softmax of quantized logits": Case(fault=softmax_reads_quantized_logits, check="softmax-float", node="softmax"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_seeded_fault_is_reported_by_its_own_check_alone(tmp_path, case):
    assert_found_alone(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_onnx_checker_lets_the_fault_pass(case):
    onnx.checker.check_model(case.model(), full_check=True)


def test_coverage_counts_layers_and_multiply_accumulates(tmp_path):
    model = sound_graph()
    remove_pair(model, "stem.weight")
    # By hand: stem 55,296; block1 2 x 36,864; block2 18,432 + 2,048 + 36,864; left, right 2,048 each; mix 4,096; fc 64.
    message = message_of(check_graph(write(model, tmp_path)), "layer-coverage")
    assert message == "9 of 10 layers have INT8 inputs (90.0 %; 71.6 % of 194,624 multiply-accumulates per image)."


@pytest.mark.parametrize("name", ["left", "block1.conv2", "block1"])
def test_an_allowed_float_layer_is_no_error(tmp_path, name):
    model = sound_graph()
    remove_pair(model, "left.weight" if name == "left" else "block1.conv2.weight")
    path = write(model, tmp_path)
    assert ("layer-quantized", "error") in problems(check_graph(path))
    assert problems(check_graph(path, allowed_float_layers=[name])) == set()


def test_an_allowed_layer_is_known_by_the_scope_of_the_exporter(tmp_path):
    model = sound_graph()
    remove_pair(model, "left.weight")
    put(model, "onnx::Conv_12", values_of(model, "left.weight"))
    rewire(model, "left", "left.weight", "onnx::Conv_12")
    node_of(model, "left").name = "/layer1/layer1.0/conv1/Conv"
    checks = check_graph(write(model, tmp_path), allowed_float_layers=["layer1.0.conv1"])
    assert problems(checks) == set()


def test_a_layer_behind_a_concat_of_two_scales_counts_as_float(tmp_path):
    model = sound_graph()
    put(model, "right_q.scale", np.array(0.05, np.float32))
    checks = check_graph(write(model, tmp_path))
    assert problems(checks) == {("concat-scales", "warning"), ("layer-quantized", "error")}
