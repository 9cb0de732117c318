"""Which faults does a Q/DQ graph of any residual network take, so that a check must find them?

Each entry of `FAULTS` damages a sound graph in one place, which it finds by structure and not by name, and names the
check that is meant for it. Nothing is measured here.
"""

from collections.abc import Callable

import numpy as np
from onnx import NodeProto, TensorProto, helper

from benchmarks.faulty_graph import DQ, Fault, Subject


def _attribute(node: NodeProto, name: str, value: int | None) -> None:
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend(kept + ([helper.make_attribute(name, value)] if value is not None else []))


def _largest(values: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(values).max(axis=tuple(index for index in range(values.ndim) if index != axis))


def _activation_scale(value: float) -> Callable[[Subject], None]:
    def fault(subject: Subject) -> None:
        quantize, _ = subject.activation()
        subject[quantize.input[1]] = np.array(value, np.float32)

    return fault


def _weight_scale(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Subject], None]:
    def fault(subject: Subject) -> None:
        quantize, _ = subject.weight()
        subject[quantize.input[1]] = change(subject[quantize.input[1]])

    return fault


def _with(scale: np.ndarray, index: int, value: float) -> np.ndarray:
    scale[index] = value
    return scale


def _zero_point(value: int) -> Callable[[Subject], None]:
    def fault(subject: Subject) -> None:
        quantize, _ = subject.activation()
        subject[quantize.input[2]] = np.array(value, subject[quantize.input[2]].dtype)

    return fault


def _weight_zero_point(subject: Subject) -> None:
    quantize, _ = subject.weight()
    subject[quantize.input[2]] = _with(subject[quantize.input[2]], -1, -3)


def _weight_uint8(subject: Subject) -> None:
    quantize, _ = subject.weight()
    subject[quantize.input[2]] = subject[quantize.input[2]].astype(np.uint8)


def _images_uint8(subject: Subject) -> None:
    quantize = subject.readers(subject.graph.input[0].name)[0]
    subject[quantize.input[2]] = np.array(0, np.uint8)


def _no_zero_point(subject: Subject) -> None:
    for node in subject.weight():
        del node.input[2]


def _other(position: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Subject], None]:
    def fault(subject: Subject) -> None:
        _, dequantize = subject.activation()
        name = subject.own(dequantize, position)
        subject[name] = change(subject[name])

    return fault


def _dequantize_axis(subject: Subject) -> None:
    _, dequantize = subject.weight(lambda values: values.shape[0] == values.shape[1])
    _attribute(dequantize, "axis", 1)


def _computed_scale(subject: Subject) -> None:
    quantize, dequantize = subject.activation()
    subject.insert(quantize, helper.make_node("Abs", [quantize.input[1]], ["computed"], name="abs"))
    quantize.input[1] = dequantize.input[1] = "computed"


def _no_activation_pair(subject: Subject) -> None:
    subject.remove_pair(subject.activation()[0])


def _no_weight_pair(subject: Subject) -> None:
    subject.remove_pair(subject.weight()[0])


def _per_channel_activation(subject: Subject) -> None:
    quantize, dequantize = subject.activation()
    channels = subject.weight_behind(dequantize).shape[1]
    subject[quantize.input[1]] = np.full(channels, subject[quantize.input[1]], np.float32)
    subject[quantize.input[2]] = np.zeros(channels, subject[quantize.input[2]].dtype)
    for node in (quantize, dequantize):
        _attribute(node, "axis", 1)


def _per_tensor_weight(subject: Subject) -> None:
    quantize, dequantize = subject.weight()
    subject[quantize.input[1]] = np.array(subject[quantize.input[1]].max(), np.float32)
    subject[quantize.input[2]] = np.array(0, np.int8)
    for node in (quantize, dequantize):
        _attribute(node, "axis", None)


def _weight_axis(axis: int | None) -> Callable[[Subject], None]:
    def fault(subject: Subject) -> None:
        for node in subject.weight(lambda values: values.shape[0] == values.shape[1]):
            _attribute(node, "axis", axis)

    return fault


def _oblong_weight_axis(subject: Subject) -> None:
    for node in subject.weight(lambda values: values.shape[0] != values.shape[1]):
        _attribute(node, "axis", 1)


def _linear_axis(subject: Subject) -> None:
    layer = next(subject.of("Gemm"))
    dequantize = subject.writer(layer.input[1])
    assert dequantize is not None
    for node in (dequantize, subject.writer(dequantize.input[0])):
        assert node is not None
        _attribute(node, "axis", 1)


def _scales_of_other_axis(subject: Subject) -> None:
    quantize, _ = subject.weight(lambda values: values.shape[0] == values.shape[1])
    subject[quantize.input[1]] = _largest(subject[quantize.input[0]], 1) / np.float32(127)


def _short_scales(subject: Subject) -> None:
    quantize, _ = subject.weight()
    for position in (1, 2):
        subject[quantize.input[position]] = subject[quantize.input[position]][:-1]


def _scales_of_another_layer(subject: Subject) -> None:
    quantize, _ = subject.weight()
    subject[quantize.input[0]] = subject[quantize.input[0]] * np.float32(100)


def _dead_channel(subject: Subject) -> None:
    quantize, _ = subject.weight()
    subject[quantize.input[0]] = _with(subject[quantize.input[0]], 0, 0)


def _huge_channel(subject: Subject) -> None:
    quantize, _ = subject.weight()
    for position in (0, 1):
        values = subject[quantize.input[position]]
        values[0] *= np.float32(1e5)
        subject[quantize.input[position]] = values


def _int32_bias(subject: Subject) -> None:
    layer = subject.layer(subject.weight()[0])
    channels = subject[layer.input[2]].size
    subject["seeded.bias"] = np.arange(channels, dtype=np.int32)
    subject["seeded.scale"] = np.full(channels, 1e-4, np.float32)
    subject["seeded.zero"] = np.zeros(channels, np.int32)
    inputs = ["seeded.bias", "seeded.scale", "seeded.zero"]
    subject.insert(layer, helper.make_node(DQ, inputs, ["seeded.dq"], name="seeded/DQ", axis=0))
    layer.input[2] = "seeded.dq"


def _bias_pair(subject: Subject) -> None:
    layer = subject.layer(subject.weight()[0])
    subject.pair(layer.input[2], layer, scale=0.02)


def _both_operands(subject: Subject) -> None:
    add, bare, _ = subject.residual()
    subject.pair(bare, add, scale=0.02)


def _no_operand(subject: Subject) -> None:
    add, _, dequantize = subject.residual()
    quantize = subject.writer(dequantize.input[0])
    assert quantize is not None
    subject.reroute(add, dequantize.output[0], quantize.input[0])


def _wrong_operand(subject: Subject) -> None:
    _no_operand(subject)
    add = next(node for node in subject.of("Add") if all(_bare(subject, name) for name in node.input))
    convolution = next(name for name in add.input if _ends_in_convolution(subject, name))
    subject.pair(convolution, add, scale=0.02)


def _bare(subject: Subject, name: str) -> bool:
    found = subject.writer(name)
    return found is not None and found.op_type != DQ


def _ends_in_convolution(subject: Subject, name: str) -> bool:
    found = subject.writer(name)
    return found is not None and found.op_type == "Conv" and len(subject.readers(name)) == 1


def _second_quantizer(factor: float) -> Callable[[Subject], None]:
    def fault(subject: Subject) -> None:
        add, _, dequantize = subject.residual()
        quantize = subject.writer(dequantize.input[0])
        assert quantize is not None
        scale, kind = subject[quantize.input[1]].item(), subject[quantize.input[2]].dtype
        subject.reroute(add, dequantize.output[0], quantize.input[0])
        subject.pair(quantize.input[0], add, scale=scale * factor, kind=kind)

    return fault


def _float_pool(subject: Subject) -> None:
    subject.remove_pair(subject.pool()[1])


def _batchnorm(subject: Subject) -> None:
    layer = subject.layer(subject.weight()[0])
    channels, (reader, *_) = subject[layer.input[2]].size, subject.readers(layer.output[0])
    names = ["seeded.gamma", "seeded.beta", "seeded.mean", "seeded.variance"]
    for name, value in zip(names, (1, 0, 0, 1), strict=True):
        subject[name] = np.full(channels, value, np.float32)
    node = helper.make_node("BatchNormalization", [layer.output[0], *names], ["seeded.bn"], name="seeded/bn")
    subject.insert(reader, node)
    subject.reroute(reader, layer.output[0], "seeded.bn")


def _training_dropout(subject: Subject) -> None:
    last = next(subject.of("Gemm"))
    dequantize = subject.writer(last.input[0])
    assert dequantize is not None
    quantize = subject.writer(dequantize.input[0])
    assert quantize is not None
    subject["seeded.ratio"], subject["seeded.training"] = np.array(0.5, np.float32), np.array(True)
    source = quantize.input[0]
    inputs = [source, "seeded.ratio", "seeded.training"]
    subject.insert(quantize, helper.make_node("Dropout", inputs, ["seeded.drop"], name="seeded/drop"))
    subject.reroute(quantize, source, "seeded.drop")


def _quantized_output(subject: Subject) -> None:
    _, name = subject.end()
    end = helper.make_node("Identity", ["raw"], [name], name="seeded/end")
    subject.graph.node.append(end)
    subject.pair("raw", subject.graph.node[-1], scale=0.1)


def _quantized_softmax(subject: Subject) -> None:
    _, name = subject.end()
    subject.graph.node.append(helper.make_node("Softmax", ["raw"], [name], name="seeded/softmax"))
    subject.pair("raw", subject.graph.node[-1], scale=0.1)


def _double_pair(subject: Subject) -> None:
    _, dequantize = subject.activation()
    scale = subject[dequantize.input[1]].item()
    kind = subject[dequantize.input[2]].dtype
    (reader,) = subject.readers(dequantize.output[0])
    subject.pair(dequantize.output[0], reader, scale=scale, kind=kind)


def _dangling_pair(subject: Subject) -> None:
    quantize, dequantize = subject.activation()
    for node, source, target in ((quantize, quantize.input[0], "loose.q"), (dequantize, "loose.q", "loose.dq")):
        new = helper.make_node(node.op_type, [source, *node.input[1:]], [target], name=f"seeded/{node.op_type}")
        subject.graph.node.append(new)


def _cast_of_codes(subject: Subject) -> None:
    quantize, _ = subject.activation()
    node = helper.make_node("Cast", [quantize.output[0]], ["seeded.cast"], name="seeded/cast", to=TensorProto.FLOAT)
    subject.graph.node.append(node)


def _codes_from_cast(subject: Subject) -> None:
    quantize, dequantize = subject.activation()
    kind = helper.np_dtype_to_tensor_dtype(subject[dequantize.input[2]].dtype)
    quantize.CopyFrom(helper.make_node("Cast", [quantize.input[0]], list(quantize.output), name="seeded/cast", to=kind))


def _other_domain(subject: Subject) -> None:
    next(subject.of("Add")).domain = "com.example"
    subject.model.opset_import.append(helper.make_opsetid("com.example", 1))


def _shared_name(subject: Subject) -> None:
    first, second = list(subject.of("Conv"))[1:3]
    second.name = first.name


def _initializer_as_input(subject: Subject) -> None:
    name = subject.layer(subject.weight()[0]).input[2]
    subject.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, subject[name].shape))


def _second_input(subject: Subject) -> None:
    subject.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ("n", 1)))


def _uint8_input(subject: Subject) -> None:
    name = subject.graph.input[0].name
    subject.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    for reader in subject.readers(name):
        subject.reroute(reader, name, "seeded.cast")
    subject.graph.node.insert(0, helper.make_node("Cast", [name], ["seeded.cast"], name="seeded/cast", to=1))


def _dynamic_height(subject: Subject) -> None:
    subject.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"


def _second_output(subject: Subject) -> None:
    name = next(subject.of("Add")).output[0]
    subject.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", "c", "h", "w")))


def _wrong_rank_output(subject: Subject) -> None:
    _, name = subject.end()
    classes = subject.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    subject["seeded.axes"] = np.array([2, 3], np.int64)
    subject.graph.node.append(helper.make_node("Unsqueeze", ["raw", "seeded.axes"], [name], name="seeded/end"))
    subject.graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", classes, 1, 1)))


def _metadata(subject: Subject) -> None:
    kept = [item for item in subject.model.metadata_props if item.key != "ptq.trial"]
    del subject.model.metadata_props[:]
    subject.model.metadata_props.extend(kept)


def _opset(version: int) -> Callable[[Subject], None]:
    def fault(subject: Subject) -> None:
        subject.model.opset_import[0].version = version

    return fault


def _dynamic_quantization(subject: Subject) -> None:
    _, quantize = subject.pool()
    outputs = ["seeded.codes", "seeded.step", "seeded.offset"]
    subject.insert(quantize, helper.make_node("DynamicQuantizeLinear", [quantize.input[0]], outputs, name="seeded/dyn"))


def _stored_int8(subject: Subject) -> None:
    quantize, dequantize = subject.weight()
    values, scale = subject[quantize.input[0]], subject[quantize.input[1]].reshape(-1, 1, 1, 1)
    subject["seeded.int8"] = np.clip(np.round(values / scale), -128, 127).astype(np.int8)
    dequantize.input[0] = "seeded.int8"
    subject.graph.node.remove(quantize)


def _float_island(subject: Subject) -> None:
    quantize, _ = subject.activation()
    source = quantize.input[0]
    subject.insert(quantize, helper.make_node("Tan", [source], ["seeded.tan"], name="seeded/tan"))
    subject.reroute(quantize, source, "seeded.tan")


TENSORRT, CPU = ("tensorrt",), ("cpu",)
FAULTS: dict[str, Fault] = {
    "activation scale 0": Fault(put=_activation_scale(0), check="qdq-scale-positive"),
    "activation scale NaN": Fault(put=_activation_scale(np.nan), check="qdq-scale-positive"),
    "activation scale infinite": Fault(put=_activation_scale(np.inf), check="qdq-scale-positive"),
    "activation scale negative": Fault(put=_activation_scale(-0.02), check="qdq-scale-positive"),
    "scale of one weight channel 0": Fault(put=_weight_scale(lambda s: _with(s, 0, 0)), check="qdq-scale-positive"),
    "activation scale 1e-9": Fault(put=_activation_scale(1e-9), check="qdq-scale-tiny"),
    "weight scales far apart": Fault(put=_huge_channel, check="qdq-scale-ratio"),
    "weight channel all zero": Fault(put=_dead_channel, check="weight-channel-zero"),
    "activation zero point 5": Fault(put=_zero_point(5), check="zero-point-zero"),
    "weight zero point -3": Fault(put=_weight_zero_point, check="zero-point-zero"),
    "weight uint8": Fault(put=_weight_uint8, check="zero-point-type"),
    "images uint8 for TensorRT": Fault(put=_images_uint8, check="zero-point-type", dialects=TENSORRT),
    "images uint8": Fault(put=_images_uint8, check="uint8-never-negative", dialects=CPU),
    "zero point left out": Fault(put=_no_zero_point, check="zero-point-present"),
    "DQ with another scale": Fault(put=_other(1, lambda s: s * np.float32(1.5)), check="qdq-scale-matches"),
    "DQ with another zero point": Fault(put=_other(2, lambda z: z + z.dtype.type(1)), check="qdq-zero-point-matches"),
    "DQ with another axis": Fault(put=_dequantize_axis, check="qdq-axis-matches"),
    "scale computed": Fault(put=_computed_scale, check="qdq-scale-constant"),
    "activation pair missing": Fault(put=_no_activation_pair, check="layer-quantized"),
    "weight pair missing": Fault(put=_no_weight_pair, check="layer-quantized"),
    "activation per channel": Fault(put=_per_channel_activation, check="activation-per-tensor"),
    "weight per tensor": Fault(put=_per_tensor_weight, check="weight-per-channel"),
    "axis 1 on a square weight": Fault(put=_weight_axis(1), check="weight-axis"),
    "axis not given": Fault(put=_weight_axis(None), check="weight-axis"),
    "axis 1 on an oblong weight": Fault(put=_oblong_weight_axis, check="weight-axis"),
    "axis 1 on the last layer": Fault(put=_linear_axis, check="weight-axis"),
    "weight scales one short": Fault(put=_short_scales, check="weight-scale-count"),
    "weight scales of the other axis": Fault(put=_scales_of_other_axis, check="weight-scale-fit"),
    "weight a hundred times its scales": Fault(put=_scales_of_another_layer, check="weight-scale-fit"),
    "weight saturates": Fault(
        put=_weight_scale(lambda s: s * np.float32(0.4)), check="weight-saturation"
    ),
    "bias int32": Fault(put=_int32_bias, check="bias-float"),
    "bias behind Q/DQ": Fault(put=_bias_pair, check="bias-float"),
    "both residual operands quantized": Fault(put=_both_operands, check="residual-add"),
    "no residual operand quantized": Fault(put=_no_operand, check="residual-add"),
    "wrong residual operand quantized": Fault(put=_wrong_operand, check="residual-add"),
    "two scales on one tensor": Fault(put=_second_quantizer(1.5), check="tensor-one-scale"),
    "two equal quantizers on one tensor": Fault(
        put=_second_quantizer(1), check="tensor-one-quantizer"
    ),
    "average pool in float": Fault(put=_float_pool, check="average-pool-quantized"),
    "BatchNormalization left": Fault(put=_batchnorm, check="batchnorm-foldable"),
    "dropout in training mode": Fault(put=_training_dropout, check="training-mode"),
    "output quantized": Fault(put=_quantized_output, check="output-float"),
    "softmax of quantized logits": Fault(put=_quantized_softmax, check="softmax-float"),
    "two pairs in a row": Fault(put=_double_pair, check="qdq-double"),
    "pair that nothing reads": Fault(put=_dangling_pair, check="qdq-dangling"),
    "Q feeds a cast": Fault(put=_cast_of_codes, check="q-feeds-dq"),
    "DQ reads a cast": Fault(put=_codes_from_cast, check="dq-source"),
    "operator of another domain": Fault(put=_other_domain, check="domain-known"),
    "node name used twice": Fault(put=_shared_name, check="node-names-unique"),
    "initializer listed as input": Fault(put=_initializer_as_input, check="initializer-not-input"),
    "two inputs": Fault(put=_second_input, check="image-input"),
    "uint8 input": Fault(put=_uint8_input, check="image-input"),
    "dynamic height": Fault(put=_dynamic_height, check="input-shape"),
    "other input shape": Fault(
        put=lambda subject: None, check="input-shape", options={"input_shape": (3, 17, 17)}
    ),
    "two outputs": Fault(put=_second_output, check="class-output"),
    "output of four dimensions": Fault(put=_wrong_rank_output, check="class-output"),
    "other number of classes": Fault(put=lambda subject: None, check="class-output", options={"num_classes": 17}),
    "metadata incomplete": Fault(put=_metadata, check="metadata-complete"),
    "opset 18 for TensorRT 8.6": Fault(
        put=_opset(18), check="opset-tensorrt-8", dialects=TENSORRT
    ),
    "dynamic quantization": Fault(put=_dynamic_quantization, check="integer-operators"),
    "weight stored as int8": Fault(
        put=_stored_int8, check="weight-prequantized", dialects=TENSORRT
    ),
    "float node between layers": Fault(put=_float_island, check="float-islands"),
}  # fmt: skip
