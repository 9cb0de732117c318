"""A sound Q/DQ graph, the hands to damage it, and what a seeded fault must bring about."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ptq.checks.run import check_graph
from ptq.records.graph import GraphChecks

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
        # In the cpu dialect so few steps that no processor saturates.
        scale = largest_along(values, axis) / np.float32(127 if self.unsigned == np.int8 else 63.5)
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


def bottleneck(*, quantize_identity: bool, dialect: str = "tensorrt") -> ModelProto:
    """Two inverted residuals of a MobileNetV2: the identity of the add is a bare convolution's output."""
    build = Builder(dialect)
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


def write(model: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def problems(checks: GraphChecks) -> set[tuple[str, str]]:
    return {(found.check, found.severity) for found in checks.findings if found.severity != "info"}


def message_of(checks: GraphChecks, identifier: str) -> str:
    return next(finding.message for finding in checks.findings if finding.check == identifier)


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


def pair_is_removed(name: str) -> Callable[[ModelProto], None]:
    return lambda model: remove_pair(model, name)


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

    def model(self) -> ModelProto:
        """Returns the sound graph with the fault in it."""
        model = sound_graph(self.dialect)
        self.fault(model)
        return model


def assert_found_alone(case: Case, folder: Path) -> None:
    """The check of a case finds its fault, with node, severity, message and remedy, and no other check finds one."""
    checks = check_graph(write(case.model(), folder), dialect=case.dialect, **case.options)
    expected = {(case.check, case.severity)} if case.severity != "info" else set()
    assert problems(checks) == expected | case.also
    found = [finding for finding in checks.findings if finding.check == case.check]
    assert case.node in {finding.node for finding in found}
    assert {finding.severity for finding in found} == {case.severity}
    assert all(finding.message and finding.remedy for finding in found)
