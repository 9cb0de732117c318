"""Graphs that are not what was decided: faults seeded into a candidate, each named with its layer and cause."""

import dataclasses

import networks
import numpy as np
import onnx
import pytest
import torch
from candidates import calibrated
from onnx import helper, numpy_helper

from ptq.graph.against_plan import find_difference

DIALECTS = ("cpu", "onnxruntime", "tensorrt")


@pytest.fixture(scope="module", params=DIALECTS)
def sound(request, tmp_path_factory):
    """A candidate as it should be, the FP32 graph, and what it was written from."""
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    network = calibrated(networks.small_resnet(), tmp_path_factory.mktemp("sound"), images)
    biases = {"block1.conv1": np.linspace(-1, 1, 8, dtype=np.float32)}
    path = network.write(request.param, biases)
    return onnx.load(path), onnx.load(network.fp32), network.decided(request.param, biases)


def changed(model, name, change):
    """A copy of a graph in which an initializer's numbers are others."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    (tensor,) = [each for each in copy.graph.initializer if each.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return copy


def bypassed(model, readers, position):
    """A copy of a graph in which an operand is read before its pair."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    writers = {name: node for node in copy.graph.node for name in node.output}
    for node in copy.graph.node:
        if readers(node):
            dequantize = writers[node.input[position]]
            assert dequantize.op_type == "DequantizeLinear"
            node.input[position] = writers[dequantize.input[0]].input[0]
            return copy
    raise LookupError("no such node")


def name_of(model, suffix):
    return next(each.name for each in model.graph.initializer if each.name.endswith(suffix))


def one_weight(weight):
    weight.flat[7] *= 1.5
    return weight


def test_a_sound_graph_is_what_was_decided(sound):
    assert find_difference(*sound) is None


def test_a_network_whose_channels_are_equalized_is_still_the_same(sound):
    model, fp32, decided = sound
    factors = np.exp2(np.arange(-4, 4)).reshape(8, 1, 1, 1).astype(np.float32)
    equalized = changed(model, "block1.conv2.weight", lambda weight: weight * factors)
    equalized = changed(equalized, "block1.conv2.weight.scale", lambda scale: scale * factors.ravel())
    equalized = changed(equalized, "block1.conv2.bias", lambda bias: bias * factors.ravel())
    assert find_difference(equalized, fp32, decided) is None


@pytest.mark.parametrize(
    ("name", "change", "layer", "cause", "says"),
    [
        ("block1_relu.scale", lambda scale: scale * 2, "block1_relu", "scale", "calibration chose"),
        ("block1_relu.scale", lambda scale: scale * np.float32(0.3), "block1_relu", "scale", "calibration chose"),
        ("block1_relu.zero_point", lambda zero: zero + 3, "block1_relu", "zero point", "expected"),
        ("block2.conv1.weight.zero_point", lambda zero: zero + 1, "block2.conv1", "zero point", "is not 0"),
        ("block2.conv1.weight.scale", lambda scale: scale * np.float32(4), "block2.conv1", "scale", "asks for"),
        ("block2.conv1.weight.scale", lambda scale: scale / 3, "block2.conv1", "scale", "asks for"),
        ("block1.conv2.weight", one_weight, "block1.conv2", "weight", "1 of 576 weights"),
        ("block1.conv1.bias", lambda bias: bias * 1.01, "block1.conv1", "bias", "not those corrected"),
        ("block1.conv2.bias", lambda bias: bias + 0.5, "block1.conv2", "bias", "not the network's"),
    ],
    ids=["scale", "clipped range", "zero point", "weight's zero point", "coarse weights", "clipped weights", "weight",
         "corrected bias", "bias"],
)  # fmt: skip
def test_numbers_that_are_others_are_named(sound, name, change, layer, cause, says):
    model, fp32, decided = sound
    found = find_difference(changed(model, name, lambda values: change(values).astype(values.dtype)), fp32, decided)
    assert (found.layer, found.cause, found.in_file) == (layer, cause, True)
    assert says in found.sentence


def test_scales_along_another_axis_are_named(sound):
    model, fp32, decided = sound
    turned = onnx.ModelProto.FromString(model.SerializeToString())
    for node in turned.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] == "block1.conv2.weight.scale":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", 1))
    found = find_difference(turned, fp32, decided)
    assert (found.layer, found.cause) == ("block1.conv2", "axis")


def test_a_layer_whose_input_or_weight_is_bare_is_named(sound):
    model, fp32, decided = sound
    writers = {name: node for node in model.graph.node for name in node.output}

    def is_second(node):
        source = writers.get(node.input[1]) if node.op_type == "Conv" else None
        return source is not None and source.input[1] == "block1.conv2.weight.scale"

    for position in (0, 1):
        found = find_difference(bypassed(model, is_second, position), fp32, decided)
        assert (found.layer, found.cause) == ("block1.conv2", "float")


def test_an_addition_without_a_quantized_operand_is_named(sound):
    model, fp32, decided = sound
    writers = {name: node for node in model.graph.node for name in node.output}
    add, position = next(
        (node, position)
        for node in model.graph.node
        if node.op_type == "Add"
        for position, name in enumerate(node.input)
        if writers[name].op_type == "DequantizeLinear"
    )
    found = find_difference(bypassed(model, lambda node: node.name == add.name, position), fp32, decided)
    assert (found.layer, found.cause) == (add.name, "placement")


def test_a_missing_quantizer_is_named(sound):
    model, fp32, decided = sound
    extra = dataclasses.replace(decided.plan.activations[0], name="not there", dialect=None)
    plan = dataclasses.replace(decided.plan, quantizers=(extra, *decided.plan.quantizers))
    amax = {**decided.amax, "not there": 1.0}
    found = find_difference(model, fp32, dataclasses.replace(decided, plan=plan, amax=amax))
    assert (found.layer, found.cause) == ("not there", "placement")


def test_weights_that_training_has_changed_are_not_held_against_the_network(sound):
    model, fp32, decided = sound
    trained = changed(model, "block1.conv2.weight", lambda weight: weight * np.float32(0.99))
    assert find_difference(trained, fp32, dataclasses.replace(decided, trained=True)) is None


def test_weights_too_small_for_all_their_digits_are_let_pass(sound):
    model, fp32, decided = sound

    def shrunk(weight):
        weight[3, 0, 0, 0] = np.float32(1.3e-40)
        return weight

    small = changed(model, "block1.conv2.weight", lambda weight: shrunk(weight) * np.float32(0.125))
    small = changed(small, "block1.conv2.weight.scale", lambda scale: scale / 8)
    assert find_difference(small, changed(fp32, "block1.conv2.weight", shrunk), decided) is None


def test_a_weight_that_is_dequantized_with_another_scale_is_named(sound):
    model, fp32, decided = sound
    other = changed(model, "block1.conv2.bias", lambda bias: bias)
    for node in other.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] == "block1.conv2.weight.scale":
            node.input[1] = "block2.conv1.weight.scale"
    found = find_difference(other, fp32, decided)
    assert (found.layer, found.cause) == ("block1.conv2", "scale")


def test_a_layer_that_reads_another_quantizer_is_named(sound):
    model, fp32, decided = sound
    other = changed(model, "block1.conv2.bias", lambda bias: bias)
    writers = {name: node for node in other.graph.node for name in node.output}
    by_weight = {
        writers[node.input[1]].input[1]: node
        for node in other.graph.node
        if node.op_type == "Conv" and writers[node.input[1]].op_type == "DequantizeLinear"
    }
    first, second = (by_weight[f"block1.conv{number}.weight.scale"] for number in (1, 2))
    second.input[0] = first.input[0]
    found = find_difference(other, fp32, decided)
    assert (found.layer, found.cause) == ("block1.conv2", "placement")
