"""Which quantizers and which layers cost the most accuracy?

Turns the quantizers of a fake-quantized model on one at a time and compares the logits with FP32's. PyTorch runs it: a
measurement is one forward pass, where an engine has to build a graph for each (a network of seven layers, 64 images:
8 ms against 105 ms). What is done about a sensitive layer is decided in `fallback`.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import fx, nn

from ptq.networks.fake_quant import activate_, exportable_fake_quant, set_activation_amax_
from ptq.numerics.metrics import sqnr_db
from ptq.records.evaluation import in_method_order
from ptq.records.plan import PlacementPlan

BATCH_SIZE = 32

Images = Float[np.ndarray, "n c h w"]
AmaxTable = Mapping[str, float]


def quantizer_sqnr_db(
    model: nn.Module, plan: PlacementPlan, *, tables: Mapping[str, AmaxTable], images: Images
) -> dict[str, dict[str, float]]:
    """Returns, by method and activation quantizer, the SQNR of the logits when that quantizer alone is active.

    Args:
        model: the fake-quantized model; its state on return is not specified.
        plan: the plan it was built from.
        tables: the amax table of each method, in activation units.
        images: normalized images, float32 (n, c, h, w).

    Returns:
        dB, the larger the better; 200 where the quantizer changes nothing.
    """
    reference = _logits(model, plan, active=(), images=images)
    known: dict[tuple[str, float], float] = {}
    found: dict[str, dict[str, float]] = {}
    for method, table in tables.items():
        set_activation_amax_(model, plan, table)
        for spec in plan.activations:
            key = (spec.name, float(table[spec.name]))
            if key not in known:
                known[key] = sqnr_db(reference, _logits(model, plan, active=(spec.name,), images=images))
            found.setdefault(method, {})[spec.name] = known[key]
    return found


def layer_sqnr_db(
    model: nn.Module, plan: PlacementPlan, *, quantizers: Mapping[str, Collection[str]], images: Images
) -> dict[str, float]:
    """Returns, by layer, the SQNR of the logits in dB when that layer's quantizers alone are active.

    Args:
        model: the fake-quantized model; its state on return is not specified.
        plan: the plan it was built from.
        quantizers: the quantizers of each layer, see `quantizers_of_layers`.
        images: normalized images, float32 (n, c, h, w).
    """
    reference = _logits(model, plan, active=(), images=images)
    return {
        layer: sqnr_db(reference, _logits(model, plan, active=names, images=images))
        for layer, names in quantizers.items()
    }


def _logits(model: nn.Module, plan: PlacementPlan, *, active: Collection[str], images: Images) -> np.ndarray:
    activate_(model, plan, active)
    with torch.inference_mode(), exportable_fake_quant():
        batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
        return np.concatenate([model(torch.from_numpy(batch)).numpy() for batch in batches])


def quantizers_of_layers(folded: nn.Module, plan: PlacementPlan) -> dict[str, tuple[str, ...]]:
    """Returns the quantizers of the input and of the weight of every quantized layer, in the order of the graph.

    A quantizer that sits before a max pool or a concat belongs to the layer that reads what comes out of it.
    """
    if not plan.traced:
        return {layer: (layer, f"{layer}.weight") for layer in plan.quantized_layers}
    assert isinstance(folded, fx.GraphModule)
    of_tensor = {tensor: spec.name for spec in plan.activations for tensor in spec.tensors}
    found: dict[str, set[str]] = {layer: set() for layer in plan.quantized_layers}
    for node in folded.graph.nodes:
        if node.op != "call_module" or node.target not in found:
            continue
        pending = list(node.all_input_nodes)
        while pending:
            tensor = pending.pop()
            if tensor.name in of_tensor:
                found[node.target].add(of_tensor[tensor.name])
            else:
                pending.extend(tensor.all_input_nodes)
    return {layer: (*sorted(names), f"{layer}.weight") for layer, names in found.items()}


def best_methods(found: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Returns the method with the highest SQNR for every quantizer; among equals the first of max, percentile, mse, ...

    Args:
        found: SQNR in dB by method and quantizer.

    >>> best_methods({"mse": {"a": 30.0, "b": 20.0}, "max": {"a": 30.0, "b": 10.0}})
    {'a': 'max', 'b': 'mse'}
    """
    methods = in_method_order(found)
    return {name: max(methods, key=lambda method: found[method][name]) for name in found[methods[0]]}


def per_layer_table(tables: Mapping[str, AmaxTable], methods: Mapping[str, str]) -> dict[str, float]:
    """Returns the amax table that takes every quantizer's amax from its own method.

    >>> per_layer_table({"max": {"a": 9.0, "b": 8.0}, "mse": {"a": 3.0, "b": 2.0}}, {"a": "max", "b": "mse"})
    {'a': 9.0, 'b': 2.0}
    """
    return {name: tables[method][name] for name, method in methods.items()}


def most_sensitive(found: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the layers by ascending SQNR; among equals in the order given.

    >>> most_sensitive({"conv1": 30.0, "conv2": 12.0, "fc": 30.0})
    ('conv2', 'conv1', 'fc')
    """
    return tuple(sorted(found, key=lambda layer: found[layer]))


def float_groups(layers: Sequence[str], *, limit: int) -> tuple[tuple[str, ...], ...]:
    """Returns the first 1, 2, 4, ... layers, up to `limit` and always with one layer left to quantize.

    >>> [len(group) for group in float_groups(["a", "b", "c", "d", "e", "f", "g"], limit=5)]
    [1, 2, 4, 5]
    >>> float_groups(["a", "b"], limit=5)
    (('a',),)
    """
    most = min(limit, len(layers) - 1)
    counts = [2**power for power in range(most.bit_length()) if 2**power < most] + [most] * (most > 0)
    return tuple(tuple(layers[:count]) for count in counts)
