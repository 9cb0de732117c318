"""Does equalization of an ONNX graph scale what the PyTorch way scales, and leave the function alone?"""

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx_networks import GraphMaker, exported
from torch import nn

from ptq.dialect import observed_names
from ptq.engines import open_activation_readers
from ptq.graph.canonical import read_graph
from ptq.graph.names import layers_of
from ptq.networks.factory import create_model
from ptq.networks.folding import fold_model
from ptq.numerics.channel_factors import channel_ranges
from ptq.quantization.onnx_view import layer_name
from ptq.quantization.prepare_onnx import equalize_onnx_model
from tests.ptq.graph.test_source import run
from tests.ptq.quantization.test_equalize import equalize_
from tests.ptq.quantization.test_onnx_view import Fire, Gate, ZeroPadded, prepared


class Joined(nn.Module):
    """Two branches behind a concat, a depthwise convolution, and a linear layer on 2 x 2 pixels of each channel."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(48, 4)

    def forward(self, x):
        x = F.max_pool2d(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1), 2)
        return self.fc(torch.flatten(self.pool(F.relu6(self.depthwise(x))), 1))


def uneven(model):
    """Gives the output channels of every convolution weights that differ by a factor of up to 30."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            factor = torch.exp2(5 * torch.rand(module.out_channels, generator=generator) - 4)
            module.weight.data *= factor.reshape(-1, 1, 1, 1)
    return model


def ranges_of(found, shape, *, images=4):
    """The channel ranges of every observed tensor, over a few random images."""
    (read,) = open_activation_readers(found.files["observed_onnx"], workers=1)
    generator = np.random.default_rng(0)
    widest = {}
    for _ in range(images):
        tensors = read(generator.normal(size=(1, *shape)).astype(np.float32))
        for name, seen in zip(
            observed_names(found.plan), channel_ranges(tensors, axes=[1] * len(tensors)), strict=True
        ):
            widest[name] = np.maximum(widest.get(name, 0), seen)
    return widest


def equalized(found, directory, shape):
    files, changed = equalize_onnx_model(
        weights=found.files["weights"], plan=found.plan, ranges=ranges_of(found, shape), directory=directory
    )
    return files, changed


def weights_of(path):
    return {layer_name(layer): np.asarray(layer.weight.values) for layer in layers_of(read_graph(path))}


def factors_of(before, after):
    """Per layer the factor of every weight, 1 where the weight is zero."""
    return {name: np.where(before[name] == 0, 1, after[name] / np.where(before[name] == 0, 1, before[name]))
            for name in before}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "size"),
    [(networks.small_resnet, 24), (ZeroPadded, 24), (Gate, 24), (Fire, 24), (Joined, 24),
     pytest.param(lambda: create_model("mobilenet_v2", num_classes=4, channels=3), 64, marks=pytest.mark.slow)],
    ids=["resnet", "zero padded", "gate", "fire", "joined", "mobilenet_v2"],
)  # fmt: skip
def test_every_weight_gets_the_factor_of_the_pytorch_way(tmp_path, network, size):
    model, shape = uneven(network().eval()), (3, size, size)
    found = prepared(exported(model, tmp_path / "m.onnx", size=size), tmp_path, shape=shape)
    files, changed = equalized(found, tmp_path, shape)
    folded = fold_model(model).module
    plain = {
        name: module.weight.clone().numpy() for name, module in folded.named_modules() if hasattr(module, "weight")
    }
    # The ranges are handed over by the layers that read the tensors: they have other names on the other way.
    assert equalize_(folded, torch_ranges(model, found, shape), input_shape=shape) == changed
    expected = factors_of(plain, {name: folded.get_submodule(name).weight.detach().numpy() for name in plain})
    factors = factors_of(weights_of(found.files["weights"]), weights_of(files.get("weights", found.files["weights"])))
    assert set(factors) == set(expected)
    for name in factors:
        np.testing.assert_array_equal(factors[name], expected[name], err_msg=name)


def torch_ranges(model, found, shape):
    """The ranges of `ranges_of` under the names of the PyTorch way, quantizer by quantizer in readers."""
    from tests.ptq.quantization.test_onnx_view import torch_plan

    ranges, plan = ranges_of(found, shape), torch_plan(model)
    by_reader = {}
    for spec in found.plan.activations:
        for reader in spec.readers:
            by_reader[reader.replace(".", "_")] = spec.name
    names = {item.layer: item.quantizer for item in found.plan.layer_inputs}
    result = {item.quantizer: ranges[names[item.layer]] for item in plan.layer_inputs}
    others = sorted(set(ranges) - set(names.values()))
    missing = sorted({spec.name for spec in plan.activations} - set(result))
    orders = [[spec.name for spec in p.activations if spec.name in left] for p, left in
              ((plan, missing), (found.plan, others))]  # fmt: skip
    return result | {left: ranges[right] for left, right in zip(*orders, strict=True)}


@pytest.mark.parametrize("network", [networks.small_resnet, ZeroPadded, Joined])
def test_the_network_computes_the_same(tmp_path, network):
    model, shape = uneven(network().eval()), (3, 24, 24)
    found = prepared(exported(model, tmp_path / "m.onnx"), tmp_path, shape=shape)
    files, changed = equalized(found, tmp_path, shape)
    images = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    assert changed > 0
    expected = run(found.files["weights"], images)
    # Powers of two change no float; engines may still choose other kernels for other weights.
    np.testing.assert_allclose(run(files["weights"], images), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_clip_keeps_its_channels_below_the_limit(tmp_path):
    make = GraphMaker()
    weight = np.full((4, 3, 1, 1), 0.5, np.float32) * np.array([1, 0.01, 0.01, 0.01], np.float32).reshape(4, 1, 1, 1)
    make.node("Conv", "x", make.weight("w", values=weight), output="a", name="first")
    zero, limit = (make.weight(n, values=np.array(v, np.float32)) for n, v in (("zero", 0), ("limit", 0.05)))
    make.node("Clip", "a", zero, limit, output="c", name="clip")
    make.node("Conv", "c", make.weight("v", 4, 4, 1, 1), output="d", name="second")
    make.node("GlobalAveragePool", "d", output="p")
    make.node("Flatten", "p", output="y")
    found = prepared(make.save(tmp_path / "m.onnx"), tmp_path)
    files, _ = equalized(found, tmp_path, (3, 8, 8))
    factors = factors_of(weights_of(found.files["weights"]), weights_of(files["weights"]) if files else
                         weights_of(found.files["weights"]))["first"]  # fmt: skip
    seen = ranges_of(found, (3, 8, 8))["clip"]
    assert (seen * factors[:, 0, 0, 0])[1:].max() <= 0.05
    assert factors[0].max() == 1


def test_nothing_to_scale_leaves_no_files(tmp_path):
    make = GraphMaker()
    make.node("Conv", "x", make.weight("w", 4, 3, 3, 3), output="a", name="only")
    make.node("GlobalAveragePool", "a", output="p")
    make.node("Flatten", "p", output="y")
    found = prepared(make.save(tmp_path / "m.onnx"), tmp_path)
    assert equalized(found, tmp_path, (3, 8, 8)) == ({}, 0)
