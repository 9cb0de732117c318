"""Which state dict of the original network folds to these weights?

Stages that change the weights of a folded model, as QAT and equalization do, keep them as a checkpoint of the
network as it was built, so that every later stage loads them like any other.
"""

import torch
from torch import nn

from ptq.networks.attention import original_name
from ptq.networks.folding import FoldedModel, traced_by_position

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def unfolded_state(original: nn.Module, folded: FoldedModel, changed: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a state dict of the original network that folds to the changed weights of the folded one.

    Args:
        original: the network before folding, with any weights.
        folded: what `fold_model` made of it.
        changed: a copy of the folded model with other weights; it may be fake-quantized.

    A folded BatchNorm becomes the addition of its layer's bias: weight 1, bias 0, variance 1 - eps, mean -bias.
    """
    state = {name: value.detach().clone() for name, value in original.state_dict().items()}
    trained = {name: value.detach().clone() for name, value in changed.state_dict().items()}
    for name in folded.module.state_dict():
        original_parameter = original_name(name, state)
        if original_parameter is not None:
            state[original_parameter] = trained[name]
    for norm, layer in _folded_batchnorms(original, folded).items():
        if f"{layer}.bias" not in trained:
            continue  # it computes the same for every image, and stays as it was
        neutral = {"weight": 1.0, "bias": 0.0, "running_var": 1.0 - original.get_submodule(norm).eps}
        for name, value in neutral.items():
            if f"{norm}.{name}" in state:
                state[f"{norm}.{name}"].fill_(value)
        state[f"{norm}.running_mean"] = -trained[f"{layer}.bias"]
        if f"{layer}.bias" in state:
            state[f"{layer}.bias"].zero_()
    return state


def _folded_batchnorms(original: nn.Module, folded: FoldedModel) -> dict[str, str]:
    """The layer into which each BatchNorm that is gone was folded, by their names."""
    if not folded.traced:
        return {}
    remaining = {name for name, _ in folded.module.named_modules()}
    layers = {name for name, module in original.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    found = {}
    for node in traced_by_position(original).graph.nodes:
        if node.op != "call_module" or node.target in remaining:
            continue
        if isinstance(original.get_submodule(node.target), _BATCHNORMS):
            source = node.args[0]
            while source.target not in layers:  # dropout and identities between the two are gone as well
                source = source.args[0]
            found[node.target] = source.target
    return found
