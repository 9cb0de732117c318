"""Are adds, concats, pools and shared tensors quantized where an engine needs it, and what stays in float?"""

from collections import Counter
from collections.abc import Iterator

from ptq.checks.subject import Found, Subject, brief, check, computes_on_integers
from ptq.graph.nodes import Node, label, same_numbers, scale_of, zero_point_of
from ptq.graph.operations import CONVOLUTIONS

_NODES_LISTED = 5


@check("residual-add", "error", "Quantize the identity or downsample branch, and that one alone.", on_cpu="warning")
def _residual_add(subject: Subject) -> Found:
    for add in subject.graph.residual_adds():
        if subject.is_allowed(add.node) or subject.dialect == "onnxruntime":
            continue
        if all(add.quantized):
            yield add.node, "Both operands of this residual add are quantized, which parts it from its convolution."
        elif not any(add.quantized):
            yield add.node, "Neither operand of this residual add is quantized, so that it runs in float."
        elif not all(add.from_conv) and add.from_conv == add.quantized:
            yield add.node, "This residual add has the convolution's branch quantized, and the identity branch bare."


@check(
    "whole-operator",
    "error",
    "Write the file with `--dialect onnxruntime`; a network that torch.fx cannot trace has to come as ONNX for it.",
)
def _whole_operator(subject: Subject) -> Found:
    graph = subject.graph
    if subject.dialect != "onnxruntime":
        return
    written = [layer.node for layer in graph.layers if layer.node.op in CONVOLUTIONS and graph.is_quantized(layer)]
    for add in graph.residual_adds():
        if not all(add.quantized) and not subject.is_allowed(add.node):
            yield add.node, "An operand of this residual add is bare, so that ONNX Runtime adds in float."
        written += [add.node]
    for node in written:
        last = _behind_clip(node)
        if graph.comes_before_a_layer(last) and not graph.is_only_quantized(last) and not subject.is_allowed(node):
            yield node, f"What this {node.op} writes is read without a Q, so that ONNX Runtime runs it in float."


def _behind_clip(node: Node) -> Node:
    """The node, or the clip behind it that a Q stands for as well as for a ReLU."""
    readers = [reader for tensor in node.outputs for reader in tensor.outputs]
    return readers[0] if len(readers) == 1 and readers[0].op == "Clip" else node


def _readers_of_one_tensor(subject: Subject) -> Iterator[list[Node]]:
    readers: dict[str, list[Node]] = {}
    for node in subject.graph.quantizes:
        if node.inputs:
            readers.setdefault(node.inputs[0].name, []).append(node)
    yield from (nodes for nodes in readers.values() if len(nodes) > 1)


@check("tensor-one-scale", "error", "Share one quantizer among all readers of the tensor.")
def _tensor_one_scale(subject: Subject) -> Found:
    for nodes in _readers_of_one_tensor(subject):
        scales = [(node, scale) for node in nodes if (scale := scale_of(node)) is not None]
        odd = [(node, scale) for node, scale in scales[1:] if not same_numbers(scale, scales[0][1])]
        if odd:
            yield (
                odd[0][0],
                (
                    f"{nodes[0].inputs[0].name} is quantized with scale {brief(odd[0][1])} here, "
                    f"and {brief(scales[0][1])} in {label(scales[0][0])}."
                ),
            )


@check("tensor-one-quantizer", "info", "Share the pair; engines merge them as well.")
def _tensor_one_quantizer(subject: Subject) -> Found:
    for nodes in _readers_of_one_tensor(subject):
        first = (scale_of(nodes[0]), zero_point_of(nodes[0]))
        same = [
            n for n in nodes[1:] if same_numbers(scale_of(n), first[0]) and same_numbers(zero_point_of(n), first[1])
        ]
        if same:
            yield same[0], f"{len(same) + 1} Q of one scale read {nodes[0].inputs[0].name}; one is enough."


@check("concat-scales", "warning", "Give all operands the largest of their scales.")
def _concat_scales(subject: Subject) -> Found:
    for node in subject.graph.nodes:
        if node.op != "Concat":
            continue
        behind = [found for tensor in node.inputs if (found := subject.graph.dequantize_behind(tensor)) is not None]
        scales = [scale for one in behind if (scale := scale_of(one)) is not None]
        if any(not same_numbers(scale, scales[0]) for scale in scales):
            yield (
                node,
                f"The operands have the scales {', '.join(brief(scale) for scale in scales[:4])}; expected one scale.",
            )


@check("average-pool-quantized", "warning", "Quantize its input.")
def _average_pool(subject: Subject) -> Found:
    for node in subject.graph.pools_to_quantize():
        if subject.graph.dequantize_behind(node.inputs[0]) is None and not subject.is_allowed(node):
            yield node, f"The input of this {node.op} is not quantized, so that it runs in float."


@check("float-nodes", "info", "Convert the float part to FP16 for a strongly typed TensorRT.")
def _float_nodes(subject: Subject) -> Found:
    found = [node for node in subject.graph.float_nodes() if not computes_on_integers(node)]
    if found:
        kinds = Counter(node.op for node in found).most_common()
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds)
        listed = ", ".join(label(node) for node in found[:_NODES_LISTED])
        more = f" and {len(found) - _NODES_LISTED} more" if len(found) > _NODES_LISTED else ""
        yield None, f"{len(found)} nodes compute in float ({counted}): {listed}{more}."


@check("float-islands", "info", "Quantize their inputs where the accuracy allows it.")
def _float_islands(subject: Subject) -> Found:
    islands = subject.graph.float_islands()
    if islands:
        nodes = sum(len(island) for island in islands)
        yield islands[-1][0], f"{len(islands)} groups of float nodes ({nodes} nodes) lie between INT8 layers."
