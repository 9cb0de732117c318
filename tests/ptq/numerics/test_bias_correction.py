import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import small_resnet
from torch import nn

from ptq.calibration.calibrate import channel_axes, corrected_biases, means_by_name
from ptq.calibration.statistics import TrialStatistics
from ptq.config import QuantizationConfig
from ptq.engines import open_activation_readers
from ptq.graph.candidate import read_layers
from ptq.numerics.bias_correction import RESOLUTION, bias_shift, channel_sums_of, empty_channel_sums, merge_channel_sums
from ptq.numerics.histogram import empty_histograms
from ptq.quantization.prepare_torch import prepare_torch_model, write_template

GENERATOR = np.random.default_rng(0)


def images(seed=0, count=1, shape=(3, 4, 4)):
    return [np.random.default_rng(seed + i).standard_normal((1, *shape)).astype(np.float32) for i in range(count)]


def test_the_mean_is_taken_per_channel_of_the_asked_axis():
    tensor = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    first, last = channel_sums_of([tensor, tensor], axes=[1, -1]).means()
    assert first.tolist() == [2.5, 8.5]
    assert last.tolist() == [4.5, 5.5, 6.5]


def test_a_tensor_that_no_layer_reads_costs_nothing():
    assert channel_sums_of([np.ones((1, 3, 2, 2), np.float32)], axes=[None]).means()[0].size == 0


@given(st.permutations(range(6)), st.integers(1, 5))
def test_means_do_not_depend_on_order_or_split(order, cut):
    parts = [channel_sums_of([image], axes=[1]) for image in images(count=6)]

    def total(indices):
        merged = empty_channel_sums()
        for index in indices:
            merged = merge_channel_sums(merged, parts[index])
        return merged

    whole = total(range(6))
    halves = merge_channel_sums(total(order[:cut]), total(order[cut:]))
    assert halves.sums[0].tolist() == whole.sums[0].tolist()
    assert halves.images == whole.images == 6


def test_means_are_those_of_numpy_to_the_resolution():
    parts = images(count=5)
    merged = empty_channel_sums()
    for image in parts:
        merged = merge_channel_sums(merged, channel_sums_of([image], axes=[1]))
    expected = np.concatenate(parts).mean(axis=(0, 2, 3), dtype=np.float64)
    # float32 inputs are added in float64; what is left is the rounding to multiples of RESOLUTION.
    np.testing.assert_allclose(merged.means()[0], expected, rtol=0, atol=2 * RESOLUTION)


LAYERS = {
    "convolution": nn.Conv2d(4, 6, 3, padding=0),
    "grouped": nn.Conv2d(4, 6, 3, padding=0, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=0, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 1),
    "grouped transposed": nn.ConvTranspose2d(4, 6, 1, groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_shift_restores_the_mean_output_of_a_layer_exactly_on_constant_channels(name):
    # Constant channels and no padding: the mean error is then the error of every output.
    layer = LAYERS[name]
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    weight = layer.weight.detach().numpy()
    mean = GENERATOR.standard_normal(4)
    inputs = torch.from_numpy(np.broadcast_to(mean[None, :, None, None], (1, 4, 5, 5)).copy()).double()
    scale = np.full(weight.shape[axis] if axis == 0 else weight.shape[1], np.abs(weight).max() / 7)
    if axis == 1 and layer.groups > 1:
        scale = scale[:1]
    steps = scale.reshape([-1, 1, 1, 1] if axis == 0 else [1, -1, 1, 1]) if scale.size > 1 else scale[0]
    rounded = torch.from_numpy(np.rint(weight / steps) * steps).double()
    shift = bias_shift(weight, scale if scale.size > 1 else scale.reshape(()), mean, axis=axis, groups=layer.groups)
    exact = layer.double()(inputs)
    original = layer.weight.data.clone()
    layer.weight.data = rounded
    approximate = layer(inputs) + torch.from_numpy(shift)[None, :, None, None]
    layer.weight.data = original
    torch.testing.assert_close(approximate, exact, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    torch.save(small_resnet().state_dict(), directory / "small.pth")
    model = prepare_torch_model(
        name="networks:SmallResNet", checkpoint=directory / "small.pth", class_count=4, has_named_classes=True,
        input_shape=(3, 16, 16), quantization=QuantizationConfig(), directory=directory,
    )  # fmt: skip
    template = directory / "template.onnx"
    write_template(template, weights=model.files["weights"], plan=model.plan, name="networks:SmallResNet",
                   num_classes=4, input_shape=(3, 16, 16))  # fmt: skip
    return model, template


def test_every_quantized_layer_of_a_network_is_found_with_its_bias(prepared):
    model, template = prepared
    assert {layer.name for layer in read_layers(template, plan=model.plan)} == set(model.plan.quantized_layers)
    assert {read.layer for read in model.plan.layer_inputs} == set(model.plan.quantized_layers)


def test_corrected_biases_follow_from_the_means_of_what_each_layer_reads(prepared):
    model, template = prepared
    (reader,) = open_activation_readers(model.files["observed_onnx"], workers=1)
    tensors = reader(images(shape=(3, 16, 16))[0])
    trial = TrialStatistics(
        empty_histograms(len(tensors), bins=256), channel_sums_of(tensors, axes=channel_axes(model.plan))
    )
    means = means_by_name([trial], plan=model.plan)
    corrected = corrected_biases(template, plan=model.plan, means=means, trial=0)
    layers = {layer.name: layer for layer in read_layers(template, plan=model.plan)}
    assert set(corrected) == set(layers)
    fc = layers["fc"]
    error = fc.weight - np.rint(fc.weight / fc.scale[:, None]) * fc.scale[:, None]
    np.testing.assert_allclose(corrected["fc"], fc.bias + error @ means["0.flatten"], rtol=1e-5, atol=1e-7)
