"""Which tensors does calibration look at?

Turns a folded model into one that returns, beside the logits, every tensor whose distribution decides an
amax. The graph exported from it runs on the calibration engine. Nothing is counted here.
"""

import copy
from typing import Any

import torch
from torch import fx, nn

from ptq.dialect import observed_names
from ptq.records.plan import PlacementPlan


def observed_from_folded(folded: nn.Module, plan: PlacementPlan) -> nn.Module:
    """Returns a model with the outputs (logits, one tensor per activation quantizer); `folded` is not changed."""
    if not plan.traced:
        return _InputRecorder(folded, observed_names(plan)).eval()
    assert isinstance(folded, fx.GraphModule)
    model = copy.deepcopy(folded)
    nodes = {node.name: node for node in model.graph.nodes}
    (output,) = [node for node in model.graph.nodes if node.op == "output"]
    output.args = ((output.args[0], *(nodes[spec.observed] for spec in plan.activations)),)
    model.graph.lint()
    model.recompile()
    return model.eval()


class _InputRecorder(nn.Module):
    """Returns the inputs of named layers beside the logits, for a model that cannot be traced by torch.fx."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self._names = names
        self._seen: dict[str, list[torch.Tensor]] = {}
        for name in names:
            self.model.get_submodule(name).register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def remember(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._seen.setdefault(name, []).append(arguments[0].flatten())

        return remember

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._seen.clear()
        logits = self.model(images)
        # A layer that is called several times has one quantizer: every call counts.
        return (logits, *(torch.cat(self._seen[name]) for name in self._names))
