"""Does a network that returns more than logits, or takes more than images, become one that does not?"""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from ptq.networks.outputs import take_logits_

SHAPE, CLASSES = (3, 8, 8), 5
IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", ["features", "logits"])


@dataclass
class Answer:
    features: torch.Tensor
    logits: torch.Tensor


class Net(nn.Module):
    """`form` makes of features and logits what the network returns."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.fc, self.form = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES), form

    def forward(self, x, scale=None, mask=None):
        features = self.conv(x).mean((2, 3))
        logits = self.fc(features)
        return self.form(features, logits if scale is None else logits * scale)


def logits_of(network, images):
    return network.fc(network.conv(images).mean((2, 3)))


@pytest.mark.parametrize(
    ("form", "note"),
    [
        (lambda features, logits: logits, ""),
        (lambda features, logits: (logits, features), "returns a tuple, of which output[0] is taken"),
        (lambda features, logits: [features, logits], "returns a list, of which output[1] is taken"),
        (lambda features, logits: {"aux": logits * 2, "logits": logits}, "returns a dict, of which output['logits']"),
        (lambda features, logits: {"features": features, "out": logits}, "output['out']"),
        (lambda features, logits: Pair(features, logits), "returns a Pair, of which output[1]"),
        (lambda features, logits: (features, (logits,)), "output[1][0]"),
        (lambda features, logits: Answer(features, logits), "returns a Answer, of which output.logits"),
        (lambda features, logits: logits[..., None, None], ""),
        (lambda features, logits: logits.squeeze(), ""),
    ],
)
def test_the_logits_are_taken_and_nothing_else_changes(form, note):
    network = Net(form).eval()
    names = list(network.state_dict())
    assert note in take_logits_(network, input_shape=SHAPE, num_classes=CLASSES)
    for each in (network, copy.deepcopy(network), fx.symbolic_trace(network)):
        torch.testing.assert_close(each(IMAGES), logits_of(network, IMAGES))
    assert list(network.state_dict()) == names
    assert [node.target for node in fx.symbolic_trace(network).graph.nodes if node.op == "placeholder"] == ["images"]


@pytest.mark.parametrize("form", [lambda features, logits: None, lambda features, logits: features, lambda *_: 1 / 0])
def test_a_network_without_logits_is_left_as_it_is(form):
    network = Net(form).eval()
    assert take_logits_(network, input_shape=SHAPE, num_classes=CLASSES) == ""
    assert type(network) is Net
