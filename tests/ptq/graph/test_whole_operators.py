"""Graphs of the onnxruntime dialect: what ONNX Runtime computes in INT8 of them, and that it computes what they say."""

from collections import Counter

import networks
import numpy as np
import onnx
import pytest
import torch
from candidates import calibrated
from networks import PLACEMENT
from torch import nn
from torch.nn import functional as F

from ptq.checks.run import check_graph
from ptq.config import QuantizationConfig
from ptq.engines import open_engine, open_reference
from ptq.graph.against_plan import find_difference
from ptq.networks.export import export_onnx
from ptq.networks.folding import fold_model
from ptq.numerics.metrics import sqnr_db
from ptq.quantization.prepare_onnx import prepare_onnx_model
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of

SIDE = 32
SHAPE = (3, SIDE, SIDE)
IMAGES = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))


class Fire(nn.Module):
    """A concat of two convolutions that a third one reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.last(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InvertedResiduals(nn.Module):
    """Blocks as in a MobileNetV2, whose ends may be negative and are added up."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(),
                nn.Conv2d(16, 8, 1),
            )
            for _ in range(3)
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(x), 1), 1))


class Nested(nn.Module):
    """A concat of a concat, whose operand a residual addition reads too, as in an Inception-ResNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.third, self.fourth, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.last, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        both = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        both = F.relu(both + self.up(both))
        x = torch.cat([torch.cat([F.relu(self.third(x)), F.relu(self.fourth(x))], 1), both[:, :4]], 1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.last(x)), 1), 1))


class EndsInSoftmax(nn.Module):
    """A network whose last layer is a convolution, as a SqueezeNet's."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.last(F.relu(self.stem(x)))
        return torch.softmax(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), 1)


class TwiceLinear(nn.Module):
    """A linear layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.flatten(F.adaptive_avg_pool2d(F.relu(self.stem(x)), 1), 1)
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


class Dead(nn.Module):
    """Layers of which a channel is nearly dead and has a large bias, as BatchNorm leaves them."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        with torch.no_grad():
            for layer in (self.middle, self.head):
                layer.weight[1] *= 1e-9
                layer.weight[2] = 0
                layer.bias[:3] = 3

    def forward(self, x):
        x = F.relu(self.middle(F.relu(self.stem(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def candidate(model, directory, dialect, **options):
    """A candidate of a network calibrated on random images, which is what was decided, and the FP32 graph."""
    network = calibrated(model, directory, IMAGES, **options)
    path = network.write(dialect)
    assert find_difference(onnx.load(path), onnx.load(network.fp32), network.decided(dialect)) is None
    return path, network.fp32


def operators(path):
    """How many operators of each kind ONNX Runtime runs, and what kind of number they read and write."""
    built = open_engine("onnxruntime", threads=1).build(path, precision="int8", batch_size=8, float_remainder="fp32")
    return Counter((layer.kernel, layer.input_type, layer.output_type) for layer in built.layers)


def logits(engine, path, precision="int8"):
    found = engine.logits(path, [IMAGES.numpy()], precision=precision, batch_size=8, float_remainder="fp32")
    return np.concatenate(list(found))


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (networks.small_resnet, {"QLinearConv": 6, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1}),
        (Fire, {"QLinearConv": 4, "QLinearConcat": 1, "QLinearGlobalAveragePool": 1}),
        (InvertedResiduals, {"QLinearConv": 10, "QLinearAdd": 3}),
    ],
    ids=["residual", "concat", "inverted residual"],
)
def test_every_operator_runs_on_integers(tmp_path, network, expected):
    path, fp32 = candidate(network().eval(), tmp_path, "onnxruntime")
    found = operators(path)
    for kernel, count in expected.items():
        assert found[kernel, "uint8", "uint8"] == count
    assert found["QGemm", "uint8", "fp32"] == 1
    in_float = {"Conv", "FusedConv", "Gemm", "Add", "Concat", "GlobalAveragePool"}
    assert not in_float & {kernel for kernel, *_ in found}
    assert [each.message for each in check_graph(path).findings if each.severity != "info"] == []
    exact = logits(open_engine("onnxruntime", threads=1), fp32, "fp32")
    engine_db = sqnr_db(exact, logits(open_engine("onnxruntime", threads=1), path))
    file_db = sqnr_db(exact, logits(open_reference(threads=1), path))
    assert file_db > 15
    assert engine_db > file_db - 1


@pytest.mark.parametrize("network", [Nested, EndsInSoftmax, TwiceLinear, Dead])
@pytest.mark.parametrize("dialect", ["cpu", "onnxruntime", "tensorrt"])
def test_odd_networks_are_whole_and_right_in_every_dialect(tmp_path, network, dialect):
    path, fp32 = candidate(network().eval(), tmp_path, dialect)
    assert [each for each in check_graph(path, dialect=dialect).findings if each.severity == "error"] == []
    exact = logits(open_engine("onnxruntime", threads=1), fp32, "fp32")
    engine_db = sqnr_db(exact, logits(open_engine("onnxruntime", threads=1), path))
    file_db = sqnr_db(exact, logits(open_reference(threads=1), path))
    assert file_db > 20
    # Its kernels are right for its own dialect alone.
    assert dialect != "onnxruntime" or engine_db > min(file_db - 1, 35)


def test_the_other_dialects_have_the_graph_that_they_have_without(tmp_path):
    graphs = []
    for whole_operators in (True, False):
        folder = tmp_path / str(whole_operators)
        folder.mkdir()
        path, _ = candidate(networks.small_resnet(), folder, "cpu", whole_operators=whole_operators)
        graphs.append(logits(open_reference(threads=1), path))
        found = check_graph(path)
        assert [each.message for each in found.findings if each.severity != "info"] == []
    assert np.array_equal(*graphs)


def test_a_gate_is_multiplied_on_integers(tmp_path):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
            self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            x = F.relu(self.stem(x))
            x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
            return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.last(x)), 1), 1))

    found = operators(candidate(Gate().eval(), tmp_path, "onnxruntime")[0])
    assert found["QLinearConv", "uint8", "uint8"] == 4
    assert found["QLinearMul", "uint8", "uint8"] == 1


def test_an_onnx_file_has_the_quantizers_of_the_pytorch_way(tmp_path):
    folded = fold_model(networks.small_resnet(), input_shape=SHAPE)
    export_onnx(folded.module, tmp_path / "in.onnx", input_shape=SHAPE)
    of_file = prepare_onnx_model(
        checkpoint=tmp_path / "in.onnx", class_count=4, has_named_classes=False, input_shape=SHAPE,
        quantization=QuantizationConfig(), directory=tmp_path, whole_operators=True,
    ).plan  # fmt: skip
    of_network = place_quantizers(view_of(folded.module), **PLACEMENT, whole_operators=True)
    kinds = [[(spec.dialect, spec.never_negative) for spec in plan.activations] for plan in (of_file, of_network)]
    assert kinds[0] == kinds[1]
    assert ("onnxruntime", False) in kinds[0]


def test_a_file_of_another_dialect_is_told_what_stays_in_float(tmp_path):
    path, _ = candidate(networks.small_resnet(), tmp_path, "cpu")
    found = [each for each in check_graph(path, dialect="onnxruntime").findings if each.check == "whole-operator"]
    assert {each.severity for each in found} == {"error"}
    messages = " ".join(each.message for each in found)
    assert "An operand of this residual add is bare" in messages
    assert "What this Conv writes is read without a Q" in messages
