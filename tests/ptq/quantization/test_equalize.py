"""Does equalization leave the network's function alone, and bring the ranges closer?"""

import numpy as np
import pytest
import torch
from torch import fx, nn

from ptq.dialect import observed_names
from ptq.networks.factory import create_model
from ptq.networks.folding import fold_model
from ptq.networks.observed import observed_from_folded
from ptq.networks.unfolding import unfolded_state
from ptq.numerics.channel_factors import channel_ranges
from ptq.quantization.equalize import layer_factors
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import scale_layers_, view_of
from tests.support.networks import PLACEMENT, SmallResNet

SHAPE = (3, 32, 32)


def ranges_of(module, images):
    """Ranges of every observed tensor, and the observed tensors themselves."""
    plan = place_quantizers(view_of(module), **PLACEMENT)
    with torch.inference_mode():
        _, *tensors = observed_from_folded(module, plan)(images)
    found = channel_ranges([tensor.numpy() for tensor in tensors], axes=[1] * len(tensors))
    return dict(zip(observed_names(plan), found, strict=True))


def equalize_(module, ranges, *, input_shape):
    """Scales the layers of a folded model by their factors, and returns the number of channels that changed."""
    factors, changed = layer_factors(view_of(module, input_shape=input_shape), ranges)
    scale_layers_(module, factors)
    return changed


def spread(ranges):
    """Mean over tensors of the widest channel's range over the median channel's."""
    return np.mean([found.max() / np.median(found[found > 0]) for found in ranges.values() if found.max() > 0])


def with_uneven_channels(model, *, seed=0):
    """Gives every BatchNorm weights that differ by a factor of up to 30."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.exp2(5 * torch.rand(module.weight.shape, generator=generator) - 4)
    return model


@pytest.fixture
def images():
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_a_residual_network_computes_the_same_floats_with_closer_ranges(images):
    folded = fold_model(with_uneven_channels(SmallResNet().eval()))
    module = folded.module
    before, logits = ranges_of(module, images), module(images)

    changed = equalize_(module, before, input_shape=SHAPE)

    assert changed > 0
    assert torch.equal(module(images), logits)
    assert spread(ranges_of(module, images)) < 0.8 * spread(before)


@pytest.mark.parametrize(
    "name",
    ["mobilenet_v2", "resnet18", "squeezenet1_1", "mobilenet_v3_small",
     *(pytest.param(name, marks=pytest.mark.slow) for name in (
         "resnext50_32x4d", "vgg11_bn", "densenet121", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny",
         "shufflenet_v2_x0_5", "googlenet"))],
)  # fmt: skip
def test_every_family_keeps_its_function(name, images):
    # Ranges of 1 for what was not seen far below ReLU6's clip: the function must hold for other images too.
    module = fold_model(with_uneven_channels(create_model(name, num_classes=10, channels=3))).module
    inputs = torch.nn.functional.interpolate(images, size=64)
    ranges = ranges_of(module, inputs)
    expected = module(inputs)

    equalize_(module, ranges, input_shape=(3, 64, 64))

    torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_input_and_logits_keep_their_scale(images):
    module = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 2)))
    small = images[:, :, :4, :4]
    expected = module(small)

    equalize_(module, {"_1": np.array([8.0, 1.0, 0.5, 0.0])}, input_shape=(3, 4, 4))

    assert torch.equal(module(small), expected)
    # A quarter of the range gives a factor of two; a channel that was never seen stays as it was.
    assert module.get_submodule("3").weight.shape == (2, 64)


def test_factors_are_the_root_of_the_relative_range_as_powers_of_two():
    module = fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 5, 1), nn.ReLU(), nn.Conv2d(5, 1, 1)))
    before = module.get_submodule("0").weight.detach().clone()

    equalize_(module, {"_1": np.array([16.0, 4.0, 1.0, 0.001, 0.0])}, input_shape=(1, 2, 2))

    factors = (module.get_submodule("0").weight / before).flatten()
    assert factors.tolist() == [1.0, 2.0, 4.0, 8.0, 1.0]


@pytest.mark.parametrize("clip", [nn.ReLU6(), torch.nn.functional.relu6])
def test_a_clip_limits_the_factor_by_what_was_seen(clip):
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1)
            self.clip = clip

        def forward(self, x):
            return self.second(self.clip(self.first(x)))

    module = fx.symbolic_trace(Clipped())
    before = module.first.weight.detach().clone()
    name = next(node.name for node in module.graph.nodes if "clip" in node.name or "relu6" in node.name)

    equalize_(module, {name: np.array([6.0, 2.0, 0.375])}, input_shape=(1, 2, 2))

    # 2.0 has room for a factor of 2.4 below 6 with the margin, and would ask for 1.7; 0.375 asks for 4.
    assert (module.first.weight / before).flatten().tolist() == [1.0, 2.0, 4.0]
    equalize_(module, {name: np.array([6.0, 5.9, 6.0])}, input_shape=(1, 2, 2))
    assert (module.first.weight / before).flatten().tolist() == [1.0, 2.0, 4.0]


def test_a_zero_padded_shortcut_ties_the_channels_it_keeps(images):
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            padded = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            return self.head(torch.relu(self.conv(x) + padded)).mean((2, 3))

    module = fx.symbolic_trace(Shortcut().eval())
    expected = module(images)
    ranges = {"relu": np.array([8.0, 2.0, 1.0, 0.5])}

    assert equalize_(module, ranges, input_shape=SHAPE) > 0
    assert torch.equal(module(images), expected)


def test_equalized_weights_are_a_checkpoint_of_the_original_network(images):
    original = with_uneven_channels(SmallResNet().eval())
    folded = fold_model(original)
    equalized = fold_model(original).module
    equalize_(equalized, ranges_of(folded.module, images), input_shape=SHAPE)

    loaded = SmallResNet().eval()
    loaded.load_state_dict(unfolded_state(original, folded, equalized))

    torch.testing.assert_close(loaded(images), original(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        fold_model(loaded).module.get_submodule("block1.conv1").weight, equalized.get_submodule("block1.conv1").weight
    )
