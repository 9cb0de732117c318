import numpy as np
import pytest
import torch
from networks import small_resnet

from ptq.config import QuantizationConfig
from ptq.graph.candidate import read_layers
from ptq.networks.fake_quant import weight_amax
from ptq.networks.folding import fold_model
from ptq.numerics.amax import amax_from_weight
from ptq.quantization.prepare_torch import prepare_torch_model, write_template


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    torch.save(small_resnet().state_dict(), directory / "small.pth")
    model = prepare_torch_model(
        name="networks:SmallResNet", checkpoint=directory / "small.pth", class_count=4, has_named_classes=True,
        input_shape=(3, 16, 16), quantization=QuantizationConfig(weight_method="mse"), directory=directory,
    )  # fmt: skip
    return directory, model


@pytest.mark.parametrize("method", ["max", "mse"])
def test_the_weight_scales_of_the_template_are_those_of_the_method(prepared, method):
    directory, model = prepared
    template = directory / f"{method}.onnx"
    write_template(
        template, weights=model.files["weights"], plan=model.plan, name="networks:SmallResNet", num_classes=4,
        input_shape=(3, 16, 16), weight_method=method,
    )  # fmt: skip
    layers = read_layers(template, plan=model.plan)
    # No transposed convolution among them: the first axis is the output channel.
    expected = [amax_from_weight(layer.weight.reshape(len(layer.weight), -1), method=method) for layer in layers]
    assert len(layers) > 3
    for layer, amax in zip(layers, expected, strict=True):
        np.testing.assert_array_equal(layer.scale, amax / np.float32(127))


def test_every_layer_of_a_network_has_an_amax_per_output_channel_by_either_method(prepared):
    _, model = prepared
    folded = fold_model(small_resnet()).module
    largest, closest = (weight_amax(folded, model.plan, method=method) for method in ("max", "mse"))
    assert list(largest) == list(closest) == [spec.name for spec in model.plan.weights]
    assert all(largest[name].shape == closest[name].shape for name in largest)
    assert any(torch.any(closest[name] != largest[name]) for name in largest)
