"""Faults of pairs: a Q or a DQ alone, twice, unread, or with other numbers than its partner."""

import numpy as np
import onnx
import pytest
from checked_graphs import Case, add_pair, assert_found_alone, insert, node_of, put, rewire, set_axis
from onnx import ModelProto, TensorProto, helper


def dequantize_has_another_scale(model: ModelProto) -> None:
    put(model, "other.scale", np.array(0.021, np.float32))
    node_of(model, "gap_q/DQ").input[1] = "other.scale"


def dequantize_has_another_zero_point(model: ModelProto) -> None:
    put(model, "other.zero_point", np.array(1, np.int8))
    node_of(model, "gap_q/DQ").input[2] = "other.zero_point"


def dequantize_has_another_axis(model: ModelProto) -> None:
    set_axis(model, "block1.conv1.weight", 1, suffixes=("DQ",))


def a_pair_follows_a_pair(model: ModelProto) -> None:
    add_pair(model, "again", "gap_q/DQ.out", "gap")


def a_pair_is_read_by_nothing(model: ModelProto) -> None:
    add_pair(model, "loose", "block1/add.out", "block1/relu2")
    rewire(model, "block1/relu2", "loose/DQ.out", "block1/add.out")


def quantize_feeds_a_cast(model: ModelProto) -> None:
    insert(model, "gap", helper.make_node("Cast", ["gap_q/Q.out"], ["cast.out"], name="cast", to=TensorProto.FLOAT))


def dequantize_reads_a_cast(model: ModelProto) -> None:
    node = node_of(model, "gap_q/Q")
    cast = helper.make_node("Cast", [node.input[0]], list(node.output), name="gap_q/cast", to=TensorProto.INT8)
    node.CopyFrom(cast)


CASES = {
    "DQ with another scale": Case(fault=dequantize_has_another_scale, check="qdq-scale-matches", node="gap_q/DQ"),
    "DQ with another zero point": Case(
        fault=dequantize_has_another_zero_point, check="qdq-zero-point-matches", node="gap_q/DQ"
    ),
    "DQ with another axis": Case(
        fault=dequantize_has_another_axis, check="qdq-axis-matches", node="block1.conv1.weight/DQ"
    ),
    "double pair": Case(fault=a_pair_follows_a_pair, check="qdq-double", node="again/Q"),
    "dangling pair": Case(fault=a_pair_is_read_by_nothing, check="qdq-dangling", node="loose/DQ"),
    "Q feeds a cast": Case(fault=quantize_feeds_a_cast, check="q-feeds-dq", node="gap_q/Q"),
    "DQ reads a cast": Case(fault=dequantize_reads_a_cast, check="dq-source", node="gap_q/DQ"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_seeded_fault_is_reported_by_its_own_check_alone(tmp_path, case):
    assert_found_alone(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_onnx_checker_lets_the_fault_pass(case):
    onnx.checker.check_model(case.model(), full_check=True)
