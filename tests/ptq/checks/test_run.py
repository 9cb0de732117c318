"""One sound graph, one seeded fault per case: each must be reported by its own check and by no other."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ptq.checks.run import CHECKS, FILE_CHECKS, PROTOBUF_LIMIT_BYTES, check_graph
from ptq.errors import ExportError
from ptq.records.graph import GraphChecks
from ptq.report.terminal import table_of_checks

METADATA = {"ptq.checkpoint_sha256": "0" * 64, "ptq.method": "max", "ptq.trial": "0", "ptq.dialect": "tensorrt"}
CLASSES = 4


class Builder:
    """Collects nodes and initializers. Every method returns the name of the tensor it makes."""

    def __init__(self, dialect: str) -> None:
        self.unsigned = np.uint8 if dialect == "cpu" else np.int8
        self.random = np.random.default_rng(7)
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def constant(self, name: str, values: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def op(self, kind: str, name: str, *inputs: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def qdq(self, name: str, tensor: str, scale: np.ndarray, zero_point: np.ndarray, **axis: int) -> str:
        shared = (self.constant(f"{name}.scale", scale), self.constant(f"{name}.zero_point", zero_point))
        quantized = self.op("QuantizeLinear", f"{name}/Q", tensor, *shared, **axis)
        return self.op("DequantizeLinear", f"{name}/DQ", quantized, *shared, **axis)

    def activation(self, name: str, tensor: str, *, never_negative: bool, scale: float = 0.02) -> str:
        kind = self.unsigned if never_negative else np.int8
        return self.qdq(name, tensor, np.array(scale, np.float32), np.array(0, kind))

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        values = self.random.normal(size=shape).astype(np.float32)
        # Channels of unlike size on both axes, as in a trained network; equal ones would hide a wrong axis.
        for position in (0, 1):
            sizes = self.random.uniform(0.3, 1.0, shape[position]).astype(np.float32)
            values *= sizes.reshape([-1 if index == position else 1 for index in range(len(shape))])
        scale = largest_along(values, axis) / np.float32(127)
        self.constant(f"{name}.weight", values)
        return self.qdq(f"{name}.weight", f"{name}.weight", scale, np.zeros(shape[axis], np.int8), axis=axis)

    def conv(self, name: str, tensor: str, c_in: int, c_out: int, kernel: int, stride: int = 1) -> str:
        weight = self.weight(name, (c_out, c_in, kernel, kernel), 0)
        bias = self.constant(f"{name}.bias", self.random.normal(size=c_out).astype(np.float32))
        pads = [kernel // 2] * 4
        return self.op("Conv", name, tensor, weight, bias, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)

    def model(self, output: str, *, shape: tuple = ("n", 3, 16, 16), classes: int = CLASSES) -> ModelProto:
        self.nodes[-1].output[0] = output
        graph = helper.make_graph(
            self.nodes,
            "classifier",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ("n", classes))],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, METADATA)
        return model


def largest_along(values: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(values).max(axis=tuple(index for index in range(values.ndim) if index != axis))


def sound_graph(dialect: str = "tensorrt") -> ModelProto:
    """A stem with a pool, a basic block, a downsample block, a concat and a head, quantized as it should be."""
    build = Builder(dialect)
    images = build.activation("images_q", "images", never_negative=False)
    stem = build.op("Relu", "stem/relu", build.conv("stem", images, 3, 8, 3))
    stem = build.activation("stem_q", stem, never_negative=True)
    stem = build.op("MaxPool", "stem/pool", stem, kernel_shape=[2, 2], strides=[2, 2])

    inner = build.op("Relu", "block1/relu1", build.conv("block1.conv1", stem, 8, 8, 3))
    inner = build.activation("block1.inner_q", inner, never_negative=True)
    block1 = build.op("Add", "block1/add", build.conv("block1.conv2", inner, 8, 8, 3), stem)
    block1 = build.activation("block1_q", build.op("Relu", "block1/relu2", block1), never_negative=True)

    inner = build.op("Relu", "block2/relu1", build.conv("block2.conv1", block1, 8, 16, 3, stride=2))
    inner = build.activation("block2.inner_q", inner, never_negative=True)
    down = build.conv("block2.downsample", block1, 8, 16, 1, stride=2)
    down = build.activation("block2.identity_q", down, never_negative=False)
    block2 = build.op("Add", "block2/add", build.conv("block2.conv2", inner, 16, 16, 3), down)
    block2 = build.activation("block2_q", build.op("Relu", "block2/relu2", block2), never_negative=True)

    branches = []
    for side in ("left", "right"):
        branch = build.op("Relu", f"{side}/relu", build.conv(side, block2, 16, 8, 1))
        branches.append(build.activation(f"{side}_q", branch, never_negative=True))
    joined = build.op("Concat", "join", *branches, axis=1)
    joined = build.op("Relu", "mix/relu", build.conv("mix", joined, 16, 16, 1))

    pooled = build.op("GlobalAveragePool", "gap", build.activation("gap_q", joined, never_negative=True))
    features = build.activation("fc_q", build.op("Flatten", "flatten", pooled), never_negative=True)
    bias = build.constant("fc.bias", np.zeros(CLASSES, np.float32))
    build.op("Gemm", "fc", features, build.weight("fc", (CLASSES, 16), 0), bias, transB=1)
    return build.model("logits")


def write(model: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def problems(checks: GraphChecks) -> set[tuple[str, str]]:
    return {(found.check, found.severity) for found in checks.findings if found.severity != "info"}


# Access to a ModelProto


def node_of(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def values_of(model: ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name)).copy()


def put(model: ModelProto, name: str, values: np.ndarray) -> None:
    """Replaces an initializer, or adds it."""
    new = numpy_helper.from_array(values, name)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(new)
            return
    model.graph.initializer.append(new)


def insert(model: ModelProto, before: str, *nodes: NodeProto) -> None:
    position = next(index for index, node in enumerate(model.graph.node) if node.name == before)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(position + offset, node)


def rewire(model: ModelProto, reader: str, old: str, new: str) -> None:
    node = node_of(model, reader)
    assert old in node.input
    node.input[:] = [new if name == old else name for name in node.input]


def remove_pair(model: ModelProto, name: str) -> None:
    """Takes a Q/DQ pair out; its readers read what the Q read."""
    source = node_of(model, f"{name}/Q").input[0]
    dequantized = node_of(model, f"{name}/DQ").output[0]
    for node in model.graph.node:
        node.input[:] = [source if tensor == dequantized else tensor for tensor in node.input]
    for suffix in ("Q", "DQ"):
        model.graph.node.remove(node_of(model, f"{name}/{suffix}"))


def add_pair(model: ModelProto, name: str, tensor: str, reader: str, *, scale: float = 0.02) -> None:
    """Puts a new Q/DQ pair between `tensor` and one of its readers."""
    put(model, f"{name}.scale", np.array(scale, np.float32))
    put(model, f"{name}.zero_point", np.array(0, np.int8))
    shared = [f"{name}.scale", f"{name}.zero_point"]
    insert(
        model,
        reader,
        helper.make_node("QuantizeLinear", [tensor, *shared], [f"{name}/Q.out"], name=f"{name}/Q"),
        helper.make_node("DequantizeLinear", [f"{name}/Q.out", *shared], [f"{name}/DQ.out"], name=f"{name}/DQ"),
    )
    rewire(model, reader, tensor, f"{name}/DQ.out")


def set_axis(model: ModelProto, name: str, axis: int | None, *, suffixes: tuple[str, ...] = ("Q", "DQ")) -> None:
    for suffix in suffixes:
        node = node_of(model, f"{name}/{suffix}")
        del node.attribute[:]
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))


# Faults


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


def one_weight_channel_is_zero(model: ModelProto) -> None:
    values = values_of(model, "left.weight")
    values[5] = 0
    put(model, "left.weight", values)
    scale = values_of(model, "left.weight.scale")
    scale[5] = np.finfo(np.float32).tiny
    put(model, "left.weight.scale", scale)


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


def dequantize_has_another_scale(model: ModelProto) -> None:
    put(model, "other.scale", np.array(0.021, np.float32))
    node_of(model, "gap_q/DQ").input[1] = "other.scale"


def dequantize_has_another_zero_point(model: ModelProto) -> None:
    put(model, "other.zero_point", np.array(1, np.int8))
    node_of(model, "gap_q/DQ").input[2] = "other.zero_point"


def dequantize_has_another_axis(model: ModelProto) -> None:
    set_axis(model, "block1.conv1.weight", 1, suffixes=("DQ",))


def scale_is_computed(model: ModelProto) -> None:
    insert(model, "fc_q/Q", helper.make_node("Abs", ["fc_q.scale"], ["computed"], name="abs"))
    for suffix in ("Q", "DQ"):
        node_of(model, f"fc_q/{suffix}").input[1] = "computed"


def pair_is_removed(name: str) -> Callable[[ModelProto], None]:
    return lambda model: remove_pair(model, name)


def activation_is_per_channel(model: ModelProto) -> None:
    put(model, "block1.inner_q.scale", np.full(8, 0.02, np.float32))
    put(model, "block1.inner_q.zero_point", np.zeros(8, np.int8))
    set_axis(model, "block1.inner_q", 1)


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


def bias_is_int32(model: ModelProto) -> None:
    put(model, "bias_int32", np.arange(8, dtype=np.int32))
    put(model, "bias.scale", np.full(8, 1e-4, np.float32))
    put(model, "bias.zero_point", np.zeros(8, np.int32))
    inputs = ["bias_int32", "bias.scale", "bias.zero_point"]
    insert(model, "left", helper.make_node("DequantizeLinear", inputs, ["bias.out"], name="bias/DQ", axis=0))
    rewire(model, "left", "left.bias", "bias.out")


def bias_has_a_pair(model: ModelProto) -> None:
    add_pair(model, "bias", "left.bias", "left")


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


def output_is_quantized(model: ModelProto) -> None:
    node_of(model, "fc").output[0] = "raw"
    model.graph.node.append(helper.make_node("Identity", ["raw"], ["logits"], name="end"))
    add_pair(model, "logits_q", "raw", "end")


def softmax_reads_quantized_logits(model: ModelProto) -> None:
    node_of(model, "fc").output[0] = "raw"
    model.graph.node.append(helper.make_node("Softmax", ["raw"], ["logits"], name="softmax"))
    add_pair(model, "logits_q", "raw", "softmax")


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


def a_weight_is_stored_as_int8(model: ModelProto) -> None:
    scale = values_of(model, "left.weight.scale").reshape(-1, 1, 1, 1)
    put(model, "left.int8", np.round(values_of(model, "left.weight") / scale).astype(np.int8))
    model.graph.node.remove(node_of(model, "left.weight/Q"))
    node_of(model, "left.weight/DQ").input[0] = "left.int8"


def the_nodes_are_out_of_order(model: ModelProto) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])


def the_output_shape_is_a_lie(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = CLASSES + 1


def a_tangent_lies_between_two_layers(model: ModelProto) -> None:
    insert(model, "gap_q/Q", helper.make_node("Tan", ["mix/relu.out"], ["tan.out"], name="tan"))
    rewire(model, "gap_q/Q", "mix/relu.out", "tan.out")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault and the one check that finds it. `also` names checks that cannot help finding the same fault."""

    fault: Callable[[ModelProto], None]
    check: str
    node: str
    severity: str = "error"
    dialect: str = "tensorrt"
    onnx_accepts: bool = True
    also: frozenset[tuple[str, str]] = frozenset()
    options: dict = field(default_factory=dict)


CASES: dict[str, Case] = {
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
    "weight channel all zero": Case(
        fault=one_weight_channel_is_zero, check="weight-channel-zero", severity="warning", node="left.weight/Q"
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
    "DQ with another scale": Case(fault=dequantize_has_another_scale, check="qdq-scale-matches", node="gap_q/DQ"),
    "DQ with another zero point": Case(
        fault=dequantize_has_another_zero_point, check="qdq-zero-point-matches", node="gap_q/DQ"
    ),
    "DQ with another axis": Case(
        fault=dequantize_has_another_axis, check="qdq-axis-matches", node="block1.conv1.weight/DQ"
    ),
    "scale computed": Case(fault=scale_is_computed, check="qdq-scale-constant", node="fc_q/Q"),
    "activation pair missing": Case(
        fault=pair_is_removed("block1.inner_q"), check="layer-quantized", node="block1.conv2"
    ),
    "weight pair missing": Case(fault=pair_is_removed("left.weight"), check="layer-quantized", node="left"),
    "weight pair of the last layer missing": Case(
        fault=pair_is_removed("fc.weight"), check="layer-quantized", node="fc"
    ),
    "activation per channel": Case(
        fault=activation_is_per_channel, check="activation-per-tensor", node="block1.inner_q/Q"
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
    "bias int32": Case(fault=bias_is_int32, check="bias-float", node="left"),
    "bias behind Q/DQ": Case(fault=bias_has_a_pair, check="bias-float", node="left"),
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
    "batch normalization left": Case(
        fault=batchnorm_follows_the_stem, check="batchnorm-foldable", severity="warning", node="bn"
    ),
    "dropout in training mode": Case(fault=dropout_is_in_training_mode, check="training-mode", node="drop"),
    "output quantized": Case(fault=output_is_quantized, check="output-float", node="logits_q/DQ"),
    "softmax of quantized logits": Case(fault=softmax_reads_quantized_logits, check="softmax-float", node="softmax"),
    "double pair": Case(fault=a_pair_follows_a_pair, check="qdq-double", node="again/Q"),
    "dangling pair": Case(fault=a_pair_is_read_by_nothing, check="qdq-dangling", node="loose/DQ"),
    "Q feeds a cast": Case(fault=quantize_feeds_a_cast, check="q-feeds-dq", node="gap_q/Q"),
    "DQ reads a cast": Case(fault=dequantize_reads_a_cast, check="dq-source", node="gap_q/DQ"),
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
    "weight stored as int8": Case(
        fault=a_weight_is_stored_as_int8, check="weight-prequantized", severity="warning", node="left.weight/DQ"
    ),
    # onnx.checker itself is the check, so it cannot accept the fault.
    "nodes out of order": Case(fault=the_nodes_are_out_of_order, check="onnx-checker", node="", onnx_accepts=False),
    # onnx.checker finds it only because full_check runs the strict shape inference that is the check.
    "wrong output shape": Case(fault=the_output_shape_is_a_lie, check="shape-inference", node="", onnx_accepts=False),
    "float node between layers": Case(
        fault=a_tangent_lies_between_two_layers, check="float-islands", severity="info", node="tan"
    ),
    "float node listed": Case(fault=a_tangent_lies_between_two_layers, check="float-nodes", severity="info", node=""),
}


@pytest.mark.parametrize("dialect", ["tensorrt", "cpu"])
def test_a_sound_graph_has_no_error_and_no_warning(tmp_path, dialect):
    checks = check_graph(
        write(sound_graph(dialect), tmp_path), dialect=dialect, input_shape=(3, 16, 16), num_classes=CLASSES
    )
    assert problems(checks) == set()
    assert checks.checks_run == tuple(check.identifier for check in CHECKS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_seeded_fault_is_reported_by_its_own_check_alone(tmp_path, case):
    model = sound_graph(case.dialect)
    case.fault(model)
    checks = check_graph(write(model, tmp_path), dialect=case.dialect, **case.options)
    expected = {(case.check, case.severity)} if case.severity != "info" else set()
    assert problems(checks) == expected | case.also
    found = [finding for finding in checks.findings if finding.check == case.check]
    assert case.node in {finding.node for finding in found}
    assert {finding.severity for finding in found} == {case.severity}
    assert all(finding.message and finding.remedy for finding in found)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.onnx_accepts])
def test_onnx_checker_lets_the_fault_pass(case):
    model = sound_graph(case.dialect)
    case.fault(model)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.onnx_accepts])
def test_onnx_checker_finds_the_few_faults_that_are_recorded_as_its_own(case):
    model = sound_graph(case.dialect)
    case.fault(model)
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
        onnx.checker.check_model(model, full_check=True)


def test_every_check_has_a_seeded_fault_or_is_a_report():
    reports = {"batch-dimension", "layer-coverage", "qdq-absent"}
    with_own_tests = {"activation-depthwise"}
    assert {case.check for case in CASES.values()} | reports | with_own_tests == {check.identifier for check in CHECKS}


def message_of(checks: GraphChecks, identifier: str) -> str:
    return next(finding.message for finding in checks.findings if finding.check == identifier)


def test_coverage_counts_layers_and_multiply_accumulates(tmp_path):
    model = sound_graph()
    remove_pair(model, "stem.weight")
    # By hand: stem 55,296; block1 2 x 36,864; block2 18,432 + 2,048 + 36,864; left, right 2,048 each; mix 4,096; fc 64.
    message = message_of(check_graph(write(model, tmp_path)), "layer-coverage")
    assert message == "9 of 10 layers have INT8 inputs (90.0 %; 71.6 % of 194,624 multiply-accumulates per image)."


@pytest.mark.parametrize(("batch", "expected"), [(32, "static, 32 images"), ("n", "dynamic, called n")])
def test_the_batch_dimension_is_reported(tmp_path, batch, expected):
    model = sound_graph()
    value = {"dim_value": batch} if isinstance(batch, int) else {"dim_param": batch}
    for entry in (model.graph.input[0], model.graph.output[0]):
        entry.type.tensor_type.shape.dim[0].CopyFrom(onnx.TensorShapeProto.Dimension(**value))
    assert expected in message_of(check_graph(write(model, tmp_path)), "batch-dimension")


def test_a_float_model_gets_the_checks_of_the_file_alone(tmp_path):
    model = sound_graph()
    for node in [node for node in model.graph.node if node.name.endswith("/Q")]:
        remove_pair(model, node.name.removesuffix("/Q"))
    checks = check_graph(write(model, tmp_path), num_classes=CLASSES)
    assert problems(checks) == set()
    assert "it is a float model" in message_of(checks, "qdq-absent")
    assert checks.checks_run == tuple(check.identifier for check in FILE_CHECKS)


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


def test_an_allowed_pool_and_an_allowed_add_are_no_problem(tmp_path):
    model = sound_graph()
    remove_pair(model, "gap_q")
    remove_pair(model, "block2.identity_q")
    assert problems(check_graph(write(model, tmp_path), allowed_float_layers=["gap", "block2/add"])) == set()


def test_the_dialect_is_read_off_the_activations(tmp_path):
    assert problems(check_graph(write(sound_graph("cpu"), tmp_path))) == set()
    assert problems(check_graph(write(sound_graph("cpu"), tmp_path), dialect="tensorrt")) == {
        ("zero-point-type", "error")
    }


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


def test_a_node_without_a_name_is_named_by_its_operator_and_output(tmp_path):
    model = sound_graph()
    remove_pair(model, "left.weight")
    node_of(model, "left").name = ""
    (finding,) = [found for found in check_graph(write(model, tmp_path)).findings if found.check == "layer-quantized"]
    assert finding.node == "Conv -> left.out"


def test_a_layer_behind_a_concat_of_two_scales_counts_as_float(tmp_path):
    model = sound_graph()
    put(model, "right_q.scale", np.array(0.05, np.float32))
    checks = check_graph(write(model, tmp_path))
    assert problems(checks) == {("concat-scales", "warning"), ("layer-quantized", "error")}


def bottleneck(*, quantize_identity: bool) -> ModelProto:
    """Two inverted residuals of a MobileNetV2: the identity of the add is a bare convolution's output."""
    build = Builder("tensorrt")
    stem = build.conv("stem", build.activation("images_q", "images", never_negative=False), 3, 8, 3)
    shared = build.activation("stem_q", stem, never_negative=False)
    expanded = build.op("Clip", "clip", build.conv("expand", shared, 8, 16, 1), build.constant("low", np.float32(0)))
    project = build.conv("project", build.activation("clip_q", expanded, never_negative=True), 16, 8, 1)
    if quantize_identity:
        add = build.op("Add", "add", shared, project)
    else:
        add = build.op("Add", "add", stem, build.activation("project_q", project, never_negative=False))
    pooled = build.op("GlobalAveragePool", "gap", build.activation("gap_q", add, never_negative=False))
    features = build.activation("fc_q", build.op("Flatten", "flatten", pooled), never_negative=False)
    bias = build.constant("fc.bias", np.zeros(CLASSES, np.float32))
    build.op("Gemm", "fc", features, build.weight("fc", (8, CLASSES), 1), bias)
    return build.model("logits")


def test_the_identity_of_a_linear_bottleneck_is_the_operand_that_other_layers_read(tmp_path):
    assert problems(check_graph(write(bottleneck(quantize_identity=True), tmp_path))) == set()
    assert problems(check_graph(write(bottleneck(quantize_identity=False), tmp_path))) == {("residual-add", "error")}


def test_a_clip_from_zero_proves_a_tensor_never_negative_and_one_from_below_does_not(tmp_path):
    model = bottleneck(quantize_identity=True)
    put(model, "clip_q.zero_point", np.array(0, np.uint8))
    assert problems(check_graph(write(model, tmp_path))) == set()
    put(model, "low", np.array(-1, np.float32))
    assert problems(check_graph(write(model, tmp_path))) == {("uint8-never-negative", "error")}


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


# Files of other makers


class _Images:
    """Two seeded batches for onnxruntime's calibrator."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._batches = [{"images": random.normal(size=(2, 3, 16, 16)).astype(np.float32)} for _ in range(2)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._batches.pop() if self._batches else None


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    model = sound_graph()
    for node in [node for node in model.graph.node if node.name.endswith("/Q")]:
        remove_pair(model, node.name.removesuffix("/Q"))
    del model.metadata_props[:]
    path = tmp_path / "float.onnx"
    onnx.save(model, str(path))
    return path


def quantized_by_onnxruntime(float_file: Path, **options: object) -> Path:
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = float_file.with_name("ort.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_static(str(float_file), str(path), _Images(), **options)
    return path


def test_the_asymmetric_qdq_file_of_onnxruntime_is_read_and_its_faults_are_named(float_file):
    from onnxruntime.quantization import QuantFormat, QuantType

    path = quantized_by_onnxruntime(float_file, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8)
    checks = check_graph(path, input_shape=(3, 16, 16), num_classes=CLASSES)
    assert problems(checks) == {
        ("bias-float", "warning"),
        ("concat-scales", "warning"),
        ("output-float", "warning"),
        ("residual-add", "warning"),
        # The quantizer drops the ReLU before a Q whose zero point is 0: the Q then clips in its place.
        ("uint8-never-negative", "error"),
        ("weight-per-channel", "warning"),
        ("zero-point-zero", "warning"),
    }


def test_the_qoperator_file_of_onnxruntime_is_read_and_refused(float_file):
    from onnxruntime.quantization import QuantFormat

    checks = check_graph(quantized_by_onnxruntime(float_file, quant_format=QuantFormat.QOperator))
    assert ("integer-operators", "error") in problems(checks)
    assert "QLinearConv" in message_of(checks, "integer-operators")


def test_the_same_file_has_errors_for_tensorrt(float_file):
    from onnxruntime.quantization import QuantFormat, QuantType

    path = quantized_by_onnxruntime(float_file, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8)
    errors = {check for check, severity in problems(check_graph(path, dialect="tensorrt")) if severity == "error"}
    assert {"bias-float", "output-float", "residual-add", "zero-point-zero", "zero-point-type"} <= errors


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


def test_stored_codes_that_use_half_of_their_range_are_no_error(tmp_path):
    model = sound_graph("cpu")
    a_weight_is_stored_as_int8(model)
    put(model, "left.int8", values_of(model, "left.int8") // 8)
    assert problems(check_graph(write(model, tmp_path), dialect="cpu")) == set()


def test_the_metadata_of_a_float_export_does_not_make_a_file_ours(tmp_path):
    model = sound_graph()
    helper.set_model_props(model, {"ptq.checkpoint_sha256": "0" * 64, "ptq.precision": "fp32"})
    found = {finding.check for finding in check_graph(write(model, tmp_path)).findings}
    assert "metadata-absent" in found
    assert "metadata-complete" not in found


def test_float_nodes_are_counted_by_operator(tmp_path):
    model = sound_graph()
    a_tangent_lies_between_two_layers(model)
    message = message_of(check_graph(write(model, tmp_path)), "float-nodes")
    assert message.startswith("1 nodes compute in float (1 Tan): tan.")


def test_the_table_has_one_row_for_each_check_with_a_count_and_the_first_nodes(tmp_path):
    model = sound_graph()
    for name in ("stem", "left", "right", "mix"):
        remove_pair(model, f"{name}.weight")
    table = table_of_checks(check_graph(write(model, tmp_path)))
    (row,) = (row for row in table.rows if row[1] == "layer-quantized")
    assert row[:4] == ("error", "layer-quantized", "4", "stem, left, right and 1 more")


# Files that are no models


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ExportError, match=r"absent\.onnx is not a file\. Give the path of an ONNX file"):
        check_graph(tmp_path / "absent.onnx")


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ExportError, match=r"empty\.onnx holds 0 nodes and 0 opsets.*export it again"):
        check_graph(tmp_path / "empty.onnx")


@pytest.mark.parametrize("content", ["A plain text about convolutions.\n" * 20, "<html></html>", "{}"])
def test_a_text_file_is_an_error(tmp_path, content):
    (tmp_path / "text.onnx").write_text(content)
    with pytest.raises(ExportError, match=r"text\.onnx (has|holds) .*export it again"):
        check_graph(tmp_path / "text.onnx")


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_an_error(tmp_path, kept):
    path = write(sound_graph(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ExportError, match=r"model\.onnx (has|holds) .*cut off"):
        check_graph(path)


def test_a_file_beyond_the_limit_of_protobuf_is_refused_unread(tmp_path):
    path = tmp_path / "large.onnx"
    with path.open("wb") as stream:
        stream.truncate(PROTOBUF_LIMIT_BYTES)
    with pytest.raises(ExportError, match=r"2,147,483,648 bytes.*Save the weights as external data"):
        check_graph(path)


def test_external_data_is_read_and_its_absence_is_an_error(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(sound_graph(), str(path), save_as_external_data=True, location="weights.bin", size_threshold=64)
    assert problems(check_graph(path)) == set()
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ExportError, match=r"external data of .*model\.onnx cannot be read.*Copy the data files"):
        check_graph(path)


def refusal(path: Path) -> str | None:
    """The text of the ExportError, None if the checks run through."""
    try:
        check_graph(path)
    except ExportError as error:
        return str(error)
    return None


def test_the_checks_print_nothing(tmp_path, capsys):
    model = sound_graph()
    cast = helper.make_node("Cast", ["mix/relu.out"], ["cast.out"], name="cast", to=TensorProto.BFLOAT16)
    insert(model, "gap", cast)
    check_graph(write(model, tmp_path))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_reported_and_never_crashes_the_checks(tmp_path, seed):
    path = write(sound_graph(), tmp_path)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for position in random.integers(0, len(content), 6):
        content[position] = random.integers(0, 256)
    path.write_bytes(bytes(content))
    if (problem := refusal(path)) is not None:
        assert str(path) in problem
