import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptq.networks.folding import fold_model
from ptq.networks.unfolding import unfolded_state

SHAPE = (3, 16, 16)


class PositionBias(nn.Module):
    """Attention whose bias a small network computes from coordinates."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer("coordinates", torch.rand(16, 16, 2), persistent=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        q, k, v = self.qkv(self.stem(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        bias = self.bias(self.coordinates).squeeze(-1)
        return self.fc((torch.softmax(q @ k.transpose(1, 2) + bias, -1) @ v).mean(1))


class Grid(nn.Module):
    """A fixed image through a convolution with BatchNorm, added to what the image becomes; and a head nobody reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.grid_conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm, self.fc, self.aux = nn.BatchNorm2d(8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.register_buffer("grid", torch.rand(1, 2, 16, 16))

    def forward(self, x):
        x = F.relu(self.conv(x) + self.norm(self.grid_conv(self.grid)))
        features = x.mean((2, 3))
        self.aux(features)
        return self.fc(features)


@pytest.mark.parametrize(
    ("network", "left", "gone"),
    [(PositionBias, {"stem", "qkv", "fc"}, {"bias.0", "bias.2"}), (Grid, {"conv", "fc"}, {"grid_conv", "aux"})],
)
def test_what_does_not_depend_on_the_image_is_a_constant(network, left, gone):
    network = network().eval()
    folded = fold_model(network, input_shape=SHAPE)
    assert folded.traced
    assert set(folded.constant_layers) == gone
    assert {name for name, part in folded.module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)} == left
    images = torch.rand(2, *SHAPE)
    torch.testing.assert_close(folded.module(images), network(images), rtol=1e-5, atol=1e-6)


def test_its_weights_stay_in_the_checkpoint_of_changed_weights():
    network = Grid().eval()
    nn.init.uniform_(network.norm.running_mean)
    folded = fold_model(network, input_shape=SHAPE)
    state = unfolded_state(network, folded, folded.module)
    for name in ("grid_conv.weight", "norm.running_mean", "aux.weight"):
        torch.testing.assert_close(state[name], network.state_dict()[name])


def test_a_constant_without_a_layer_stays():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 4, 1), nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x):
            return (self.conv(x) + self.shift.abs()).mean((2, 3))

    folded = fold_model(Shifted().eval(), input_shape=SHAPE)
    assert [node.target for node in folded.module.graph.nodes if node.op == "get_attr"] == ["shift"]


def test_a_batchnorm_that_nobody_reads_is_not_taken_for_a_folded_one():
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

        def forward(self, x):
            features = self.conv(x)
            self.norm(features)
            self.norm(x.new_zeros(1, 8, 1, 1))
            return self.fc(F.relu(features).mean((2, 3)))

    network = Unread().eval()
    folded = fold_model(network, input_shape=SHAPE)
    assert folded.norms == {}
    state = unfolded_state(network, folded, folded.module)
    torch.testing.assert_close(state["conv.bias"], network.conv.bias)
