import hashlib

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptq.checks.run import check_graph
from ptq.errors import ExportError
from ptq.graph.half_precision import HALF_SMALLEST_NORMAL, half_from_float32, is_half

GENERATOR = np.random.default_rng(5)
IMAGES = GENERATOR.normal(size=(4, 3, 12, 12)).astype(np.float32)


def qdq_model(*, weight=None, weight_scale=None, opset=17, constant=None):
    """A 3 x 3 convolution of 8 channels with ReLU, mean pool and linear layer, all behind Q/DQ."""
    random = np.random.default_rng(1)
    weight = random.normal(size=(8, 3, 3, 3)).astype(np.float32) * 0.1 if weight is None else weight
    head = random.normal(size=(5, 8)).astype(np.float32)
    stored = {"conv.weight": weight, "fc.weight": head, "conv.bias": random.normal(size=8).astype(np.float32)}
    if weight_scale is None:
        weight_scale = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(127)
    scales = {
        "images": np.float32(0.03), "r": np.float32(0.02), "c": np.float32(0.01), "conv.weight": weight_scale,
        "fc.weight": np.abs(head).max(axis=1) / np.float32(127),
    }  # fmt: skip
    pairs = {}
    for name, scale in scales.items():
        stored[f"{name}.scale"] = np.asarray(scale, np.float32)
        stored[f"{name}.zero"] = np.zeros(np.shape(scale), np.int8)
        axis, shared = ({"axis": 0} if np.ndim(scale) else {}), [f"{name}.scale", f"{name}.zero"]
        pairs[name] = (
            helper.make_node("QuantizeLinear", [name, *shared], [f"{name}.q"], name=f"{name}/Q", **axis),
            helper.make_node("DequantizeLinear", [f"{name}.q", *shared], [f"{name}.dq"], name=f"{name}/DQ", **axis),
        )
    nodes = [
        *pairs["images"], *pairs["conv.weight"], *pairs["fc.weight"],
        helper.make_node("Conv", ["images.dq", "conv.weight.dq", "conv.bias"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], name="relu"), *pairs["r"],
        helper.make_node("GlobalAveragePool", ["r.dq"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["c"], name="flatten"), *pairs["c"],
        helper.make_node("Gemm", ["c.dq", "fc.weight.dq"], ["g"], name="fc", transB=1),
        helper.make_node("Constant", [], ["k"], name="k", value_float=2.0 if constant is None else constant),
        helper.make_node("Mul", ["g", "k"], ["logits"], name="twice"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, {"ptq.method": "max"})
    return model


def logits(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": IMAGES})[0]


def test_the_half_graph_computes_what_the_float_graph_computes():
    model = qdq_model()
    expected, found = logits(model), logits(half_from_float32(model).model)
    # Float16 has 11 bits, and a rounding edge of the 8-bit codes that it crosses moves a logit by less than 1 %.
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    assert found.dtype == np.float32


def test_every_float_constant_is_float16_and_every_code_stays_int8():
    model = half_from_float32(qdq_model()).model
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {kind for name, kind in kinds.items() if name.endswith(".zero")} == {TensorProto.INT8}
    assert {kind for name, kind in kinds.items() if not name.endswith(".zero")} == {TensorProto.FLOAT16}


def test_input_and_output_stay_float32_and_the_inferred_types_agree():
    model = half_from_float32(qdq_model()).model
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    types = {entry.name: entry.type.tensor_type.elem_type for entry in inferred.graph.value_info}
    assert (types["a"], types["r.dq"], types["r.q"]) == (TensorProto.FLOAT16, TensorProto.FLOAT16, TensorProto.INT8)
    ends = (*model.graph.input, *model.graph.output)
    assert [entry.type.tensor_type.elem_type for entry in ends] == [TensorProto.FLOAT, TensorProto.FLOAT]


def test_opset_19_is_reached_and_the_metadata_is_kept():
    model = half_from_float32(qdq_model(opset=13)).model
    assert model.opset_import[0].version == 19
    assert model.ir_version >= 9
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("ptq.method", "max")]


def test_a_newer_opset_is_left_alone():
    assert half_from_float32(qdq_model(opset=21)).model.opset_import[0].version == 21


def test_the_given_graph_is_not_changed_and_the_bytes_are_deterministic():
    model = qdq_model(opset=19)
    before = model.SerializeToString(deterministic=True)
    digests = {
        hashlib.sha256(half_from_float32(model).model.SerializeToString(deterministic=True)).digest() for _ in range(2)
    }
    assert len(digests) == 1
    assert model.SerializeToString(deterministic=True) == before


def test_a_graph_is_half_only_after_the_conversion():
    model = qdq_model()
    assert not is_half(model)
    assert is_half(half_from_float32(model).model)


def test_the_checks_find_no_error_in_the_half_graph(tmp_path):
    path = tmp_path / "half.onnx"
    onnx.save(half_from_float32(qdq_model()).model, str(path))
    assert [found for found in check_graph(path, dialect="tensorrt").findings if found.severity == "error"] == []


def test_a_scale_that_float16_cannot_hold_is_raised_and_named():
    weight = np.random.default_rng(1).normal(size=(8, 3, 3, 3)).astype(np.float32) * 0.1
    weight[2] *= 1e-4
    found = half_from_float32(qdq_model(weight=weight))
    scale = numpy_helper.to_array(next(t for t in found.model.graph.initializer if t.name == "conv.weight.scale"))
    assert scale[2] == np.float16(HALF_SMALLEST_NORMAL) == np.float16(2**-14)
    (warning,) = found.warnings
    assert warning.startswith("1 of 8 scales of conv.weight.scale are below 6.1e-05")


def test_the_scale_of_a_dead_channel_becomes_usable_without_a_warning():
    weight = np.random.default_rng(1).normal(size=(8, 3, 3, 3)).astype(np.float32) * 0.1
    weight[2] = 0
    scale = np.maximum(np.abs(weight).max(axis=(1, 2, 3)) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    found = half_from_float32(qdq_model(weight=weight, weight_scale=scale))
    assert found.warnings == ()
    assert np.isfinite(logits(found.model)).all()


def test_a_constant_beyond_float16_is_an_error_that_names_it():
    weight = np.full((8, 3, 3, 3), 7e4, np.float32)
    with pytest.raises(ExportError, match=r"Constant conv\.weight holds 70000; float16 ends at 65504"):
        half_from_float32(qdq_model(weight=weight))


def test_a_float_graph_without_quantizers_is_converted_too():
    model = qdq_model()
    nodes = [node for node in model.graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    for node in nodes:
        node.input[:] = [name.removesuffix(".dq") for name in node.input]
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    expected, found = logits(model), logits(half_from_float32(model).model)
    assert np.abs(found - expected).max() < 0.005 * np.abs(expected).max()
