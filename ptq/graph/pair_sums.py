"""How does a template get weights whose sums of two products fit 16 bits?

For processors without VNNI; see `numerics.saturation`. The scale of an output channel grows where a pair of its weights
could saturate at any input, and nowhere else, so that nothing needs to be known of images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from jaxtyping import Float
from onnx import numpy_helper

from ptq.graph.candidate import groups_of, layer_nodes
from ptq.numerics.saturation import LARGEST_INPUT, scales_without_saturation
from ptq.records.plan import PlacementPlan


@dataclass(frozen=True, slots=True)
class GrownScales:
    """How many scales of how many there are have grown, in how many layers, and the largest factor."""

    scales: int
    grown: int
    layers: int
    largest_factor: float


def limit_pair_sums(template: Path, path: Path, *, plan: PlacementPlan) -> GrownScales:
    """Writes the template with weight scales at which no 16-bit sum of two products can saturate.

    Args:
        template: a Q/DQ template, whose weight scales are set.
        path: file to write; its bytes depend on the arguments alone.
        plan: the placement plan.
    """
    model = onnx.load(template)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    axes = {spec.readers[0]: spec.axis or 0 for spec in plan.weights}
    factors: list[Float[np.ndarray, " out"]] = []
    for layer, node in layer_nodes(model, plan).items():
        name = f"{layer}.weight.scale"
        weight = numpy_helper.to_array(initializers[f"{layer}.weight"])
        before = numpy_helper.to_array(initializers[name])
        groups = groups_of(node)
        turned = outputs_first(weight, axes[layer], node.op_type, groups)
        after = scales_without_saturation(
            turned,
            np.tile(np.atleast_1d(before), len(turned) // before.size),
            np.full(turned.shape[1] * groups, LARGEST_INPUT),
            groups=groups,
        )
        # A scale may be that of several rows: one for the tensor, or one for all groups of a ConvTranspose.
        after = after.reshape(-1, before.size).max(axis=0).reshape(before.shape)
        initializers[name].CopyFrom(numpy_helper.from_array(after, name))
        factors.append(np.atleast_1d(after / before))
    path.write_bytes(model.SerializeToString(deterministic=True))
    return GrownScales(
        scales=sum(each.size for each in factors),
        grown=sum(int((each > 1).sum()) for each in factors),
        layers=sum(bool((each > 1).any()) for each in factors),
        largest_factor=max((float(each.max()) for each in factors), default=1.0),
    )


def outputs_first(
    weight: Float[np.ndarray, "..."], axis: int, operator: str, groups: int
) -> Float[np.ndarray, "out inputs *kernel"]:
    """Returns a weight as (outputs, inputs of a group, ...).

    Args:
        weight: of a Conv, a ConvTranspose (in, outputs of a group, ...), or a matrix.
        axis: its output-channel axis.
        operator: of the node that reads it.
        groups: groups of a convolution, else 1.
    """
    if operator != "ConvTranspose":
        return np.moveaxis(weight, axis, 0)
    parts = np.split(weight, groups, axis=0)
    return np.concatenate([np.moveaxis(part, 1, 0) for part in parts])
