"""Do quantizers go where the PyTorch way puts them, and does the written graph have them there?"""

from collections import Counter

import networks
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from onnx_networks import GraphMaker, exported, small_graph
from torch import nn

from ptq.checks.run import check_graph
from ptq.config import QuantizationConfig
from ptq.errors import CheckpointError, ExportError, UsageError
from ptq.graph.candidate import read_layers, write_candidate
from ptq.graph.insertion import write_qdq_template
from ptq.graph.pair_sums import limit_pair_sums
from ptq.networks.factory import create_model
from ptq.networks.folding import fold_model
from ptq.quantization.prepare_onnx import prepare_onnx_model
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of


def prepared(path, directory, *, shape=(3, 8, 8), classes=4, named=True, **options):
    return prepare_onnx_model(
        checkpoint=path, class_count=classes, has_named_classes=named, input_shape=shape,
        quantization=QuantizationConfig(**options), directory=directory,
    )  # fmt: skip


def plan_of(make, directory, **options):
    return prepared(make.save(directory / "m.onnx"), directory, **options).plan


def candidate(found, directory, *, dialect="cpu", shape=(3, 8, 8), classes=4):
    """Writes template and candidate with every amax 1, checks them and returns the candidate's path."""
    native, template, path = (directory / f"{name}.onnx" for name in ("native", "template", dialect))
    write_qdq_template(found.files["weights"], native, plan=found.plan)
    limit_pair_sums(native, template, plan=found.plan)
    write_candidate(
        template, path, plan=found.plan, dialect=dialect, activation_amax={s.name: 1.0 for s in found.plan.activations},
        metadata={"checkpoint_sha256": "0", "method": "max", "trial": "0"},
    )  # fmt: skip
    checks = check_graph(
        path, dialect=dialect, allowed_float_layers=(*found.plan.float_layers, *found.plan.float_operators),
        input_shape=shape, num_classes=classes,
    )  # fmt: skip
    assert [f for f in checks.findings if f.severity != "info"] == []
    return path


def signature(plan):
    """What can be compared between two plans of one network: per quantizer the layers that read it and its side."""
    layers = {}
    for read in plan.layer_inputs:
        layers.setdefault(read.quantizer, set()).add(read.layer)
    return Counter(
        (frozenset(layers.get(spec.name, ())), spec.never_negative, len(spec.tensors), len(spec.readers))
        for spec in plan.activations
    )


def torch_plan(model, **options):
    folded = fold_model(model)
    assert folded.traced
    return place_quantizers(view_of(folded.module), **{**networks.PLACEMENT, **options})


def assert_same_placement(model, directory, *, size=24, classes=4, dynamic=False, **options):
    path = exported(model, directory / "m.onnx", size=size, folded=False, dynamic=dynamic)
    found = prepared(path, directory, shape=(3, size, size), classes=classes, **options)
    expected = torch_plan(model, **options)
    assert set(found.plan.quantized_layers) == set(expected.quantized_layers)
    assert set(found.plan.float_layers) == set(expected.float_layers)
    assert found.plan.float_operators == expected.float_operators
    assert signature(found.plan) == signature(expected)
    assert (found.plan.residual_adds, found.plan.quantized_residual_adds) == (
        expected.residual_adds, expected.quantized_residual_adds,
    )  # fmt: skip
    # A linear layer over more than two axes becomes a MatMul, whose weight lies the other way round.
    nodes = onnx.load(found.files["weights"]).graph.node
    turned = {node.input[1]: 1 for node in nodes if node.op_type == "MatMul"}
    assert {spec.name: spec.axis for spec in found.plan.weights} == {
        spec.name: turned.get(spec.name, spec.axis) for spec in expected.weights
    }
    assert {(r.layer, r.channel_axis) for r in found.plan.layer_inputs} == {
        (r.layer, r.channel_axis) for r in expected.layer_inputs
    }
    return found


class ZeroPadded(nn.Module):
    """A residual block whose shortcut is a slice with zero channels around it, as in the CIFAR ResNets."""

    value = 0.0

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.conv2(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), value=self.value))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PaddedWithOnes(ZeroPadded):
    """The same with ones, so that the shortcut has a quantizer of its own."""

    value = 1.0


class Gate(nn.Module):
    """Squeeze and excitation around a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 4, 1)
        self.relu6 = nn.ReLU6()

    def forward(self, x):
        x = self.relu6(self.depthwise(F.hardswish(self.expand(x))))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(self.pool(x)))))
        return torch.flatten(self.pool(self.project(x)), 1)


class Fire(nn.Module):
    """Two branches that are joined, a pool, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(12, 12, 1)
        self.head = nn.ConvTranspose2d(12, 4, 2)

    def forward(self, x):
        x = F.max_pool2d(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1), 2)
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return torch.flatten(F.adaptive_avg_pool2d(self.head(x), 1), 1)


class DoublyJoined(nn.Module):
    """A concat whose operand something else reads: its quantizer stays behind it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.grow = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = torch.sigmoid(self.stem(x))
        return torch.flatten(F.adaptive_avg_pool2d(self.last(torch.cat([x, self.grow(x)], 1)), 1), 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"residuals": False}, {"pools": False}, {"commuting_pools": False},
     {"first_layer": False, "last_layer": False}, {"skip_layers": ("block1.conv2",)}],
    ids=str,
)  # fmt: skip
def test_a_resnet_has_the_quantizers_of_the_pytorch_way_with_every_option(tmp_path, options):
    assert_same_placement(networks.small_resnet(), tmp_path, **options)


@pytest.mark.parametrize(
    "network",
    [ZeroPadded, PaddedWithOnes, Gate, Fire, DoublyJoined, networks.SecondConvNeXt, networks.Mixer,
     networks.PermutedIntoLayer, networks.PermutedLogits, networks.Inception],
)  # fmt: skip
def test_other_shapes_of_networks_have_the_quantizers_of_the_pytorch_way(tmp_path, network):
    found = assert_same_placement(network().eval(), tmp_path)
    for dialect in ("cpu", "tensorrt"):
        candidate(found, tmp_path, dialect=dialect, shape=(3, 24, 24))


def residual_add(model):
    """The addition of two activations of a block as in ConvNeXt V2, and the DQ and Q of its identity."""
    makers = {output: node for node in model.graph.node for output in node.output}
    for add in model.graph.node:
        dequantize = makers.get(add.input[0]) if add.op_type == "Add" else None
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            return add, dequantize, makers[dequantize.input[0]]
    raise LookupError("no residual add")


@pytest.mark.parametrize("fault", ["neither", "both"])
def test_an_add_whose_identity_a_convolution_reads_must_have_one_quantized_operand(tmp_path, fault):
    found = assert_same_placement(networks.SecondConvNeXt().eval(), tmp_path)
    path = candidate(found, tmp_path, shape=(3, 24, 24))
    model = onnx.load(path)
    add, dequantize, quantize = residual_add(model)
    if fault == "neither":
        add.input[0] = quantize.input[0]
    else:
        position = list(model.graph.node).index(add)
        pair = [
            onnx.helper.make_node("QuantizeLinear", [add.input[1], *quantize.input[1:]], ["more_q"]),
            onnx.helper.make_node("DequantizeLinear", ["more_q", *dequantize.input[1:]], ["more_dq"]),
        ]
        for node in reversed(pair):
            model.graph.node.insert(position, node)
        add.input[1] = "more_dq"
    onnx.save(model, path)
    messages = [f.message for f in check_graph(path, dialect="cpu").findings if f.check == "residual-add"]
    assert len(messages) == 1
    assert messages[0].startswith({"neither": "Neither operand", "both": "Both operands"}[fault])


@pytest.mark.parametrize(
    "build",
    [networks.small_convnext, networks.small_vision_transformer,
     pytest.param(networks.small_swin, marks=pytest.mark.slow)],
)  # fmt: skip
def test_networks_with_layer_norms_have_the_quantizers_of_the_pytorch_way(tmp_path, build):
    found = assert_same_placement(build(num_classes=4).eval(), tmp_path, size=32, dynamic=True)
    candidate(found, tmp_path, shape=(3, 32, 32))


@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", *(pytest.param(name, marks=pytest.mark.slow)
                        for name in ("mobilenet_v2", "mobilenet_v3_small", "resnet18", "regnet_y_400mf"))],
)  # fmt: skip
def test_torchvisions_networks_have_the_quantizers_of_the_pytorch_way(tmp_path, name):
    model = create_model(name, num_classes=4, channels=3)
    found = assert_same_placement(model, tmp_path, size=64)
    candidate(found, tmp_path, shape=(3, 64, 64))


def test_an_observed_tensor_has_the_values_of_the_pytorch_way(tmp_path):
    from ptq.dialect import observed_names
    from ptq.engines import open_activation_readers
    from ptq.networks.observed import observed_from_folded

    model = networks.small_resnet()
    found = prepared(exported(model, tmp_path / "m.onnx"), tmp_path, shape=(3, 24, 24))
    plan, image = torch_plan(model), torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = observed_from_folded(fold_model(model).module, plan)(image)[1:]
    (read,) = open_activation_readers(found.files["observed_onnx"], workers=1)
    tensors = dict(zip(observed_names(found.plan), read(image.numpy()), strict=True))
    quantizer = {item.layer: item.quantizer for item in found.plan.layer_inputs}
    values = dict(zip(observed_names(plan), expected, strict=True))
    for item in plan.layer_inputs:
        np.testing.assert_allclose(tensors[quantizer[item.layer]], values[item.quantizer].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_a_candidate_gives_the_logits_of_the_pytorch_way(tmp_path, dialect):
    from tests.ptq.networks.test_export import SHAPE, Prepared, run_onnx

    model = networks.small_resnet()
    (tmp_path / "torch").mkdir()
    reference = Prepared(model, tmp_path / "torch")
    found = prepared(exported(model, tmp_path / "m.onnx", size=16, dynamic=True), tmp_path, shape=SHAPE)
    template = tmp_path / "template.onnx"
    write_qdq_template(found.files["weights"], template, plan=found.plan)
    # One quantizer, the downsample branch's, is read by no layer: it is the one without a layer on either way.
    amax = {}
    names = {item.layer: item.quantizer for item in reference.plan.layer_inputs}
    readers = {item.quantizer: item.layer for item in found.plan.layer_inputs}
    (alone,) = {spec.name for spec in reference.plan.activations} - set(names.values()) - {
        spec.name for spec in reference.plan.activations if "avgpool" in spec.readers
    }  # fmt: skip
    (pooled,) = (spec.name for spec in reference.plan.activations if "avgpool" in spec.readers)
    for spec in found.plan.activations:
        if spec.name in readers:
            amax[spec.name] = reference.amax[names[readers[spec.name]]]
        else:
            amax[spec.name] = reference.amax[pooled if "GlobalAveragePool" in spec.readers[0] else alone]
    path = tmp_path / "candidate.onnx"
    write_candidate(template, path, plan=found.plan, dialect=dialect, activation_amax=amax, metadata={})
    (logits,) = run_onnx(path)
    (expected,) = run_onnx(reference.candidate(dialect, tmp_path / "reference.onnx"))
    # The same integers everywhere, but for sums that land on the other side of a rounding edge.
    cosine = (logits * expected).sum(1) / np.linalg.norm(logits, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.999


def test_the_template_has_the_parameters_that_bias_correction_reads(tmp_path):
    found = prepared(exported(networks.small_resnet(), tmp_path / "m.onnx"), tmp_path, shape=(3, 24, 24))
    write_qdq_template(found.files["weights"], tmp_path / "t.onnx", plan=found.plan)
    layers = {layer.name: layer for layer in read_layers(tmp_path / "t.onnx", plan=found.plan)}
    assert set(layers) == set(found.plan.quantized_layers)
    for layer in layers.values():
        largest = np.abs(layer.weight).reshape(len(layer.weight), -1).max(1)
        assert layer.scale.tolist() == (largest / np.float32(127)).tolist()


@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_gemm_is_quantized_along_its_outputs_whichever_way_its_weight_lay(tmp_path, trans_b):
    found = prepared(small_graph(trans_b=trans_b).save(tmp_path / "m.onnx"), tmp_path)
    path = candidate(found, tmp_path)
    scales = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}["last.weight.scale"]
    assert scales.shape == (4,)


def test_a_matmul_with_a_stored_weight_is_a_layer_with_its_bias(tmp_path):
    make = small_graph()
    del make.nodes[-1]
    make.node("MatMul", "f", make.weight("u", 6, 4), output="m", name="/head/MatMul")
    make.node("Add", "m", make.weight("added", 4), output="y", name="/head/Add")
    found = prepared(make.save(tmp_path / "m.onnx"), tmp_path)
    assert found.plan.quantized_layers == ("first", "head")
    assert {spec.name: spec.axis for spec in found.plan.weights} == {"first.weight": 0, "head.weight": 1}
    candidate(found, tmp_path)
    layers = read_layers(tmp_path / "template.onnx", plan=found.plan)
    assert [(layer.name, layer.weight.shape, layer.scale.shape) for layer in layers] == [
        ("first", (6, 3, 3, 3), (6,)), ("head", (6, 4), (4,)),
    ]  # fmt: skip


def test_a_mean_over_height_and_width_is_an_average_pool(tmp_path):
    make = small_graph()
    make.nodes[2].CopyFrom(onnx.helper.make_node("ReduceMean", ["r"], ["p"], name="mean", axes=[2, 3], keepdims=1))
    (spec,) = [spec for spec in plan_of(make, tmp_path).activations if "mean" in spec.readers]
    assert spec.never_negative


def test_the_pool_of_a_gate_and_its_multiplication_share_a_quantizer(tmp_path):
    plan = prepared(exported(Gate(), tmp_path / "m.onnx", size=8), tmp_path).plan
    readers = [spec.readers for spec in plan.activations if any("Pool" in reader for reader in spec.readers)]
    assert sorted(len(names) for names in readers) == [1, 2]
    assert [any("Mul" in name for name in names) for names in readers if len(names) == 2] == [True]


def test_a_multiplication_that_does_not_follow_the_pool_stays_in_float(tmp_path):
    plan = prepared(exported(networks.PoolBesideGate(), tmp_path / "m.onnx", size=8), tmp_path).plan
    readers = [reader for spec in plan.activations for reader in spec.readers]
    assert sum("Pool" in reader for reader in readers) == 2
    assert not any("Mul" in reader for reader in readers)


@pytest.mark.parametrize(
    ("op", "constants", "expected"),
    [
        ("Relu", (), True), ("Clip", (0.0, 6.0), True), ("Clip", (-1.0, 6.0), False), ("Sigmoid", (), True),
        ("HardSigmoid", (), True), ("HardSwish", (), False), ("LeakyRelu", (), False), ("Softplus", (), True),
        ("Tanh", (), False), ("Abs", (), True), ("Softmax", (), True),
    ],
)  # fmt: skip
def test_never_negative_is_proved_from_the_operators(tmp_path, op, constants, expected):
    make = small_graph()
    bounds = [make.weight(f"bound{i}", values=np.array(v, np.float32)) for i, v in enumerate(constants)]
    make.nodes[1].CopyFrom(onnx.helper.make_node(op, ["a", *bounds], ["r"], name="activation"))
    plan = plan_of(make, tmp_path)
    assert [spec.never_negative for spec in plan.activations if spec.name == "activation"] == [expected]


def test_a_final_softmax_stays_in_float_and_is_told(tmp_path):
    make = small_graph()
    make.nodes[-1].output[0] = "logits"
    make.node("Softmax", "logits", output="y", name="probabilities", axis=1)
    found = prepared(make.save(tmp_path / "m.onnx"), tmp_path)
    assert any("ends in a Softmax" in warning for warning in found.warnings)
    candidate(found, tmp_path)
    assert not any("probabilities" in spec.readers for spec in found.plan.activations)


def test_a_layer_whose_weight_is_computed_stays_in_float_and_is_named(tmp_path):
    make = small_graph()
    make.node("Shape", "x", output="s", name="shape")
    make.node("Cast", "s", output="sf", name="cast", to=onnx.TensorProto.FLOAT)
    make.node("ReduceMax", "sf", output="largest", name="largest", keepdims=0)
    make.node("Mul", make.weight("u", 4, 4), "largest", output="scaled", name="scale")
    make.nodes[4].output[0] = "z"
    make.node("MatMul", "z", "scaled", output="y", name="odd")
    make.nodes = make.nodes[:4] + [make.nodes[4]] + make.nodes[5:]
    plan = plan_of(make, tmp_path)
    assert plan.quantized_layers == ("first", "last")


def test_a_mask_made_from_the_size_of_a_tensor_is_no_branch(tmp_path):
    make = small_graph()
    head = make.nodes[1:]
    del make.nodes[1:]
    make.node("Shape", "a", output="s", name="size")
    make.node("Reshape", "a", "s", output="same", name="reshape")
    make.node("Cast", "s", output="sf", name="cast", to=onnx.TensorProto.FLOAT)
    make.node("ReduceMax", "sf", output="mask", name="mask", keepdims=0)
    make.node("Add", "same", "mask", output="masked", name="sum")
    head[0].input[0] = "masked"
    make.nodes += head
    plan = plan_of(make, tmp_path)
    assert plan.residual_adds == 0
    assert not any("sum" in spec.readers for spec in plan.activations)


def test_unknown_layers_to_skip_are_listed_beside_those_there_are(tmp_path):
    with pytest.raises(UsageError, match=r"skip_layers names layer9; the model has no such layer.*first, last"):
        plan_of(small_graph(), tmp_path, skip_layers=("layer9",))


def test_skipping_every_layer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No layer is left to quantize"):
        plan_of(small_graph(), tmp_path, skip_layers=("first", "last"))


def test_the_template_of_another_graph_is_refused(tmp_path):
    found = prepared(small_graph().save(tmp_path / "m.onnx"), tmp_path)
    (tmp_path / "other").mkdir()
    other = prepared(exported(networks.small_resnet(), tmp_path / "o.onnx"), tmp_path / "other", shape=(3, 24, 24))
    with pytest.raises(ExportError, match="which the graph does not have"):
        write_qdq_template(other.files["weights"], tmp_path / "t.onnx", plan=found.plan)


def test_the_same_file_gives_the_same_bytes(tmp_path):
    path = exported(networks.small_resnet(), tmp_path / "m.onnx")
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found = prepared(path, tmp_path / name, shape=(3, 24, 24))
        write_qdq_template(found.files["weights"], tmp_path / name / "t.onnx", plan=found.plan, weight_method="mse")
        written.append([p.read_bytes() for p in (*found.files.values(), tmp_path / name / "t.onnx")])
    assert written[0] == written[1]


# What is refused once it has run


def test_a_model_of_other_classes_is_refused(tmp_path):
    path = small_graph().save(tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match="has 4 outputs, and the data has 7 classes"):
        prepared(path, tmp_path, classes=7)
    with pytest.raises(CheckpointError, match="has 4 outputs, and the data has labels up to 6"):
        prepared(path, tmp_path, classes=7, named=False)
    assert prepared(path, tmp_path, classes=2, named=False).num_classes == 4


def test_weights_that_do_not_fit_are_refused(tmp_path):
    make = small_graph()
    make.weights[0].CopyFrom(numpy_helper.from_array(np.zeros((6, 5, 3, 3), np.float32), "w"))
    with pytest.raises(CheckpointError, match=r"m\.onnx cannot run"):
        plan_of(make, tmp_path)


def test_nan_in_the_weights_is_refused(tmp_path):
    make = small_graph()
    make.weights[1].CopyFrom(numpy_helper.from_array(np.full(6, np.nan, np.float32), "b"))
    make.nodes[1].op_type = "Sigmoid"
    with pytest.raises(CheckpointError, match="returns NaN or infinity"):
        plan_of(make, tmp_path)


def test_a_map_of_logits_is_no_classifier(tmp_path):
    make = GraphMaker()
    make.node("Conv", "x", make.weight("w", 4, 3, 3, 3), output="y", name="layer")
    path = make.save(tmp_path / "m.onnx", classes=("n", 4, 6, 6))
    with pytest.raises(CheckpointError, match="expected one per class"):
        prepared(path, tmp_path)


def test_images_that_depend_on_each_other_are_refused(tmp_path):
    make = small_graph()
    make.node("ReduceMean", "f", output="m", name="over_batch", axes=[0], keepdims=1)
    make.node("Sub", "f", "m", output="d", name="less")
    gemm = make.nodes.pop(4)
    gemm.input[0] = "d"
    make.nodes.append(gemm)
    path = make.save(tmp_path / "m.onnx", input_shape=(4, 3, 8, 8))
    with pytest.raises(CheckpointError, match="gives other results for single images"):
        prepared(path, tmp_path)


def test_a_batch_size_that_cannot_be_freed_is_refused(tmp_path):
    make = small_graph()
    make.node("Concat", "f", make.weight("token", 1, 6), output="d", name="join", axis=1)
    gemm = make.nodes.pop(4)
    gemm.input[0] = "d"
    make.nodes.append(gemm)
    make.weights = [w for w in make.weights if w.name != "v"]
    make.weight("v", 12, 4)
    path = make.save(tmp_path / "m.onnx", input_shape=(1, 3, 8, 8))
    with pytest.raises(CheckpointError, match="runs batches of 1 images alone.*dynamic_axes"):
        prepared(path, tmp_path)
