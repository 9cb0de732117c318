"""Faults of placement: residual adds, shared tensors, concats, pools, nodes left in float."""

import numpy as np
import onnx
import pytest
from checked_graphs import (
    Case,
    add_pair,
    assert_found_alone,
    bottleneck,
    insert,
    message_of,
    pair_is_removed,
    problems,
    put,
    remove_pair,
    rewire,
    sound_graph,
    write,
)
from onnx import ModelProto, helper

from ptq.checks.run import check_graph


def both_residual_operands_are_quantized(model: ModelProto) -> None:
    add_pair(model, "branch", "block1.conv2.out", "block1/add")


def float_pool_beside_the_quantized_one(model: ModelProto) -> None:
    pool = helper.make_node(
        "MaxPool", ["stem/relu.out"], ["float_pool.out"], name="float_pool", kernel_shape=[2, 2], strides=[2, 2]
    )
    insert(model, "block1/add", pool)
    rewire(model, "block1/add", "stem/pool.out", "float_pool.out")


def the_convolution_branch_is_quantized_instead(model: ModelProto) -> None:
    float_pool_beside_the_quantized_one(model)
    add_pair(model, "branch", "block1.conv2.out", "block1/add")


def one_tensor_has_two_scales(model: ModelProto) -> None:
    rewire(model, "block2.downsample", "block1_q/DQ.out", "block1/relu2.out")
    add_pair(model, "second", "block1/relu2.out", "block2.downsample", scale=0.03)


def one_tensor_has_two_equal_quantizers(model: ModelProto) -> None:
    rewire(model, "block2.downsample", "block1_q/DQ.out", "block1/relu2.out")
    add_pair(model, "second", "block1/relu2.out", "block2.downsample", scale=0.02)


def concat_operands_have_two_scales(model: ModelProto) -> None:
    put(model, "right_q.scale", np.array(0.05, np.float32))
    add_pair(model, "join_q", "join.out", "mix")


def a_tangent_lies_between_two_layers(model: ModelProto) -> None:
    insert(model, "gap_q/Q", helper.make_node("Tan", ["mix/relu.out"], ["tan.out"], name="tan"))
    rewire(model, "gap_q/Q", "mix/relu.out", "tan.out")


CASES = {
    "both residual operands quantized": Case(
        fault=both_residual_operands_are_quantized, check="residual-add", node="block1/add"
    ),
    "no residual operand quantized": Case(
        fault=float_pool_beside_the_quantized_one, check="residual-add", node="block1/add"
    ),
    "downsample branch not quantized": Case(
        fault=pair_is_removed("block2.identity_q"), check="residual-add", node="block2/add"
    ),
    "wrong residual operand quantized": Case(
        fault=the_convolution_branch_is_quantized_instead, check="residual-add", node="block1/add"
    ),
    "two scales on one tensor": Case(fault=one_tensor_has_two_scales, check="tensor-one-scale", node="second/Q"),
    "two quantizers on one tensor": Case(
        fault=one_tensor_has_two_equal_quantizers, check="tensor-one-quantizer", severity="info", node="second/Q"
    ),
    "concat of two scales": Case(
        fault=concat_operands_have_two_scales, check="concat-scales", severity="warning", node="join"
    ),
    "average pool in float": Case(
        fault=pair_is_removed("gap_q"), check="average-pool-quantized", severity="warning", node="gap"
    ),
    "float node between layers": Case(
        fault=a_tangent_lies_between_two_layers, check="float-islands", severity="info", node="tan"
    ),
    "float node listed": Case(fault=a_tangent_lies_between_two_layers, check="float-nodes", severity="info", node=""),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_seeded_fault_is_reported_by_its_own_check_alone(tmp_path, case):
    assert_found_alone(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_onnx_checker_lets_the_fault_pass(case):
    onnx.checker.check_model(case.model(), full_check=True)


def test_an_allowed_pool_and_an_allowed_add_are_no_problem(tmp_path):
    model = sound_graph()
    remove_pair(model, "gap_q")
    remove_pair(model, "block2.identity_q")
    assert problems(check_graph(write(model, tmp_path), allowed_float_layers=["gap", "block2/add"])) == set()


def test_the_identity_of_a_linear_bottleneck_is_the_operand_that_other_layers_read(tmp_path):
    assert problems(check_graph(write(bottleneck(quantize_identity=True), tmp_path))) == set()
    assert problems(check_graph(write(bottleneck(quantize_identity=False), tmp_path))) == {("residual-add", "error")}


def test_float_nodes_are_counted_by_operator(tmp_path):
    model = sound_graph()
    a_tangent_lies_between_two_layers(model)
    message = message_of(check_graph(write(model, tmp_path)), "float-nodes")
    assert message.startswith("1 nodes compute in float (1 Tan): tan.")
