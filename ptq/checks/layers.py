"""Which layers compute in INT8, and what has to stay in float?"""

from ptq.checks.subject import Found, Subject, check
from ptq.graph.nodes import DEQUANTIZE, QUANTIZE, RESHAPING, label, producer, walk_back


@check("layer-quantized", "error", "Quantize both inputs, or name it in skip_layers.")
def _layer_quantized(subject: Subject) -> Found:
    graph = subject.graph
    for layer in graph.layers:
        has_activation = graph.dequantize_behind(layer.activation) is not None
        has_weight = graph.has_quantized_weight(layer)
        if (has_activation and has_weight) or subject.is_allowed(layer.node, layer):
            continue
        bare = [name for name, has in (("activation", has_activation), ("weight", has_weight)) if not has]
        yield layer.node, f"This {layer.node.op} has no Q/DQ on its {' and '.join(bare)}, so it runs in float."


@check("layer-coverage", "info", "Nothing needs to be done.")
def _coverage(subject: Subject) -> Found:
    graph = subject.graph
    if not graph.layers:
        return
    quantized = [layer for layer in graph.layers if graph.is_quantized(layer)]
    share = 100 * len(quantized) / len(graph.layers)
    counts = [graph.multiply_accumulates(layer) for layer in graph.layers]
    total = sum(count or 0 for count in counts)
    by_macs = "their multiply-accumulates are unknown"
    if total and None not in counts:
        covered = sum(graph.multiply_accumulates(layer) or 0 for layer in quantized)
        by_macs = f"{100 * covered / total:.1f} % of {total:,} multiply-accumulates per image"
    yield None, f"{len(quantized)} of {len(graph.layers)} layers have INT8 inputs ({share:.1f} %; {by_macs})."


@check("bias-float", "error", "Keep the bias in float; the engine quantizes it.", on_cpu="warning")
def _bias_float(subject: Subject) -> Found:
    for layer in subject.graph.layers:
        before = producer(walk_back(layer.bias, RESHAPING)[1]) if layer.bias is not None else None
        is_whole = subject.dialect == "onnxruntime" and layer.node.op == "Gemm"
        if before is not None and before.op in (QUANTIZE, DEQUANTIZE) and not is_whole:
            yield layer.node, f"The bias comes from {label(before)}; expected a float constant."


@check("output-float", "error", "Remove the Q/DQ pair before the output.", on_cpu="warning")
def _output_float(subject: Subject) -> Found:
    for tensor in subject.graph.outputs:
        before = producer(walk_back(tensor, RESHAPING)[1])
        if before is not None and before.op in (QUANTIZE, DEQUANTIZE):
            yield before, f"Output {tensor.name} comes from this {before.op}; expected float logits."


@check("softmax-float", "error", "Remove the Q/DQ pair beside the softmax.")
def _softmax_float(subject: Subject) -> Found:
    for node in subject.graph.nodes:
        if node.op not in ("Softmax", "LogSoftmax") or not node.inputs or not node.outputs:
            continue
        if subject.graph.dequantize_behind(node.inputs[0]) is not None:
            yield node, f"This {node.op} reads quantized logits; expected float."
        if any(reader.op == QUANTIZE for reader in node.outputs[0].outputs):
            yield node, f"The result of this {node.op} is quantized; expected float."
