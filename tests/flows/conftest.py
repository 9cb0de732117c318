"""Fixtures of the tests that run whole flows."""

import sys

import networks
import numpy as np
import pytest
import torch
from PIL import Image

from flows import cli


def pixels_of(folder):
    """The images of a split as the network reads them, and their labels."""
    files = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file), dtype=np.float32) for file in files]) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    names = sorted({file.parent.name for file in files})
    labels = torch.tensor([names.index(file.parent.name) for file in files])
    return torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float(), labels


@pytest.fixture(scope="session")
def trained(image_folder):
    """The weights of a network that tells the four classes apart."""
    inputs, labels = pixels_of(image_folder / "train")
    torch.manual_seed(0)
    network = networks.SmallResNet()
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    return network.eval().state_dict()


@pytest.fixture
def run(monkeypatch, capsys, prefect_backend):
    """Runs the command in this process and returns exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptq", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth"
    torch.save(networks.small_resnet().state_dict(), path)
    return path
