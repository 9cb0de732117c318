"""What is a fault, and how does it get into a Q/DQ graph whose names nobody knows?

`Subject` finds the place for a fault by structure and changes the graph there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

Q, DQ = "QuantizeLinear", "DequantizeLinear"


class Subject:
    """A Q/DQ graph that a fault is put into."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.graph = model.graph

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a copy of an initializer's numbers."""
        return numpy_helper.to_array(next(item for item in self.graph.initializer if item.name == name)).copy()

    def __setitem__(self, name: str, values: np.ndarray) -> None:
        """Replaces an initializer, or adds it."""
        new = numpy_helper.from_array(np.require(values, requirements="C"), name)
        for item in self.graph.initializer:
            if item.name == name:
                item.CopyFrom(new)
                return
        self.graph.initializer.append(new)

    def own(self, node: NodeProto, position: int) -> str:
        """Gives a node an initializer of its own at one input and returns its name; its pair keeps the shared one."""
        name = f"seeded.{node.name}.{position}"
        self[name] = self[node.input[position]]
        node.input[position] = name
        return name

    def writer(self, tensor: str) -> NodeProto | None:
        """Returns the node that writes a tensor."""
        return next((node for node in self.graph.node if tensor in node.output), None)

    def readers(self, tensor: str) -> list[NodeProto]:
        """Returns the nodes that read a tensor."""
        return [node for node in self.graph.node if tensor in node.input]

    def of(self, *kinds: str) -> Iterator[NodeProto]:
        """Yields the nodes of some operators, in the order of the graph."""
        return (node for node in self.graph.node if node.op_type in kinds)

    def insert(self, before: NodeProto, *nodes: NodeProto) -> None:
        """Puts nodes before another."""
        position = next(index for index, node in enumerate(self.graph.node) if node.name == before.name)
        for offset, node in enumerate(nodes):
            self.graph.node.insert(position + offset, node)

    def reroute(self, reader: NodeProto, old: str, new: str) -> None:
        """Lets a node read another tensor."""
        reader.input[:] = [new if name == old else name for name in reader.input]

    def pair(self, source: str, reader: NodeProto, *, scale: float, kind: Any = np.int8) -> None:
        """Puts a Q/DQ pair between a tensor and one of its readers."""
        self["seeded.scale"], self["seeded.zero"] = np.array(scale, np.float32), np.array(0, kind)
        shared = ["seeded.scale", "seeded.zero"]
        self.insert(
            reader,
            helper.make_node(Q, [source, *shared], ["seeded.q"], name="seeded/Q"),
            helper.make_node(DQ, ["seeded.q", *shared], ["seeded.dq"], name="seeded/DQ"),
        )
        self.reroute(reader, source, "seeded.dq")

    def remove_pair(self, quantize: NodeProto) -> None:
        """Takes a Q and its DQs out; their readers read what the Q read."""
        source = quantize.input[0]
        for dequantize in self.readers(quantize.output[0]):
            for reader in self.readers(dequantize.output[0]):
                self.reroute(reader, dequantize.output[0], source)
            self.graph.node.remove(dequantize)
        self.graph.node.remove(quantize)

    def activation(self) -> tuple[NodeProto, NodeProto]:
        """Returns Q and DQ between an activation and the one convolution of several channels that reads it."""
        for node in self.of(Q):
            before = self.writer(node.input[0])
            (dequantize,) = self.readers(node.output[0])
            readers = self.readers(dequantize.output[0])
            if before is None or before.op_type not in ("Relu", "Clip") or [r.op_type for r in readers] != ["Conv"]:
                continue
            if self.weight_behind(dequantize).shape[1] > 1:
                return node, dequantize
        raise LookupError("no activation with one reader")

    def weight(self, fits: Callable[[np.ndarray], bool] = lambda values: True) -> tuple[NodeProto, NodeProto]:
        """Returns Q and DQ of the first convolution's weight that `fits`, the stem's left out."""
        constants = {item.name for item in self.graph.initializer}
        found = [node for node in self.of(Q) if node.input[0] in constants]
        for node in found[1:]:
            values = self[node.input[0]]
            if values.ndim == 4 and values.shape[1] > 1 and fits(values):
                return node, self.readers(node.output[0])[0]
        raise LookupError("no such weight")

    def layer(self, weight: NodeProto) -> NodeProto:
        """Returns the layer that reads a weight's Q."""
        return self.readers(self.readers(weight.output[0])[0].output[0])[0]

    def weight_behind(self, dequantize: NodeProto) -> np.ndarray:
        """Returns the weight of the one convolution that reads a DQ."""
        (layer,) = self.readers(dequantize.output[0])
        before = self.writer(layer.input[1])
        assert before is not None
        quantize = self.writer(before.input[0])
        assert quantize is not None
        return self[quantize.input[0]]

    def residual(self) -> tuple[NodeProto, str, NodeProto]:
        """Returns an add, the name of its convolution's operand, and the DQ of the other one."""
        for node in self.of("Add"):
            writers = {name: self.writer(name) for name in node.input}
            bare = [name for name, found in writers.items() if found is not None and found.op_type == "Conv"]
            pairs = [found for found in writers.values() if found is not None and found.op_type == DQ]
            if len(bare) == 1 and len(pairs) == 1:
                return node, bare[0], pairs[0]
        raise LookupError("no residual add")

    def pool(self) -> tuple[NodeProto, NodeProto]:
        """Returns the last pool and the Q before it."""
        node = list(self.of("GlobalAveragePool", "ReduceMean"))[-1]
        dequantize = self.writer(node.input[0])
        assert dequantize is not None
        quantize = self.writer(dequantize.input[0])
        assert quantize is not None
        return node, quantize

    def end(self) -> tuple[NodeProto, str]:
        """Renames what the last layer writes to `raw`, and returns the layer and the graph's output name."""
        name = self.graph.output[0].name
        last = self.writer(name)
        assert last is not None
        last.output[0] = "raw"
        return last, name


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault and the check meant for it.

    `dialects` are those whose graphs can have it; `options` are arguments of `check_graph` that make it visible.
    """

    put: Callable[[Subject], None]
    check: str
    dialects: tuple[str, ...] = ("cpu", "tensorrt")
    options: dict[str, Any] = field(default_factory=dict)
