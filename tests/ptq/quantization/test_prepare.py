"""Is every layer quantized however the network spells it, and is what stays in float told?"""

import networks
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptq.config import QuantizationConfig
from ptq.errors import ExportError, UsageError
from ptq.evaluation.fallback import ModelFiles, rank_layers
from ptq.graph.coverage import describe, require_coverage
from ptq.networks.network import NetworkKind, network_as_built, network_from_weights
from ptq.networks.unfolding import unfolded_state
from ptq.quantization.prepare import prepare_model
from ptq.quantization.prepare_torch import equalize_model, write_float_model, write_template
from ptq.quantization.same_function import require_same_export, require_same_function, without_quantizers

SHAPE = (3, 12, 12)


class OwnForward(nn.Conv2d):
    """A convolution that standardizes its weight."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(variance + 1e-5), self.bias, self.stride, self.padding)


class Odd(nn.Module):
    """Layers that are no modules of torch's own classes: a subclass, a function, a product with a parameter."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv1 = OwnForward(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.weight2 = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.conv3 = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.head = nn.Parameter(torch.randn(8, num_classes))

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(F.conv2d(x, self.weight2, padding=1))
        return F.relu(self.conv3(x)).mean((2, 3)) @ self.head


def _computed(norm, kind):
    class Computed(networks.SmallResNet):
        """Its second convolution and its classifier have weights that are computed anew in every call."""

        def __init__(self, num_classes=4):
            super().__init__(num_classes)
            norm(self.block1.conv1)
            norm(self.fc)

    Computed.__name__ = Computed.__qualname__ = kind
    return Computed


WeightNorm = _computed(torch.nn.utils.parametrizations.weight_norm, "WeightNorm")
SpectralNorm = _computed(torch.nn.utils.parametrizations.spectral_norm, "SpectralNorm")
OlderSpectralNorm = _computed(torch.nn.utils.spectral_norm, "OlderSpectralNorm")


class Branching(networks.SmallResNet):
    """Cannot be traced."""

    def forward(self, x):
        return super().forward(x * 1.0 if x.mean() > -1e6 else x)


class InPlace(nn.Module):
    """Changes a tensor that is read again behind the change."""

    change = staticmethod(F.hardtanh_)

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        changed = self.change(x)
        return self.fc((x + self.conv2(changed)).mean((2, 3)))


class Attention(nn.Module):
    """Attention between two sequences, which keeps its weights in parameters."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x, _ = self.attention(self.query.expand(x.shape[0], -1, -1), x, x)
        return self.fc(x[:, 0])


class Decides(nn.Module):
    """Does one thing with bright images and another with dark ones."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.fc(x if float(x.detach().sum()) == 0.0 else -x)


def prepared(tmp_path, factory, **options):
    network = getattr(networks, factory, None) or globals()[factory]
    torch.save(network(num_classes=4).state_dict(), tmp_path / "network.pth")
    directory = tmp_path / "prepared"
    directory.mkdir()
    name = f"networks:{factory}" if hasattr(networks, factory) else f"test_prepare_networks:{factory}"
    return prepare_model(
        name=name, checkpoint=tmp_path / "network.pth", is_onnx=False, class_count=4, has_named_classes=True,
        input_shape=SHAPE, quantization=QuantizationConfig(**options), directory=directory,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def networks_by_name(monkeypatch):
    """The networks of this file, as a module that a factory's name can name."""
    import sys
    import types

    module = types.ModuleType("test_prepare_networks")
    module.__file__ = __file__
    module.__dict__.update({name: value for name, value in globals().items() if isinstance(value, type)})
    monkeypatch.setitem(sys.modules, "test_prepare_networks", module)


def test_a_network_of_modules_is_quantized_as_such(tmp_path):
    found = prepared(tmp_path, "SmallResNet")
    assert found.source == "torch"
    coverage = found.coverage
    assert (coverage.layers, coverage.int8_layers, coverage.batchnorms, coverage.in_float) == (7, 7, 0, ())
    # Stem at 12 x 12; one block at 6 x 6; a block of which all is at 3 x 3; a linear layer.
    stem, block = 144 * 8 * 27, 2 * 36 * 8 * 72
    assert coverage.macs == coverage.int8_macs == stem + block + 9 * 16 * (72 + 144 + 8) + 64
    assert describe(coverage) == "INT8: 7 of 7 convolutions and linear layers, 100.0 % of their multiply-accumulates."


@pytest.mark.parametrize(("factory", "layers"), [("Odd", 4), ("Branching", 7), ("Attention", 5)])
def test_what_torch_fx_would_leave_in_float_is_quantized_by_way_of_the_export(tmp_path, factory, layers):
    found = prepared(tmp_path, factory)
    assert found.source == "onnx"
    assert found.coverage.int8_layers == found.coverage.layers == layers
    assert found.coverage.int8_macs_percent == 100
    assert found.coverage.batchnorms == 0
    assert found.plan.traced
    assert any(note.startswith("The network is quantized by way of its ONNX export: ") for note in found.warnings)


@pytest.mark.parametrize("factory", ["WeightNorm", "SpectralNorm", "OlderSpectralNorm"])
def test_computed_weights_become_plain_and_changed_ones_are_a_checkpoint_too(tmp_path, factory):
    found = prepared(tmp_path, factory)
    assert (found.source, found.coverage.int8_layers) == ("torch", 7)
    kind = NetworkKind(f"test_prepare_networks:{factory}", 4, SHAPE)
    network = network_from_weights(found.files["weights"], kind)
    images = torch.rand(2, *SHAPE)
    again, _ = network_as_built(
        unfolded_state(network.original, network.folded, network.folded.module), kind, source=""
    )
    torch.testing.assert_close(again(images), network.original(images), rtol=1e-4, atol=1e-5)
    assert not [name for name in again.state_dict() if "parametrizations" in name or name.endswith("_orig")]


def test_the_layers_of_a_network_with_computed_weights_can_be_ranked(tmp_path):
    found = prepared(tmp_path, "WeightNorm")
    files = ModelFiles(
        "test_prepare_networks:WeightNorm", found.files["weights"], found.files["plan"], 4, input_shape=SHAPE
    )
    ranking = rank_layers(
        files,
        table={spec.name: 2.0 for spec in found.plan.activations},
        images=np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32),
        dialect="cpu",
        weight_method="max",
        threads=1,
    )
    assert {each.layer for each in ranking} == set(found.plan.quantized_layers)


def test_layers_left_out_by_choice_are_named_and_not_held_against_the_network(tmp_path):
    found = prepared(tmp_path, "SmallResNet", skip_layers=("block1.conv1",), last_layer=False)
    assert found.source == "torch"
    assert found.coverage.int8_layers == 5
    assert found.coverage.int8_macs_percent == 100
    assert describe(found.coverage).endswith("in float: block1.conv1, fc (left in float by choice).")


def test_too_little_in_int8_ends_a_run_before_it_calibrates(tmp_path):
    coverage = prepared(tmp_path, "SmallResNet", skip_layers=("conv1",)).coverage
    require_coverage(coverage, 100)
    by_itself = type(coverage)(**{**{name: getattr(coverage, name) for name in coverage.__slots__}, "chosen_macs": 0})
    with pytest.raises(ExportError, match=r"6 of 7 .* in float: conv1 .* Expected 95 % .* Nothing was calibrated"):
        require_coverage(by_itself, 95)


def test_what_neither_way_can_do_is_told_as_the_network_tells_it(tmp_path):
    with pytest.raises(UsageError, match=r"skip_layers names nothing; the model has no such layer"):
        prepared(tmp_path, "SmallResNet", skip_layers=("nothing",))


def test_one_class_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"one class, .* at least two classes"):
        prepare_model(
            name="resnet18", checkpoint=tmp_path / "w.pth", is_onnx=False, class_count=1, has_named_classes=True,
            input_shape=SHAPE, quantization=QuantizationConfig(), directory=tmp_path,
        )  # fmt: skip


def test_a_module_may_be_named_for_the_layers_in_it(tmp_path):
    found = prepared(tmp_path, "SmallResNet", skip_layers=("block1",))
    assert found.plan.chosen_float_layers == ("block1.conv1", "block1.conv2")


def test_an_export_that_holds_one_branch_of_a_decision_is_refused(tmp_path):
    from ptq.networks.export import export_onnx

    network = Decides().eval()
    export_onnx(network, tmp_path / "network.onnx", input_shape=SHAPE)
    with pytest.raises(ExportError, match=r"The ONNX export of Decides is another network: its logits differ by"):
        require_same_export(network, tmp_path / "network.onnx", input_shape=SHAPE)


def template_of(found, name, tmp_path):
    template = tmp_path / "template.onnx"
    write_template(
        template, weights=found.files["weights"], plan=found.plan, name=name, num_classes=4, input_shape=SHAPE
    )
    return template


@pytest.mark.parametrize(
    "change",
    [
        F.hardtanh_,
        torch.relu_,
        lambda x: x.relu_(),
        lambda x: F.relu(x, True),
        lambda x: x.div_(2.0),
        lambda x: x.sigmoid_(),
    ],
)
def test_what_is_changed_in_place_and_read_again_is_changed_behind_the_quantizers_too(tmp_path, monkeypatch, change):
    monkeypatch.setattr(InPlace, "change", staticmethod(change))
    found = prepared(tmp_path, "InPlace")
    assert (found.source, found.coverage.int8_layers) == ("torch", 3)
    template = template_of(found, "test_prepare_networks:InPlace", tmp_path)
    require_same_function(template, found.files["fp32_onnx"], input_shape=SHAPE)


def test_a_template_without_its_quantizers_is_the_network_and_one_that_is_not_is_refused(tmp_path):
    found = prepared(tmp_path, "SmallResNet")
    template = template_of(found, "networks:SmallResNet", tmp_path)
    require_same_function(template, found.files["fp32_onnx"], input_shape=SHAPE)
    assert not {node.op_type for node in without_quantizers(onnx.load(template)).graph.node} & {
        "QuantizeLinear", "DequantizeLinear",
    }  # fmt: skip
    model = onnx.load(template)
    (add, *_) = [node for node in model.graph.node if node.op_type == "Add"]
    add.op_type = "Sub"
    onnx.save(model, template)
    with pytest.raises(ExportError, match="not the network that was given: without its quantizers its logits differ"):
        require_same_function(template, found.files["fp32_onnx"], input_shape=SHAPE)


class Clipped(nn.Module):
    """Two convolutions with a ReLU6 between them, which clips nothing of small images and much of large ones."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, num_classes)
        with torch.no_grad():
            self.first.weight *= torch.logspace(-2, 1.5, 8)[:, None, None, None]

    def forward(self, x):
        return self.fc(F.relu(self.second(F.relu6(self.first(x)))).mean((2, 3)))


def test_channels_scaled_through_a_relu6_are_the_network_of_their_weights(tmp_path):
    found = prepared(tmp_path, "Clipped")
    name = "test_prepare_networks:Clipped"
    small = {spec.observed: np.geomspace(1e-3, 1.0, 8) for spec in found.plan.activations if spec.observed != "images"}
    files, changed = equalize_model(
        weights=found.files["weights"], plan=found.plan, ranges={**small, "images": np.ones(3)}, name=name,
        num_classes=4, input_shape=SHAPE, directory=tmp_path,
    )  # fmt: skip
    assert changed > 0
    write_template(
        tmp_path / "t.onnx", weights=files["weights"], plan=found.plan, name=name, num_classes=4, input_shape=SHAPE
    )
    network = network_from_weights(files["weights"], NetworkKind(name, 4, SHAPE)).original
    require_same_function(tmp_path / "t.onnx", network, input_shape=SHAPE)
    with pytest.raises(ExportError, match="not the network"):  # it differs where calibration images never were
        require_same_function(tmp_path / "t.onnx", found.files["fp32_onnx"], input_shape=SHAPE)


@pytest.mark.parametrize(("factor", "why"), [(1e7, "NaN or infinity"), (1e-7, "FP16"), (1.0, "")])
def test_a_network_that_fp16_cannot_hold_is_not_written(tmp_path, factor, why):
    network = networks.TwoConvolutions()
    with torch.no_grad():
        network.first.weight *= factor
        network.first.bias *= factor
        network.second.weight /= factor
    torch.save(network.state_dict(), tmp_path / "w.pth")
    options = {"checkpoint": tmp_path / "w.pth", "input_shape": SHAPE, "batch_size": 1}
    write_float_model(tmp_path / "fp32.onnx", name="networks:TwoConvolutions", precision="fp32", **options)
    if not why:
        write_float_model(tmp_path / "fp16.onnx", name="networks:TwoConvolutions", precision="fp16", **options)
    else:
        with pytest.raises(ExportError, match=f"{why}.*nothing was written"):
            write_float_model(tmp_path / "fp16.onnx", name="networks:TwoConvolutions", precision="fp16", **options)
    assert (tmp_path / "fp16.onnx").exists() == (not why)
