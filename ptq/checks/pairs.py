"""Does each Q have its DQ, with the same numbers, and nothing else?"""

from collections.abc import Iterator

import numpy as np

from ptq.checks.subject import Found, Subject, brief, check
from ptq.graph.nodes import (
    DEQUANTIZE,
    QUANTIZE,
    Node,
    constant,
    input_at,
    label,
    producer,
    same_numbers,
    scale_of,
    source_quantize,
    walk_back,
    zero_point_of,
)


@check("q-feeds-dq", "error", "Put a DQ between this Q and every reader.")
def _q_feeds_dq(subject: Subject) -> Found:
    for node in subject.graph.quantizes:
        others = [reader for tensor in node.outputs for reader in tensor.outputs if reader.op != DEQUANTIZE]
        if others:
            yield node, f"This Q feeds {label(others[0])} ({others[0].op}); expected DequantizeLinear only."


@check("dq-source", "error", "Put the Q of the same scale right before it.")
def _dq_source(subject: Subject) -> Found:
    for node in subject.graph.dequantizes:
        if source_quantize(node) is not None or subject.is_quantized_bias(node):
            continue
        values = constant(input_at(node, 0))
        if values is None or values.dtype not in (np.int8, np.uint8):
            found = "a computed tensor" if values is None else f"a constant of type {values.dtype}"
            yield node, f"This DQ reads {found}; expected the output of a Q, or an int8 constant."


@check("qdq-double", "error", "Remove one of the two pairs.")
def _double(subject: Subject) -> Found:
    for node in subject.graph.quantizes:
        before = producer(walk_back(node.inputs[0], frozenset({"Identity"}))[1]) if node.inputs else None
        if before is not None and before.op in (DEQUANTIZE, QUANTIZE):
            yield node, f"This Q reads {label(before)} with nothing between, so that the tensor is rounded twice."


@check("qdq-dangling", "error", "Remove the pair.")
def _dangling(subject: Subject) -> Found:
    for node in subject.graph.quantizes + subject.graph.dequantizes:
        if not any(tensor.outputs or tensor.name in subject.graph.output_names for tensor in node.outputs):
            yield node, f"Nothing reads the output of this {node.op}."


def _pairs(subject: Subject) -> Iterator[tuple[Node, Node]]:
    for node in subject.graph.dequantizes:
        quantize = source_quantize(node)
        if quantize is not None:
            yield quantize, node


@check("qdq-scale-matches", "error", "Give Q and DQ one scale initializer.")
def _pair_scale(subject: Subject) -> Found:
    for quantize, dequantize in _pairs(subject):
        ours, theirs = scale_of(dequantize), scale_of(quantize)
        if ours is not None and theirs is not None and not same_numbers(ours, theirs):
            yield dequantize, f"The scale is {brief(ours)}, and {brief(theirs)} in its Q, {label(quantize)}."


@check("qdq-zero-point-matches", "error", "Give Q and DQ one zero-point initializer.")
def _pair_zero_point(subject: Subject) -> Found:
    for quantize, dequantize in _pairs(subject):
        ours, theirs = zero_point_of(dequantize), zero_point_of(quantize)
        if ours is not None and theirs is not None and not same_numbers(ours, theirs):
            yield dequantize, f"The zero point is {brief(ours)}, and {brief(theirs)} in its Q, {label(quantize)}."


@check("qdq-axis-matches", "error", "Give Q and DQ the same axis.")
def _pair_axis(subject: Subject) -> Found:
    for quantize, dequantize in _pairs(subject):
        ours, theirs = dequantize.attrs.get("axis"), quantize.attrs.get("axis")
        scale = scale_of(quantize)
        if scale is not None and scale.size > 1 and ours != theirs:
            yield dequantize, f"The axis is {ours}, and {theirs} in its Q, {label(quantize)}."
