import networks
import pytest
import torch
from torch import nn

from ptq.networks.folding import fold_model
from ptq.networks.padding import number_padding_

SHAPE = (3, 12, 12)
OPTIONS = {
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "circular"},
    "replicated": {"kernel_size": (1, 5), "padding": "same", "padding_mode": "replicate"},
    "same, dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_padding_becomes_numbers_or_an_operation(options):
    network = networks.TwoConvolutions().eval()
    network.second = nn.Conv2d(8, 8, **options)
    folded = fold_model(network, input_shape=SHAPE)
    assert folded.traced
    assert (folded.module.second.padding_mode, folded.module.second.padding) == ("zeros", (0, 0))
    image = torch.rand(2, *SHAPE)
    expected = network(image)
    torch.testing.assert_close(folded.module(image), expected)
    number_padding_(network)
    torch.testing.assert_close(network(image), expected)


def test_a_dilated_same_padding_gets_its_numbers():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.Conv2d(4, 4, 4, padding="same"))
    number_padding_(network)
    assert network[0].padding == (2, 2)
    assert network[1].padding == "same"
