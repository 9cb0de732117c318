"""Does the beginning of a graph compute what the whole graph computes up to there?"""

import numpy as np
import onnx
import onnxruntime
import pytest
from checked_graphs import sound_graph
from onnx import TensorProto, helper

from ptq.graph.prefixes import beginning_of, cuts_of, without_quantizers

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)


def run(model, *outputs):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(outputs) or None, {session.get_inputs()[0].name: IMAGES})


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_every_beginning_computes_the_tensor_at_its_end_and_every_layer_is_before_one(dialect):
    model = sound_graph(dialect)
    cuts = cuts_of(model)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    last = model.graph.output[0].name
    whole.graph.output.extend(
        helper.make_tensor_value_info(cut.tensor, TensorProto.FLOAT, None) for cut in cuts if cut.tensor != last
    )
    for cut in cuts:
        (expected,) = run(whole, cut.tensor)
        (vector,) = run(beginning_of(model, cut.tensor))
        (tensor,) = run(beginning_of(model, cut.tensor, as_vector=False))
        np.testing.assert_array_equal(vector, expected.reshape(len(IMAGES), -1))
        np.testing.assert_array_equal(tensor, expected)
    assert cuts[-1].tensor == last
    layers = {node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    assert {name for cut in cuts for name in cut.layers.values()} == layers


def test_without_quantizers_the_weights_and_activations_are_not_rounded():
    model = sound_graph("cpu")
    plain = without_quantizers(model)
    assert not {node.op_type for node in plain.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    (exact,), (rounded,) = run(plain), run(model)
    assert np.abs(exact - rounded).max() > 0
    # Where the scales are so small that nothing is clipped and little rounded, the graph with quantizers comes near it.
    stem = next(node for node in model.graph.node if node.op_type == "Conv")
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (tensor,) = run(beginning_of(plain, stem.output[0], as_vector=False))
    kernel, bias = weights[f"{stem.name}.weight"], weights[f"{stem.name}.bias"]
    border = kernel.shape[-1] // 2
    window = np.pad(IMAGES, ((0, 0), (0, 0), (border, border), (border, border)))[
        ..., : kernel.shape[2], : kernel.shape[3]
    ]
    first = np.einsum("nchw,ochw->no", window, kernel) + bias
    np.testing.assert_allclose(tensor[:, :, 0, 0], first, rtol=1e-4, atol=1e-5)
