"""Are scales and zero points those of symmetric INT8, one of each per activation?"""

from collections.abc import Iterator

import numpy as np

from ptq.checks.subject import Found, Subject, brief, check, dead_channels
from ptq.graph.nodes import QUANTIZE, Node, constant, input_at, label, producer, scale_of, zero_point_of

_SCALE_MINIMUM = 1e-12
_SCALE_NORMAL = float(np.finfo(np.float32).tiny)
_SCALE_TINY = 1e-7
_SCALE_RATIO = 1e4


@check("qdq-scale-constant", "error", "Store it as an initializer.")
def _scale_constant(subject: Subject) -> Found:
    for node in subject.graph.quantizes + subject.graph.dequantizes:
        for position, what in ((1, "scale"), (2, "zero point")):
            if input_at(node, position) is not None and constant(input_at(node, position)) is None:
                yield node, f"The {what} is computed; expected a constant."


def _is_usable(subject: Subject, node: Node, scale: np.ndarray) -> np.ndarray:
    """Which scales are numbers to divide by. Those of a dead weight channel may be as small as float32 has them."""
    minimum = _SCALE_MINIMUM if node.op == QUANTIZE and subject.graph.is_activation(node) else _SCALE_NORMAL
    return np.asarray(np.isfinite(scale) & (scale >= minimum))


@check("qdq-scale-positive", "error", "Calibrate again; an amax of 0 or NaN gives such a scale.")
def _scale_positive(subject: Subject) -> Found:
    for node in subject.graph.scaled():
        scale = scale_of(node)
        if scale is None or _is_usable(subject, node, scale).all():
            continue
        wrong = scale[~_is_usable(subject, node, scale)]
        found = f"{wrong.size} of {scale.size} scales cannot be used, the first is {wrong.ravel()[0]:.6g}"
        yield node, f"{found}; expected finite, positive and not denormal."


def _living_scales(subject: Subject) -> Iterator[tuple[Node, np.ndarray]]:
    """The usable scales of each quantizer, without those of weight channels that are all zero."""
    weights = subject.graph.weight_quantizers()
    for node in subject.graph.scaled():
        scale, weight = scale_of(node), weights.get(id(node))
        if scale is None or not _is_usable(subject, node, scale).all():
            continue
        if weight is not None and weight.axis is not None and weight.values.shape[weight.axis] == scale.size:
            scale = scale.ravel()[~dead_channels(weight.values, weight.axis)]
        if scale.size:
            yield node, scale


@check("qdq-scale-tiny", "warning", "Leave the layer in float, or look for a dead channel or layer.")
def _scale_tiny(subject: Subject) -> Found:
    for node, scale in _living_scales(subject):
        if scale.min() < _SCALE_TINY and not subject.is_quantized_bias(node):
            yield node, f"The smallest scale is {scale.min():.3g}, below {_SCALE_TINY:g}."


@check("qdq-scale-ratio", "warning", "Equalize the channels, or leave the layer in float.")
def _scale_ratio(subject: Subject) -> Found:
    for node, scale in _living_scales(subject):
        if scale.max() / scale.min() > _SCALE_RATIO:
            yield node, f"The largest of {scale.size} scales is {scale.max() / scale.min():.3g} times the smallest."


@check("zero-point-present", "error", "Add a zero point of 0 with the type of the dialect.")
def _zero_point_present(subject: Subject) -> Found:
    for node in subject.graph.quantizes + subject.graph.dequantizes:
        if input_at(node, 2) is None and not subject.is_quantized_bias(node):
            yield node, f"This {node.op} has no zero point, and so the type uint8 by default; expected an explicit 0."


@check("zero-point-zero", "error", "Quantize symmetrically.", on_cpu="warning")
def _zero_point_zero(subject: Subject) -> Found:
    for node in subject.graph.scaled():
        values = zero_point_of(node)
        is_centre = subject.dialect == "onnxruntime" and values is not None and values.dtype == np.uint8
        if values is not None and values.any() and not (is_centre and (values == 128).all()):
            yield node, f"The zero point is {brief(values)}; expected 0, the scheme is symmetric."


@check("zero-point-type", "error", "Write the file in the dialect of the engine.")
def _zero_point_type(subject: Subject) -> Found:
    for node in subject.graph.scaled():
        values = zero_point_of(node)
        if values is None or subject.is_quantized_bias(node):
            continue
        may_be_uint8 = subject.dialect != "tensorrt" and node.op == QUANTIZE and subject.graph.is_activation(node)
        if values.dtype != np.int8 and not (may_be_uint8 and values.dtype == np.uint8):
            expected = "int8 or uint8" if may_be_uint8 else "int8"
            yield node, f"The zero point is {values.dtype}; expected {expected} here in the {subject.dialect} dialect."


@check("uint8-never-negative", "error", "Use int8, or keep the ReLU where the Q stands for it.")
def _uint8_never_negative(subject: Subject) -> Found:
    for node in subject.graph.quantizes:
        values = zero_point_of(node)
        if (
            values is None
            or values.dtype != np.uint8
            or subject.dialect == "tensorrt"
            or values.any()  # with another zero point uint8 reaches below zero; `zero-point-zero` reports it
            or not subject.graph.is_activation(node)
        ):
            continue
        if not subject.graph.never_negative(node.inputs[0]):
            before = producer(node.inputs[0])
            source = f"written by {label(before)} ({before.op})" if before is not None else "an input of the graph"
            yield node, f"The type is uint8, and {node.inputs[0].name}, {source}, may be negative."


def _feeds_depthwise_alone(subject: Subject, node: Node) -> bool:
    """Whether CPU engines can take one scale per channel here: each reader convolves every channel by itself."""
    if subject.dialect == "tensorrt":
        return False
    layers = {id(layer.node): layer for layer in subject.graph.layers}
    pairs = [reader for tensor in node.outputs for reader in tensor.outputs]
    readers = [reader for pair in pairs for tensor in pair.outputs for reader in tensor.outputs]
    channels = scale.size if (scale := scale_of(node)) is not None else 0
    return bool(readers) and all(
        id(reader) in layers and reader.op == "Conv" and reader.attrs.get("group", 1) == channels for reader in readers
    )


@check("activation-per-tensor", "error", "Give it one scale.")
def _activation_per_tensor(subject: Subject) -> Found:
    for node in subject.graph.quantizes:
        scale = scale_of(node)
        if scale is None or scale.size == 1 or not subject.graph.is_activation(node):
            continue
        if not _feeds_depthwise_alone(subject, node):
            yield node, f"This activation has {scale.size} scales; expected one."


@check("activation-depthwise", "warning", "Give it one scale to run the file on TensorRT.")
def _activation_depthwise(subject: Subject) -> Found:
    for node in subject.graph.quantizes:
        scale = scale_of(node)
        if scale is None or scale.size == 1 or not subject.graph.is_activation(node):
            continue
        if _feeds_depthwise_alone(subject, node):
            yield node, f"This input of a depthwise convolution has {scale.size} scales; TensorRT expects one."
