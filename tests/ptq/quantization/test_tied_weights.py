"""Does each layer have its own quantizers where several have one weight, or equal ones?"""

import sys
import types

import onnx
import pytest
import safetensors.torch
import torch
from torch import nn

from ptq.config import QuantizationConfig
from ptq.networks.network import NetworkKind, network_as_built
from ptq.quantization.prepare import prepare_model
from ptq.quantization.prepare_torch import write_template
from ptq.quantization.same_function import require_same_function

SHAPE = (3, 12, 12)


class Tied(nn.Module):
    """Two convolutions with one weight; `alike` gives them two that are equal."""

    def __init__(self, num_classes=4, alike=False):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)
        self.a, self.b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.b.weight = nn.Parameter(self.a.weight.detach().clone()) if alike else self.a.weight

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(self.stem(x))))).mean((2, 3)))


def alike(num_classes=4):
    return Tied(num_classes, alike=True)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    module = types.ModuleType("tied_networks")
    module.__file__ = __file__
    module.Tied, module.alike = Tied, alike
    monkeypatch.setitem(sys.modules, "tied_networks", module)


@pytest.mark.parametrize("factory", ["Tied", "alike"])
def test_each_layer_has_a_weight_and_a_quantizer_of_its_own(tmp_path, factory):
    network = Tied(alike=factory == "alike")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    found = prepare_model(
        name=f"tied_networks:{factory}", checkpoint=tmp_path / "w.pth", is_onnx=False, class_count=4,
        has_named_classes=True, input_shape=SHAPE, quantization=QuantizationConfig(), directory=tmp_path,
    )  # fmt: skip
    assert (found.source, found.coverage.int8_layers) == ("torch", 4)
    write_template(
        tmp_path / "t.onnx", weights=found.files["weights"], plan=found.plan, name=f"tied_networks:{factory}",
        num_classes=4, input_shape=SHAPE,
    )  # fmt: skip
    require_same_function(tmp_path / "t.onnx", found.files["fp32_onnx"], input_shape=SHAPE)
    for file in (tmp_path / "t.onnx", found.files["fp32_onnx"]):
        graph = onnx.load(file).graph
        assert {"a.weight", "b.weight"} <= {tensor.name for tensor in graph.initializer}
        assert [value.name for value in graph.input] == ["images"]


def test_each_can_be_changed_by_itself_and_a_checkpoint_with_one_of_them_is_whole():
    kind = NetworkKind("tied_networks:Tied", 4, SHAPE)
    state = dict(Tied().state_dict())
    alone = {name: value for name, value in state.items() if name != "b.weight"}  # as safetensors writes it
    network, _ = network_as_built(alone, kind, source="w")
    assert torch.equal(network.b.weight, state["a.weight"])
    last = {name: value for name, value in state.items() if name != "a.weight"}
    network, _ = network_as_built(last, kind, source="w")
    assert torch.equal(network.a.weight, state["b.weight"])
    network, _ = network_as_built({**state, "b.weight": 2 * state["a.weight"]}, kind, source="w")
    assert torch.equal(network.b.weight, 2 * network.a.weight)
    assert safetensors.torch.save(network.state_dict())
