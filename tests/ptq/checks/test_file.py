"""Faults of the file: structure, interface, metadata, what a float file can have too."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from checked_graphs import (
    CLASSES,
    METADATA,
    Case,
    assert_found_alone,
    insert,
    message_of,
    node_of,
    put,
    rewire,
    sound_graph,
    write,
)
from onnx import ModelProto, TensorProto, helper

from ptq.checks.run import check_graph


def batchnorm_follows_the_stem(model: ModelProto) -> None:
    for name in ("gamma", "beta", "mean", "variance"):
        put(model, name, np.ones(8, np.float32))
    inputs = ["stem.out", "gamma", "beta", "mean", "variance"]
    insert(model, "stem/relu", helper.make_node("BatchNormalization", inputs, ["bn.out"], name="bn"))
    rewire(model, "stem/relu", "stem.out", "bn.out")


def dropout_is_in_training_mode(model: ModelProto) -> None:
    put(model, "ratio", np.array(0.5, np.float32))
    put(model, "training", np.array(True))
    insert(model, "fc_q/Q", helper.make_node("Dropout", ["flatten.out", "ratio", "training"], ["d.out"], name="drop"))
    rewire(model, "fc_q/Q", "flatten.out", "d.out")


def opset_becomes(version: int) -> Callable[[ModelProto], None]:
    def fault(model: ModelProto) -> None:
        model.opset_import[0].version = version

    return fault


def a_node_is_of_another_domain(model: ModelProto) -> None:
    node_of(model, "block2/relu2").domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def two_nodes_share_a_name(model: ModelProto) -> None:
    node_of(model, "right/relu").name = "left/relu"


def an_initializer_is_an_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("fc.bias", TensorProto.FLOAT, (CLASSES,)))


def there_are_two_inputs(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ("n", 1)))


def the_input_is_uint8(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    insert(model, "images_q/Q", helper.make_node("Cast", ["images"], ["cast.out"], name="cast", to=TensorProto.FLOAT))
    rewire(model, "images_q/Q", "images", "cast.out")


def the_height_is_dynamic(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"


def there_are_two_outputs(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("gap.out", TensorProto.FLOAT, ("n", 16, 1, 1)))


def the_output_is_an_image(model: ModelProto) -> None:
    node_of(model, "fc").output[0] = "raw"
    put(model, "axes", np.array([2, 3], np.int64))
    model.graph.node.append(helper.make_node("Unsqueeze", ["raw", "axes"], ["logits"], name="end"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("n", CLASSES, 1, 1)))


def the_metadata_lacks_the_trial(model: ModelProto) -> None:
    helper.set_model_props(model, {key: value for key, value in METADATA.items() if key != "ptq.trial"})


def the_metadata_is_gone(model: ModelProto) -> None:
    del model.metadata_props[:]


def a_node_computes_on_integers(model: ModelProto) -> None:
    outputs = ["dynamic.q", "dynamic.scale", "dynamic.zero_point"]
    insert(model, "gap", helper.make_node("DynamicQuantizeLinear", ["mix/relu.out"], outputs, name="dynamic"))


def the_nodes_are_out_of_order(model: ModelProto) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])


def the_output_shape_is_a_lie(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = CLASSES + 1


CASES = {
    "batch normalization left": Case(
        fault=batchnorm_follows_the_stem, check="batchnorm-foldable", severity="warning", node="bn"
    ),
    "dropout in training mode": Case(fault=dropout_is_in_training_mode, check="training-mode", node="drop"),
    # Opset 10 is the last one before QuantizeLinear had an axis, so onnx.checker finds that attribute.
    "opset 10": Case(
        fault=opset_becomes(10),
        check="opset-minimum",
        node="",
        onnx_accepts=False,
        also=frozenset({("onnx-checker", "error")}),
    ),
    "opset 18": Case(fault=opset_becomes(18), check="opset-tensorrt-8", severity="warning", node=""),
    "unknown domain": Case(fault=a_node_is_of_another_domain, check="domain-known", node="block2/relu2"),
    "name used twice": Case(fault=two_nodes_share_a_name, check="node-names-unique", node="left/relu"),
    "initializer listed as input": Case(fault=an_initializer_is_an_input, check="initializer-not-input", node=""),
    "two inputs": Case(fault=there_are_two_inputs, check="image-input", node=""),
    "uint8 input": Case(fault=the_input_is_uint8, check="image-input", node=""),
    "dynamic height": Case(fault=the_height_is_dynamic, check="input-shape", node=""),
    "other input shape": Case(
        fault=lambda model: None, check="input-shape", node="", options={"input_shape": (3, 32, 32)}
    ),
    "two outputs": Case(fault=there_are_two_outputs, check="class-output", node=""),
    "output of four dimensions": Case(fault=the_output_is_an_image, check="class-output", node=""),
    "other number of classes": Case(
        fault=lambda model: None, check="class-output", node="", options={"num_classes": 1000}
    ),
    "metadata incomplete": Case(
        fault=the_metadata_lacks_the_trial, check="metadata-complete", severity="warning", node=""
    ),
    "metadata absent": Case(fault=the_metadata_is_gone, check="metadata-absent", severity="info", node=""),
    "dynamic quantization": Case(fault=a_node_computes_on_integers, check="integer-operators", node="dynamic"),
    # onnx.checker itself is the check, so it cannot accept the fault.
    "nodes out of order": Case(fault=the_nodes_are_out_of_order, check="onnx-checker", node="", onnx_accepts=False),
    # onnx.checker finds it only because full_check runs the strict shape inference that is the check.
    "wrong output shape": Case(fault=the_output_shape_is_a_lie, check="shape-inference", node="", onnx_accepts=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_seeded_fault_is_reported_by_its_own_check_alone(tmp_path, case):
    assert_found_alone(case, tmp_path)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.onnx_accepts])
def test_onnx_checker_lets_the_fault_pass(case):
    onnx.checker.check_model(case.model(), full_check=True)


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.onnx_accepts])
def test_onnx_checker_finds_the_few_faults_that_are_recorded_as_its_own(case):
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
        onnx.checker.check_model(case.model(), full_check=True)


@pytest.mark.parametrize(("batch", "expected"), [(32, "static, 32 images"), ("n", "dynamic, called n")])
def test_the_batch_dimension_is_reported(tmp_path, batch, expected):
    model = sound_graph()
    value = {"dim_value": batch} if isinstance(batch, int) else {"dim_param": batch}
    for entry in (model.graph.input[0], model.graph.output[0]):
        entry.type.tensor_type.shape.dim[0].CopyFrom(onnx.TensorShapeProto.Dimension(**value))
    assert expected in message_of(check_graph(write(model, tmp_path)), "batch-dimension")


def test_the_metadata_of_a_float_export_does_not_make_a_file_ours(tmp_path):
    model = sound_graph()
    helper.set_model_props(model, {"ptq.checkpoint_sha256": "0" * 64, "ptq.precision": "fp32"})
    found = {finding.check for finding in check_graph(write(model, tmp_path)).findings}
    assert "metadata-absent" in found
    assert "metadata-complete" not in found
