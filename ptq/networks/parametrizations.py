"""How do weights become plain that a network computes anew in every call, as weight and spectral norm do?"""

from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm


def make_plain_(network: nn.Module) -> None:
    """Replaces every computed weight by its value: parametrizations, and the hooks that came before them."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
                _forget_loading_(module)


def untie_(network: nn.Module) -> dict[str, str]:
    """Gives every layer a weight and a bias of its own, where several had one, so that each can be scaled by itself.

    Returns:
        for each name that has a parameter of its own now, the name whose parameter it was.
    """
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    seen: set[int] = set()
    for path, module in network.named_modules():
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            owner = first.setdefault(id(parameter), full)
            if owner != full:
                shared[full] = owner
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    return shared


def _forget_loading_(module: nn.Module) -> None:
    """Removes the hook that would look for the parts of the weight; torch 2.13 leaves it."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]
