"""Which layers does an ONNX graph have, and what are nodes, tensors and weights called?

A layer is called as the module whose parameter its weight is, where the exporter left that, else as its node, else by
its operator and position. Everything else is named after its node. What the graph computes is not touched here.
"""

import re
from collections.abc import Iterator

import onnx_graphsurgeon as gs

from ptq.graph.qdq_graph import Layer, QdqGraph

# For the annotations of those who may not import the library.
Graph = gs.Graph


def observed_output(name: str) -> str:
    """Returns the name of the graph output that carries the observed tensor `name`."""
    return f"observed.{name}"


# Endings of names that the Q/DQ graph gives to its own initializers.
_RESERVED = (".scale", ".zero_point", ".weight", ".bias")


def layers_of(graph: gs.Graph) -> Iterator[Layer]:
    """Yields the layers whose weight is stored, has an output-channel axis and stands where engines expect it."""
    for layer in QdqGraph(graph.nodes, graph.inputs, graph.outputs).layers:
        weight = layer.weight
        if not isinstance(weight, gs.Constant) or layer.node.inputs[1] is not weight:
            continue
        if layer.node.op == "Gemm" and not layer.node.attrs.get("transB", 0):
            continue
        if layer.node.op in ("Conv", "ConvTranspose") or len(weight.shape or ()) == 2:
            yield layer


def bias_add(graph: gs.Graph | QdqGraph, node: gs.Node) -> gs.Node | None:
    """Returns the addition of a bias behind a MatMul, None where there is none."""
    result = node.outputs[0]
    if node.op != "MatMul" or len(result.outputs) != 1 or any(result is tensor for tensor in graph.outputs):
        return None
    add = result.outputs[0]
    constants = [tensor for tensor in add.inputs if isinstance(tensor, gs.Constant)]
    if add.op != "Add" or len(constants) != 1:
        return None
    return add if constants[0].values.shape == node.inputs[1].values.shape[1:] else None


def rename_(graph: gs.Graph) -> None:
    """Names nodes after the modules they come from, results after their nodes, parameters after their layers."""
    ends = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    taken = set(ends)
    layers = list(layers_of(graph))
    names: dict[int, str] = {}
    biases: dict[str, gs.Constant] = {}
    for layer in layers:
        key, bias = id(layer.weight), _stored_bias(graph, layer)
        if key in names:  # a layer that is called again is another node on the same weight
            layer.node.name = _unique(f"{names[key]}.again", taken)
            continue
        name = _layer_name(layer, "" if bias is None else bias.name) or f"{layer.node.op.lower()}_{len(names)}"
        names[key] = layer.node.name = _unique(name, taken)
        taken |= {f"{names[key]}{ending}" for ending in (".weight", ".bias")}
        if bias is not None:
            biases[names[key]] = bias
    own = {id(layer.node) for layer in layers}
    for position, node in enumerate(graph.nodes):
        if id(node) not in own:
            node.name = _unique(_node_name(node, position), taken)
        for index, tensor in enumerate(node.outputs):
            if tensor.name not in ends:
                tensor.name = node.name if index == 0 else f"{node.name}.out{index}"
    _rename_constants_(graph, {id(layer.weight): f"{names[id(layer.weight)]}.weight" for layer in layers}, biases)


def _rename_constants_(graph: gs.Graph, weights: dict[int, str], biases: dict[str, gs.Constant]) -> None:
    known = weights | {id(bias): f"{layer}.bias" for layer, bias in biases.items()}
    for node in graph.nodes:
        for position, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                tensor.name = known.setdefault(id(tensor), f"{node.name}.input{position}")


def _stored_bias(graph: gs.Graph, layer: Layer) -> gs.Constant | None:
    add = bias_add(graph, layer.node)
    candidates = [layer.bias] if layer.bias is not None else add.inputs if add is not None else []
    return next((tensor for tensor in candidates if isinstance(tensor, gs.Constant)), None)


def _layer_name(layer: Layer, bias: str) -> str:
    """The module of the weight, else the one that the exporter's scope spells, else the node's name.

    A projection that is no module of its own has the scope of what it is part of, and a bias that tells it apart.
    """
    scope = scope_of(layer.node.name)
    projection = re.sub(r"[._]bias$", "", bias)
    if scope and projection != bias and projection.startswith(f"{scope}."):
        scope = projection
    return _without_reserved(_clean(module_of(layer.weight.name) or scope or layer.node.name))


def module_of(parameter: str) -> str:
    """Returns the module whose parameter a name is, empty where the name does not say.

    >>> module_of("features.0.0.weight"), module_of("onnx::Conv_12")
    ('features.0.0', '')
    """
    module, _, leaf = parameter.rpartition(".")
    return module if leaf == "weight" else ""


def scope_of(name: str) -> str:
    """Returns the PyTorch module in an exporter's node name; empty for names of other makers.

    >>> scope_of("/layer1/layer1.0/conv1/Conv"), scope_of("conv_7")
    ('layer1.0.conv1', '')
    """
    modules: list[str] = []
    for part in name.split("/")[1:-1] if name.startswith("/") else []:
        if modules and part.startswith(f"{modules[-1]}."):
            modules.pop()
        modules.append(part)
    return ".".join(modules)


def _node_name(node: gs.Node, position: int) -> str:
    scope, leaf = scope_of(node.name), node.name.rpartition("/")[2]
    name = _clean(f"{scope}.{leaf}" if scope else node.name) or f"{node.op.lower()}_{position}"
    return _without_reserved(name)


def _without_reserved(name: str) -> str:
    return f"{name}_" if name.endswith(_RESERVED) or name.startswith("observed.") else name


def _clean(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", name.strip("/").replace("/", ".")).strip("._")


def _unique(name: str, taken: set[str]) -> str:
    """Adds a number to a name that is taken, and takes it."""
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found
