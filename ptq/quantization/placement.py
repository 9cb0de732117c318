"""Which quantizers does a network get, and which of its layers stay in float, those included that no rule knows?

The rules know modules and nodes of the kinds that get quantizers. What else multiplies by weights, such as an LSTM or a
convolution whose weight depends on the image, is known from the FP32 graph alone.
"""

import dataclasses
from pathlib import Path

from ptq.config import QuantizationConfig
from ptq.graph.coverage import layer_names
from ptq.quantization.rules import is_within, place_quantizers
from ptq.quantization.view import GraphView
from ptq.records.plan import PlacementPlan


def plan_of_graph(
    view: GraphView, fp32: Path, *, quantization: QuantizationConfig, whole_operators: bool
) -> PlacementPlan:
    """Returns the placement plan of a network, with every layer of its FP32 graph that has no quantizer in float.

    Args:
        view: the network as the rules see it.
        fp32: its FP32 graph.
        quantization: where quantizers go.
        whole_operators: place the quantizers of the onnxruntime dialect too.

    Raises:
        UsageError: `skip_layers` names what the network does not have, or nothing is left to quantize.
    """
    known = tuple(view.layers)
    others = [name for name in layer_names(fp32) if name not in known]
    chosen = [name for name in others if any(is_within(name, given) for given in quantization.skip_layers)]
    of_rules = [
        given
        for given in quantization.skip_layers
        if any(is_within(name, given) for name in known) or not any(is_within(name, given) for name in chosen)
    ]
    options = quantization.model_dump(exclude={"dialects", "bias_correction", "weight_method", "equalization"})
    plan = place_quantizers(view, **{**options, "skip_layers": of_rules}, whole_operators=whole_operators)
    quantized = {*plan.quantized_layers, *plan.float_layers}
    return dataclasses.replace(
        plan,
        float_layers=(*plan.float_layers, *(name for name in dict.fromkeys(others) if name not in quantized)),
        chosen_float_layers=(*plan.chosen_float_layers, *chosen),
    )
