"""ONNX files as exporters of all kinds write them."""

import warnings

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper


def exported(model, path, *, size=24, opset=17, batch=1, dynamic=False, folded=True):
    """Writes a network as torch's exporter does; not `folded` leaves BatchNorm and constants as they are."""
    names = {"input_names": ["images"], "output_names": ["logits"]} if dynamic else {}
    axes = {"dynamic_axes": {"images": {0: "b"}, "logits": {0: "b"}}} if dynamic else {}
    mode = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter announces its own deprecation
        torch.onnx.export(
            model.eval(), (torch.zeros(batch, 3, size, size),), str(path), dynamo=False, opset_version=opset,
            training=mode, do_constant_folding=folded, **names, **axes,
        )  # fmt: skip
    return path


class GraphMaker:
    """Collects nodes and weights of a hand-made graph; weights are drawn from a seed."""

    def __init__(self, seed=0):
        self.nodes, self.weights = [], []
        self._generator = np.random.default_rng(seed)

    def weight(self, name, *shape, values=None):
        if values is None:
            values = self._generator.normal(0, 0.3, shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op, *inputs, output, name="", **attributes):
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def save(
        self, path, *, output="y", input_shape=("n", 3, 8, 8), classes=4, opset=17, kind=TensorProto.FLOAT, **more
    ):
        shape = ["n", classes] if isinstance(classes, int) else classes
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", kind, input_shape), *more.get("inputs", ())],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)], self.weights,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), *more.get("opsets", ())])
        model.ir_version = 8
        onnx.save(model, path)
        return path


def small_graph(make=None, **options):
    """Convolution, ReLU, global average pool, flatten and Gemm: the least classifier there is."""
    make = make or GraphMaker()
    make.node("Conv", "x", make.weight("w", 6, 3, 3, 3), make.weight("b", 6), output="a", name="first")
    make.node("Relu", "a", output="r")
    make.node("GlobalAveragePool", "r", output="p")
    make.node("Flatten", "p", output="f")
    trans = options.get("trans_b", 0)
    shape = (4, 6) if trans else (6, 4)
    make.node("Gemm", "f", make.weight("v", *shape), make.weight("c", 4), output="y", name="last", transB=trans)
    return make
