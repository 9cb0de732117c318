"""Which layers of a network compute the same for every image, and what comes out of them?

Position biases from a small network, learned queries that are projected, a fixed grid through a convolution: nothing of
it depends on the image, so that there is nothing to quantize. Its result takes its place.
"""

import torch
from torch import fx, nn

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
_LAYER_FUNCTIONS = {torch.conv2d, nn.functional.conv2d, nn.functional.linear, torch.matmul, torch.mm}


def fold_constant_layers_(module: fx.GraphModule) -> tuple[str, ...]:
    """Replaces what layers compute from parameters and buffers alone by its value, and what nobody reads by nothing.

    Constants without a layer in them stay as they are.

    Args:
        module: a traced network in `eval()`, without operations in place.

    Returns:
        the names of the layers that are gone.
    """
    before = _layer_names(module)
    module.graph.eliminate_dead_code()
    constant: set[fx.Node] = set()
    with_layer: set[fx.Node] = set()
    for node in module.graph.nodes:
        if not _is_constant(node, constant):
            continue
        constant.add(node)
        if _is_layer(module, node) or any(source in with_layer for source in node.all_input_nodes):
            with_layer.add(node)
    ends = [
        node for node in module.graph.nodes if node in with_layer and any(user not in constant for user in node.users)
    ]
    values = _computed(module, constant) if ends else {}
    for node in ends:
        value = values[node]
        if not isinstance(value, torch.Tensor):
            continue
        name = f"{node.name}_constant"
        module.register_buffer(name, value.detach().clone())
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name), propagate_meta=False)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    return tuple(name for name in before if name not in set(_layer_names(module)))


def _layer_names(module: fx.GraphModule) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, _LAYERS)]


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    if node.op in ("placeholder", "output") or node.is_impure():
        return False
    return all(source in constant for source in node.all_input_nodes)


def _is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _LAYERS)
    return node.op == "call_function" and node.target in _LAYER_FUNCTIONS


def _computed(module: fx.GraphModule, constant: set[fx.Node]) -> dict[fx.Node, object]:
    """The values of constant nodes."""
    interpreter = fx.Interpreter(module, garbage_collect_values=False)
    with torch.no_grad():
        for node in module.graph.nodes:
            if node in constant:
                interpreter.env[node] = interpreter.run_node(node)
    return {node: interpreter.env[node] for node in constant}
