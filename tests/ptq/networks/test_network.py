import networks
import pytest
import safetensors.torch
import torch

from ptq.networks import network as module
from ptq.networks.network import NetworkKind, keep_network, network_from_state, network_from_weights

KIND = NetworkKind("networks:SmallResNet", 4, (3, 24, 24))


@pytest.fixture
def folds(monkeypatch):
    """The networks that were folded, with nothing kept from before."""
    monkeypatch.setattr(module, "_KEPT", type(module._KEPT)())
    found, fold = [], module.fold_model
    monkeypatch.setattr(module, "fold_model", lambda model, **options: found.append(model) or fold(model, **options))
    return found


def weights_file(directory, seed=0):
    torch.manual_seed(seed)
    path = directory / f"{seed}.safetensors"
    safetensors.torch.save_file(networks.small_resnet(seed).state_dict(), path)
    return path


def test_the_network_of_the_same_weights_is_built_and_folded_once(tmp_path, folds):
    weights = weights_file(tmp_path)
    assert network_from_weights(weights, KIND) is network_from_weights(weights, KIND)
    assert len(folds) == 1


def test_a_network_that_is_kept_is_not_built(tmp_path, folds):
    weights = weights_file(tmp_path)
    network = network_from_state(safetensors.torch.load_file(weights), KIND, source="weights")
    keep_network(weights, KIND, network)
    assert network_from_weights(weights, KIND) is network
    assert len(folds) == 1


def test_other_weights_make_another_network_and_two_are_kept(tmp_path, folds):
    first, second, third = (weights_file(tmp_path, seed) for seed in (1, 2, 3))
    for weights in (first, second, first, second):
        network_from_weights(weights, KIND)
    assert len(folds) == 2
    network_from_weights(third, KIND)
    network_from_weights(first, KIND)
    assert len(folds) == 4
