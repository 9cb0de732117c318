"""What is a network of PyTorch's to the rules?"""

import torch
from torch import fx, nn

from ptq.quantization.torch_view import view_of


class Signs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        raw = self.conv(x)
        rectified = torch.relu(raw)
        shifted = rectified + -1.0
        doubled = rectified * 2.0
        summed = rectified + torch.sigmoid(raw)
        mixed = rectified + raw
        joined = torch.cat([doubled, summed], 1)
        subtracted = torch.sub(rectified, summed), torch.add(rectified, summed, alpha=-1), rectified.add(other=-1)
        return raw, rectified, shifted, doubled, summed, mixed, torch.flatten(joined, 1), *subtracted


def test_never_negative_is_proved_from_the_operations():
    module = fx.symbolic_trace(Signs())
    tensors = view_of(module).tensors
    (output,) = [node for node in module.graph.nodes if node.op == "output"]
    proved = [tensors[node.name].never_negative for node in output.args[0]]
    assert proved == [False, True, False, True, True, False, True, False, False, False]
