"""How does a network that was trained with more branches than it is run with get rid of them?

RepVGG, MobileOne, FastViT, RepViT and LeViT add up branches, or a convolution and its BatchNorm, that one convolution
computes as well. Their blocks have a method for it, under one of three names.
"""

import copy
import inspect

import torch
from torch import nn

from ptq.wording import first_line

_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
# The sums of weights are rounded otherwise than those of activations.
_TOLERANCE = 1e-3


def reparameterized(network: nn.Module, *, input_shape: tuple[int, int, int]) -> tuple[nn.Module, str]:
    """Returns a network whose blocks are in the form that they are run in, if it computes the same.

    Args:
        network: in `eval()`, returning its logits; it is not changed.
        input_shape: (c, h, w) of the random images on which the two are compared.

    Returns:
        the network, itself where no block has such a method or its logits would change; and why, where they would.
    """
    if not any(_method(module) for module in network.modules()):
        return network, ""
    name = type(network).__name__
    try:
        changed = copy.deepcopy(network)
        if method := _method(changed):
            made = getattr(changed, method)()
            changed = made if isinstance(made, nn.Module) else changed
        _change_blocks_(changed)
        changed.eval()
        with torch.no_grad():
            images = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
            expected, found = network(images), changed(images)
    except Exception as error:  # the network's own code, which may raise anything
        return network, f"The training branches of {name} stay: to merge them fails ({first_line(error)})."
    largest = float(expected.abs().max())
    if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * largest):
        return network, f"The training branches of {name} stay: merged, they compute something else."
    return changed, ""


def _change_blocks_(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        method = _method(child)
        made = getattr(child, method)() if method else None
        if isinstance(made, nn.Module):  # fuse() of timm returns the block's successor
            setattr(module, name, made)
            child = made
        _change_blocks_(child)


def _method(module: nn.Module) -> str | None:
    """The method of a module that merges its branches, and needs nothing for it."""
    for name in _METHODS:
        method = getattr(type(module), name, None)
        if callable(method):
            others = list(inspect.signature(method).parameters.values())[1:]
            optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            if all(each.default is not each.empty or each.kind in optional for each in others):
                return name
    return None
