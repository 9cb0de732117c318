"""Does an ONNX file of any maker come into one form, with its function unchanged, or is it refused with the reason?"""

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_networks import GraphMaker, exported, small_graph
from torch import nn

from ptq.errors import CheckpointError
from ptq.graph.canonical import canonical_graph, save_graph
from ptq.graph.names import layers_of
from ptq.graph.source import read_source, reads_pixels, source_digest

SHAPE = (3, 8, 8)


def canonical(path, shape=SHAPE):
    return canonical_graph(read_source(path, input_shape=shape), origin=str(path))


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def assert_same_function(path, tmp_path, *, shape=SHAPE, source_batch=2):
    """The canonical graph gives, for a batch of four, what the file gives in batches of its own size."""
    save_graph(canonical(path, shape), tmp_path / "canonical.onnx")
    images = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    expected = np.concatenate([run(path, images[i : i + source_batch]) for i in range(0, 4, source_batch)])
    # Folding BatchNorm and another batch size change the order of float sums.
    np.testing.assert_allclose(
        run(tmp_path / "canonical.onnx", images), expected.reshape(4, -1), rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def operators(graph):
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_resnet_has_no_batchnorm_and_computes_the_same_for_any_batch(tmp_path, folded, dynamic):
    path = exported(networks.small_resnet(), tmp_path / "m.onnx", folded=folded, dynamic=dynamic)
    assert_same_function(path, tmp_path, shape=(3, 24, 24), source_batch=1)
    assert "BatchNormalization" not in operators(canonical(path, (3, 24, 24)))


@pytest.mark.parametrize("folded", [True, False])
def test_layers_are_called_as_their_modules(tmp_path, folded):
    graph = canonical(exported(networks.small_resnet(), tmp_path / "m.onnx", folded=folded), (3, 24, 24))
    assert {layer.node.name for layer in layers_of(graph)} == {
        "conv1", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.downsample.0", "fc",
    }  # fmt: skip
    constants = {tensor.name for node in graph.nodes for tensor in node.inputs[1:]}
    assert {"conv1.weight", "conv1.bias", "block2.downsample.0.weight", "fc.weight", "fc.bias"} <= constants


def test_names_are_unique_and_a_result_is_called_as_its_node(tmp_path):
    graph = canonical(exported(networks.small_resnet(), tmp_path / "m.onnx"), (3, 24, 24))
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert all(node.outputs[0].name in (node.name, graph.outputs[0].name) for node in graph.nodes)


def test_nodes_without_names_get_names_from_operator_and_position(tmp_path):
    make = GraphMaker()
    make.node("Conv", "x", make.weight("onnx::w", 6, 3, 3, 3), output="a")
    make.node("Relu", "a", output="r")
    make.node("GlobalAveragePool", "r", output="p")
    make.node("Flatten", "p", output="f")
    make.node("MatMul", "f", make.weight("v", 6, 4), output="y")
    path = make.save(tmp_path / "m.onnx")
    assert [node.name for node in canonical(path).nodes] == [
        "conv_0", "relu_1", "globalaveragepool_2", "flatten_3", "matmul_1",
    ]  # fmt: skip
    assert_same_function(path, tmp_path)


def test_names_of_other_makers_lose_what_does_not_belong_in_a_name(tmp_path):
    make = small_graph()
    make.nodes[0].name = "net/conv1:0/Conv2D"
    assert next(layers_of(canonical(make.save(tmp_path / "m.onnx")))).node.name == "net.conv1_0.Conv2D"


@pytest.mark.parametrize("position", [0, 1])
def test_a_node_called_as_an_initializer_of_a_quantizer_is_renamed(tmp_path, position):
    make = small_graph()
    make.nodes[position].name = "last.weight"
    assert "last.weight" not in {node.name for node in canonical(make.save(tmp_path / "m.onnx")).nodes}


def test_projections_of_one_module_are_told_apart_by_their_biases(tmp_path):
    make = small_graph()
    del make.nodes[-1]
    for source, result, bias in (("f", "m", "attention.in_proj_bias"), ("m", "y", "attention.out.bias")):
        make.node("MatMul", source, make.weight(f"onnx::{result}", 6, 6), output=f"{result}0",
                  name=f"/attention/MatMul_{result}")  # fmt: skip
        make.node("Add", bias, f"{result}0", output=result, name=f"/attention/Add_{result}")
        make.weight(bias, 6)
    graph = canonical(make.save(tmp_path / "m.onnx", classes=6))
    assert [layer.node.name for layer in layers_of(graph)] == ["first", "attention.in_proj", "attention.out"]


@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_linear_layer_keeps_its_weight_as_outputs_by_inputs(tmp_path, trans_b):
    path = small_graph(trans_b=trans_b).save(tmp_path / "m.onnx")
    (gemm,) = [node for node in canonical(path).nodes if node.op == "Gemm"]
    assert gemm.inputs[1].values.shape == (4, 6)
    assert gemm.attrs == {"transB": 1}
    assert_same_function(path, tmp_path)


def test_alpha_and_beta_of_a_gemm_go_into_weight_and_bias(tmp_path):
    make = small_graph()
    for name, value in (("alpha", 0.5), ("beta", 3.0)):
        make.nodes[-1].attribute.append(helper.make_attribute(name, value))
    path = make.save(tmp_path / "m.onnx")
    assert [node.attrs for node in canonical(path).nodes if node.op == "Gemm"] == [{"transB": 1}]
    assert_same_function(path, tmp_path)


@pytest.mark.parametrize(
    ("op", "shape", "groups"),
    [("Conv", (6, 3, 3, 3), 1), ("ConvTranspose", (3, 6, 3, 3), 1), ("ConvTranspose", (6, 2, 3, 3), 3)],
)
def test_batchnorm_becomes_part_of_the_convolution(tmp_path, op, shape, groups):
    make, generator = GraphMaker(), np.random.default_rng(3)
    source = "x"
    if groups > 1:
        source = make.node("Conv", "x", make.weight("stem", 6, 3, 1, 1), output="stem_out", name="stem")
    make.node(op, source, make.weight("w", *shape), output="a", name="layer", group=groups)
    for name, low in (("gamma", 0.5), ("beta", -1), ("mean", -1), ("variance", 0.2)):
        make.weight(name, values=generator.uniform(low, 2, 6).astype(np.float32))
    make.node("BatchNormalization", "a", "gamma", "beta", "mean", "variance", output="b", name="norm")
    make.node("GlobalAveragePool", "b", output="p")
    make.node("Flatten", "p", output="y")
    path = make.save(tmp_path / "m.onnx", classes=6)
    assert "BatchNormalization" not in operators(canonical(path))
    assert_same_function(path, tmp_path)


def test_batchnorm_stays_where_something_else_reads_the_convolution(tmp_path):
    make = GraphMaker()
    make.node("Conv", "x", make.weight("w", 4, 3, 1, 1), output="a", name="layer")
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    for name, values in (("gamma", 2 * ones), ("beta", zeros), ("mean", zeros), ("variance", ones)):
        make.weight(name, values=values)
    make.node("BatchNormalization", "a", "gamma", "beta", "mean", "variance", output="b", name="norm")
    make.node("Add", "a", "b", output="s", name="sum")
    make.node("GlobalAveragePool", "s", output="p")
    make.node("Flatten", "p", output="y")
    path = make.save(tmp_path / "m.onnx")
    assert "BatchNormalization" in operators(canonical(path))
    assert_same_function(path, tmp_path)


def test_identity_and_dropout_are_gone_before_the_output_too(tmp_path):
    make = small_graph()
    make.nodes[-1].output[0] = "z"
    make.node("Dropout", "z", output="d", name="drop")
    make.node("Identity", "d", output="y", name="same")
    make.nodes[1].input[0] = "i"
    make.nodes.insert(1, helper.make_node("Identity", ["a"], ["i"], name="between"))
    path = make.save(tmp_path / "m.onnx")
    graph = canonical(path)
    assert not {"Identity", "Dropout"} & set(operators(graph))
    assert graph.outputs[0].name == "y"
    assert_same_function(path, tmp_path)


def test_a_batch_size_written_into_a_reshape_is_freed(tmp_path):
    make = small_graph()
    make.weight("shape", values=np.array([1, 6], np.int64))
    make.nodes[3] = helper.make_node("Reshape", ["p", "shape"], ["f"], name="reshape")
    path = make.save(tmp_path / "m.onnx", input_shape=(1, 3, 8, 8))
    assert_same_function(path, tmp_path, source_batch=1)


def test_logits_behind_a_pool_lose_their_two_dimensions(tmp_path):
    make = GraphMaker()
    make.node("Conv", "x", make.weight("w", 4, 3, 3, 3), output="a", name="layer")
    make.node("GlobalAveragePool", "a", output="y", name="pool")
    path = make.save(tmp_path / "m.onnx", classes=("n", 4, 1, 1))
    assert_same_function(path, tmp_path)


def test_a_bias_that_two_layers_share_becomes_one_for_each(tmp_path):
    make = GraphMaker()
    make.node("Conv", "x", make.weight("w", 4, 3, 3, 3), make.weight("b", 4), output="a", name="first")
    make.node("Conv", "a", make.weight("v", 4, 4, 3, 3), "b", output="c", name="second")
    make.node("GlobalAveragePool", "c", output="p")
    make.node("Flatten", "p", output="y")
    path = make.save(tmp_path / "m.onnx")
    first, second = layers_of(canonical(path))
    assert (first.bias.name, second.bias.name) == ("first.bias", "second.bias")
    assert_same_function(path, tmp_path)


def test_a_layer_that_is_called_twice_keeps_one_weight(tmp_path):
    make = GraphMaker()
    make.node("Conv", "x", make.weight("stem", 4, 3, 3, 3), output="a", name="stem")
    make.node("Conv", "a", make.weight("twice.weight", 4, 4, 1, 1), output="b", name="n1")
    make.node("Conv", "b", "twice.weight", output="c", name="n2")
    make.node("GlobalAveragePool", "c", output="p")
    make.node("Flatten", "p", output="y")
    layers = list(layers_of(canonical(make.save(tmp_path / "m.onnx"))))
    assert [layer.node.name for layer in layers] == ["stem", "twice", "twice.again"]
    assert layers[1].weight is layers[2].weight
    assert layers[1].weight.name == "twice.weight"


def test_the_bias_behind_a_matmul_is_called_as_the_layers(tmp_path):
    make = small_graph()
    del make.nodes[-1]
    make.node("MatMul", "f", make.weight("u", 6, 4), output="m", name="/head/fc/MatMul")
    make.node("Add", make.weight("added", 4), "m", output="y", name="/head/fc/Add")
    path = make.save(tmp_path / "m.onnx")
    graph = canonical(path)
    assert [t.name for t in graph.nodes[-1].inputs] == ["head.fc.bias", "head.fc"]
    assert_same_function(path, tmp_path)


@pytest.mark.parametrize("opset", [7, 9, 11])
def test_an_old_opset_is_brought_to_one_with_per_channel_quantization(tmp_path, opset):
    make = small_graph()
    path = make.save(tmp_path / "m.onnx", opset=opset)
    model = read_source(path, input_shape=SHAPE).model
    assert model.opset_import[0].version == 17
    assert_same_function(path, tmp_path)


@pytest.mark.parametrize("opset", [13, 18, 20])
def test_a_newer_opset_stays(tmp_path, opset):
    path = small_graph().save(tmp_path / "m.onnx", opset=opset)
    assert read_source(path, input_shape=SHAPE).model.opset_import[0].version == opset
    assert_same_function(path, tmp_path)


def test_weights_in_a_file_of_their_own_are_read(tmp_path):
    path = small_graph().save(tmp_path / "m.onnx")
    model = onnx.load(path)
    onnx.save(model, tmp_path / "e.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    save_graph(canonical(path), tmp_path / "from_one.onnx")
    save_graph(canonical(tmp_path / "e.onnx"), tmp_path / "from_two.onnx")
    assert (tmp_path / "from_one.onnx").read_bytes() == (tmp_path / "from_two.onnx").read_bytes()


def test_the_digest_notices_a_change_in_the_data_file(tmp_path):
    model = onnx.load(small_graph().save(tmp_path / "m.onnx"))
    path, data = tmp_path / "e.onnx", tmp_path / "weights.bin"
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)
    before = source_digest(path)
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    assert source_digest(path) != before


def test_the_same_file_gives_the_same_bytes(tmp_path):
    path = exported(networks.small_resnet(), tmp_path / "m.onnx", folded=False)
    for name in ("a.onnx", "b.onnx"):
        save_graph(canonical(path, (3, 24, 24)), tmp_path / name, {"key": "text"})
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# What is refused


def refusal(path, message, shape=SHAPE):
    with pytest.raises(CheckpointError, match=message):
        canonical(path, shape)


def test_an_absent_file_is_refused(tmp_path):
    refusal(tmp_path / "none.onnx", r"none\.onnx does not exist")


def test_text_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_text("this is text\n" * 10)
    refusal(tmp_path / "m.onnx", r"\(130 bytes\) is not an ONNX model")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    whole = exported(networks.small_resnet(), tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(whole[: int(share * len(whole))])
    refusal(tmp_path / "m.onnx", "is not an ONNX model|is no valid model", (3, 24, 24))


def test_a_missing_data_file_is_named(tmp_path):
    model = onnx.load(small_graph().save(tmp_path / "m.onnx"))
    onnx.save(model, tmp_path / "e.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    refusal(tmp_path / "e.onnx", r"keeps its weights in weights\.bin, which cannot be read")
    with pytest.raises(CheckpointError, match="weights"):
        source_digest(tmp_path / "e.onnx")


def test_a_quantized_file_is_refused(tmp_path):
    make = small_graph()
    make.weight("scale", values=np.array(0.1, np.float32))
    make.weight("zero", values=np.array(0, np.int8))
    make.nodes[0].input[0] = "dequantized"
    make.node("QuantizeLinear", "x", "scale", "zero", output="codes", name="q")
    make.node("DequantizeLinear", "codes", "scale", "zero", output="dequantized", name="dq")
    make.nodes = make.nodes[-2:] + make.nodes[:-2]
    refusal(make.save(tmp_path / "m.onnx"), "is quantized already: it has 2 nodes such as QuantizeLinear q")


def test_several_inputs_are_refused(tmp_path):
    make = small_graph()
    make.nodes[-1].output[0] = "z"
    make.node("Add", "z", "other", output="y", name="sum")
    more = helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", 4])
    refusal(make.save(tmp_path / "m.onnx", inputs=[more]), r"has 2 inputs and 1 outputs \(x, other, y\)")


def test_half_precision_weights_are_refused(tmp_path):
    make = small_graph()
    make.nodes[0].input[1] = make.weight("half", values=np.zeros((6, 3, 3, 3), np.float16))
    refusal(make.save(tmp_path / "m.onnx"), "holds weights in float16, such as half")


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_a_constant_that_is_cast_as_it_is_read_may_be_of_any_type(tmp_path, kind):
    make = small_graph()
    make.nodes[0].input[0] = "scaled"
    factor = helper.make_node(
        "Cast", [make.weight("factor", values=np.array(0.5, kind))], ["f32"], to=TensorProto.FLOAT
    )
    make.nodes[:0] = [factor, helper.make_node("Mul", ["x", "f32"], ["scaled"])]
    assert_same_function(make.save(tmp_path / "m.onnx"), tmp_path)


def pixels(make=None):
    """The small graph behind a cast of its 8-bit input."""
    make = small_graph(make)
    make.nodes[0].input[0] = "float"
    make.nodes.insert(0, helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT))
    return make


def test_images_of_8_bits_are_taken_as_the_same_numbers_in_float(tmp_path):
    path = pixels().save(tmp_path / "m.onnx", kind=TensorProto.UINT8)
    source = read_source(path, input_shape=SHAPE)
    assert "pixels from 0 to 255" in source.notes[0]
    save_graph(canonical(path), tmp_path / "canonical.onnx")
    images = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), dtype=np.uint8)
    found = run(tmp_path / "canonical.onnx", images.astype(np.float32))
    np.testing.assert_allclose(found, run(path, images), rtol=1e-5)


def test_which_files_read_pixels(tmp_path):
    assert reads_pixels(pixels().save(tmp_path / "m.onnx", kind=TensorProto.UINT8))
    assert not reads_pixels(small_graph().save(tmp_path / "n.onnx"))


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.DOUBLE])
def test_images_of_another_type_are_refused(tmp_path, kind):
    make = pixels()
    if kind == TensorProto.UINT8:  # something else reads them too
        make.node("Shape", "x", output="s")
        make.node("ReduceSum", "s", output="u", keepdims=0)
    refusal(make.save(tmp_path / "m.onnx", kind=kind), "Input x of .* is (uint8|double) with 4 dimensions")


def test_a_graph_without_layers_is_refused(tmp_path):
    make = GraphMaker()
    make.node("GlobalAveragePool", "x", output="p")
    make.node("Flatten", "p", output="y")
    refusal(make.save(tmp_path / "m.onnx", classes=3), "has no convolution and no linear layer")


def test_another_image_size_is_refused_with_what_to_set(tmp_path):
    path = small_graph().save(tmp_path / "m.onnx")
    refusal(path, r"reads images of shape \(3, 8, 8\), and the preprocessing gives \(3, 16, 16\)", (3, 16, 16))


def channels_last(make=None):
    make = small_graph(make)
    make.nodes[0].input[0] = "t"
    make.nodes.insert(0, helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]))
    return make


@pytest.mark.parametrize("size", [8, "h"])
def test_channels_last_become_channels_first_without_a_transposition(tmp_path, size):
    path = channels_last().save(tmp_path / "m.onnx", input_shape=("n", size, size, 3))
    graph = canonical(path)
    assert "Transpose" not in operators(graph)
    assert graph.inputs[0].shape == ["n", *SHAPE]
    assert "channels last" in read_source(path, input_shape=SHAPE).notes[0]
    save_graph(graph, tmp_path / "canonical.onnx")
    images = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    expected = run(path, np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(run(tmp_path / "canonical.onnx", images), expected, rtol=1e-5, atol=1e-6)


def test_transpositions_in_a_row_become_one(tmp_path):
    make = GraphMaker()
    make.node("Transpose", "x", output="a", perm=[0, 2, 3, 1])
    make.node("Transpose", "a", output="b", perm=[0, 2, 3, 1])
    make.node("Conv", "b", make.weight("w", 6, 8, 3, 3), output="c")
    make.node("GlobalAveragePool", "c", output="p")
    make.node("Flatten", "p", output="f")
    make.node("Gemm", "f", make.weight("v", 6, 4), output="y")
    path = make.save(tmp_path / "m.onnx")
    assert operators(canonical(path)).count("Transpose") == 1
    assert_same_function(path, tmp_path)


def test_a_rectangle_is_refused_without_advice_that_cannot_help(tmp_path):
    path = small_graph().save(tmp_path / "m.onnx", input_shape=("n", 3, 16, 8))
    with pytest.raises(CheckpointError, match="Images here are square") as error:
        read_source(path, input_shape=SHAPE)
    assert "resize and crop" not in str(error.value)


def test_an_output_without_a_shape_gets_the_one_that_it_has(tmp_path):
    path = small_graph().save(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    assert canonical(path).outputs[0].shape == ["n", 4]
    assert_same_function(path, tmp_path)


def test_functions_of_the_file_are_written_out(tmp_path):
    body = [helper.make_node("Conv", ["X", "W", "B"], ["c"]), helper.make_node("Relu", ["c"], ["Y"])]
    standard = helper.make_opsetid("", 17)
    make = small_graph()
    make.nodes[:2] = [helper.make_node("Block", ["x", "w", "b"], ["r"], "block", domain="own")]
    path = make.save(tmp_path / "m.onnx", opsets=[helper.make_opsetid("own", 1)])
    model = onnx.load(path)
    model.functions.append(helper.make_function("own", "Block", ["X", "W", "B"], ["Y"], body, [standard]))
    onnx.save(model, path)
    assert_same_function(path, tmp_path)
    assert operators(canonical(path))[:2] == ["Conv", "Relu"]


def test_a_domain_of_which_the_file_has_no_operator_is_forgotten(tmp_path):
    path = small_graph().save(tmp_path / "m.onnx", opsets=[helper.make_opsetid("com.microsoft", 1)])
    assert_same_function(path, tmp_path)


def with_second_output(path, name, kind, shape):
    """Saves a graph whose pooled features, or their class, are an output too."""
    make = small_graph()
    if kind == TensorProto.INT64:
        make.node("ArgMax", "y", output=name, axis=1, keepdims=0)
    else:
        make.node("Identity", "f", output=name)
    model = onnx.load(make.save(path))
    model.graph.output.insert(0, helper.make_tensor_value_info(name, kind, shape))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "shape"), [("label", TensorProto.INT64, ["n"]), ("features", TensorProto.FLOAT, ["n", 6])]
)
def test_of_several_outputs_the_one_with_a_number_per_class_is_taken(tmp_path, name, kind, shape):
    path = with_second_output(tmp_path / "m.onnx", name, kind, shape)
    source = read_source(path, input_shape=SHAPE, class_count=4)
    assert source.output_name == "y"
    assert source.notes == (f"Of the outputs y is taken as the logits, and {name} is left out.",)
    assert [value.name for value in source.model.graph.output] == ["y"]


def test_outputs_that_cannot_be_told_apart_are_refused(tmp_path):
    path = with_second_output(tmp_path / "m.onnx", "features", TensorProto.FLOAT, ["n", 6])
    refusal(path, r"1 inputs and 2 outputs \(x, features, y\)")


def test_an_output_called_logits_is_taken(tmp_path):
    path = with_second_output(tmp_path / "m.onnx", "logits", TensorProto.FLOAT, ["n", 6])
    assert read_source(path, input_shape=SHAPE).output_name == "logits"


def test_of_two_rows_of_classes_the_auxiliary_one_is_left(tmp_path):
    path = with_second_output(tmp_path / "m.onnx", "aux_logits", TensorProto.FLOAT, ["n", 4])
    assert read_source(path, input_shape=SHAPE, class_count=4).output_name == "y"


@pytest.mark.parametrize("attributes", [{"saturate": 1}, {}])
def test_a_cast_to_half_is_none_to_float(tmp_path, attributes):
    make = pixels()
    make.nodes[0] = helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16, **attributes)
    make.nodes.insert(1, helper.make_node("Cast", ["half"], ["float"], to=TensorProto.FLOAT))
    opset = 19 if attributes else 17
    refusal(make.save(tmp_path / "m.onnx", kind=TensorProto.UINT8, opset=opset), "is uint8 with 4 dimensions")


def test_operators_of_one_runtime_are_refused(tmp_path):
    make = small_graph()
    make.nodes[1].op_type, make.nodes[1].domain = "FusedThing", "com.microsoft"
    path = make.save(tmp_path / "m.onnx", opsets=[helper.make_opsetid("com.microsoft", 1)])
    refusal(path, r"operators that ONNX does not define, such as com\.microsoft\.FusedThing")


def test_control_flow_is_refused(tmp_path):
    make = small_graph()
    make.nodes[1].CopyFrom(
        helper.make_node("If", ["flag"], ["r"], name="choice", **{
            branch: helper.make_graph([helper.make_node(op, ["a"], [f"{op}_out"])], branch, [],
                                      [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)])
            for branch, op in (("then_branch", "Relu"), ("else_branch", "Sigmoid"))
        })
    )  # fmt: skip
    make.nodes.insert(0, helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0))
    make.nodes.insert(1, helper.make_node("Cast", ["most"], ["flag"], to=TensorProto.BOOL))
    refusal(make.save(tmp_path / "m.onnx"), "branches or loops while it runs: it has If choice")


class Attention(nn.Module):
    """Two linear layers on tokens, as a transformer has them."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.first = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = tokens + torch.softmax(self.first(tokens), -1)
        return self.head(tokens[:, 0])


@pytest.mark.parametrize("dynamic", [True, False])
def test_linear_layers_on_tokens_are_found_by_their_modules(tmp_path, dynamic):
    path = exported(Attention(), tmp_path / "m.onnx", size=8, dynamic=dynamic)
    graph = canonical(path)
    assert {layer.node.name for layer in layers_of(graph)} == {"patch", "first", "head"}
    assert_same_function(path, tmp_path, source_batch=1)
