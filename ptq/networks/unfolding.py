"""Which state dict of the original network folds to these weights?

Stages that change the weights of a folded model, as QAT and equalization do, keep them as a checkpoint of the
network as it was built, so that every later stage loads them like any other.
"""

import torch
from torch import nn

from ptq.networks.attention import original_name
from ptq.networks.folding import FoldedModel


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
    for norm, layer in folded.norms.items():
        neutral = {"weight": 1.0, "bias": 0.0, "running_var": 1.0 - original.get_submodule(norm).eps}
        for name, value in neutral.items():
            if f"{norm}.{name}" in state:
                state[f"{norm}.{name}"].fill_(value)
        state[f"{norm}.running_mean"] = -trained[f"{layer}.bias"]
        if f"{layer}.bias" in state:
            state[f"{layer}.bias"].zero_()
    return state
