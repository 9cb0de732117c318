"""How is a convolution padded that does more than to put zeros around its input?

Quantized convolutions know zeros alone, and ONNX Runtime pads no dilated convolution "to the same size" by itself. So
the padding becomes numbers, and one with other values than zeros an operation of its own.
"""

import torch.nn.functional as F
from torch import fx, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def number_padding_(network: nn.Module) -> None:
    """Gives convolutions that are padded "same" or "valid" the numbers, where both ends of an axis get as much."""
    for module in network.modules():
        if isinstance(module, _CONVOLUTIONS) and isinstance(module.padding, str):
            ends = _ends(module)
            if ends[::2] == ends[1::2]:
                module.padding = tuple(reversed(ends[::2]))


def pad_before_(module: fx.GraphModule) -> None:
    """Puts an operation before each convolution that pads with other values than zeros, or unlike at both ends."""
    padded = {
        name: (_ends(part), "constant" if part.padding_mode == "zeros" else part.padding_mode)
        for name, part in module.named_modules()
        if isinstance(part, _CONVOLUTIONS) and (part.padding_mode != "zeros" or isinstance(part.padding, str))
    }
    for name in padded:
        part = module.get_submodule(name)
        part.padding, part.padding_mode = (0,) * len(part.kernel_size), "zeros"
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target in padded:
            ends, mode = padded[node.target]
            if any(ends):
                with module.graph.inserting_before(node):
                    pad = module.graph.call_function(F.pad, (node.args[0], ends, mode))
                node.args = (pad, *node.args[1:])


def _ends(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """What is added at both ends of each axis, the last axis first, as `F.pad` takes it."""
    return list(convolution._reversed_padding_repeated_twice)
