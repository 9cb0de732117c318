import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ptq.errors import CheckpointError
from ptq.networks import network as module
from ptq.networks.network import NetworkKind, network_as_built
from ptq.networks.reparameterization import reparameterized

SHAPE = (3, 12, 12)


class Branches(nn.Module):
    """A 3 x 3 convolution, a 1 x 1 convolution and the input, each with its BatchNorm, added up."""

    def __init__(self, channels):
        super().__init__()
        self.three = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.one = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.merged = None

    def forward(self, x):
        if self.merged is not None:
            return self.merged(x)
        return self.norms[0](self.three(x)) + self.norms[1](self.one(x)) + self.norms[2](x)

    def as_one(self):
        channels = len(self.norms[0].weight)
        itself = nn.Conv2d(channels, channels, 1, bias=False)
        itself.weight.data = torch.eye(channels)[:, :, None, None]
        parts = [
            fuse_conv_bn_eval(c.eval(), n) for c, n in zip((self.three, self.one, itself), self.norms, strict=True)
        ]
        made = nn.Conv2d(channels, channels, 3, padding=1)
        made.weight.data = parts[0].weight + sum(nn.functional.pad(p.weight, (1, 1, 1, 1)) for p in parts[1:])
        made.bias.data = sum(part.bias for part in parts)
        return made.requires_grad_(False)

    def merge_(self):
        self.merged = self.as_one()
        del self.three, self.one, self.norms


class InPlace(Branches):
    def reparameterize(self):
        self.merge_()


class Deployed(Branches):
    def switch_to_deploy(self, verbose=False):
        self.merge_()


class Successor(Branches):
    def fuse(self):
        return self.as_one()


class Wrong(Branches):
    def fuse(self):
        return self.three


class Failing(Branches):
    def fuse(self):
        raise AttributeError("no bn1")


class WithAnArgument(Branches):
    def fuse(self, other):
        raise AssertionError("it cannot be called")


class Static(Branches):
    @staticmethod
    def fuse():
        raise AssertionError("it is no method")


def network_of(block, seed=0):
    torch.manual_seed(seed)
    blocks = nn.Sequential(block(8), nn.ReLU(), block(8))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.running_mean)
            nn.init.normal_(part.bias)
    return network.eval()


def layers(network):
    return sum(isinstance(part, nn.Conv2d | nn.BatchNorm2d) for part in network.modules())


@pytest.mark.parametrize("block", [InPlace, Deployed, Successor])
def test_branches_become_one_convolution(block):
    network = network_of(block)
    image = torch.rand(2, *SHAPE)
    expected = network(image)
    found, note = reparameterized(network, input_shape=SHAPE)
    assert layers(found) == 3
    assert layers(network) == 11
    assert note == ""
    torch.testing.assert_close(found(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("block", "why"), [(Wrong, "compute something else"), (Failing, "no bn1"), (WithAnArgument, ""), (Branches, "")]
)
def test_a_network_that_would_change_or_cannot_be_merged_is_left_and_it_is_said_why(block, why):
    network = network_of(block)
    found, note = reparameterized(network, input_shape=SHAPE)
    assert found is network
    assert why in note
    assert bool(note) == bool(why)


@pytest.fixture
def kind(monkeypatch):
    monkeypatch.setattr(module, "create_model", lambda name, **_: network_of(InPlace, seed=1))
    return NetworkKind("branches", 4, SHAPE)


def test_the_weights_of_training_and_those_of_the_merged_network_make_the_same(kind):
    trained = network_of(InPlace)
    merged, _ = reparameterized(trained, input_shape=SHAPE)
    image = torch.rand(2, *SHAPE)
    for state in (trained.state_dict(), merged.state_dict()):
        found, note = network_as_built(state, kind, source="weights")
        assert (layers(found), note) == (3, "")
        torch.testing.assert_close(found(image), trained(image), rtol=1e-4, atol=1e-4)


def test_weights_that_fit_neither_form_are_refused_by_the_names_of_the_network(kind):
    state = network_of(InPlace).state_dict()
    del state["1.0.three.weight"]
    with pytest.raises(CheckpointError, match=r"1\.0\.three\.weight"):
        network_as_built(state, kind, source="weights")
