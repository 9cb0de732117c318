"""The three faults of the tutorial script, each of which made its five accuracies a lottery."""

import numpy as np
import pytest
import torch
from networks import small_resnet
from pytorch_quantization import nn as quant_nn

from ptq.calibration.amax_tables import amax_table
from ptq.calibration.statistics import collect_statistics
from ptq.config import QuantizationConfig
from ptq.data.sampling import draw_calibration_indices
from ptq.dialect import observed_names
from ptq.engines import open_activation_readers
from ptq.quantization.prepare_torch import prepare_torch_model

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
MEAN, STD = [0.5] * 3, [0.25] * 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    torch.save(small_resnet().state_dict(), directory / "small.pth")
    return prepare_torch_model(
        name="networks:SmallResNet", checkpoint=directory / "small.pth", class_count=4, has_named_classes=True,
        input_shape=(3, 16, 16), quantization=QuantizationConfig(), directory=directory,
    )  # fmt: skip


def histograms(prepared, draws, pixels=PIXELS):
    found = collect_statistics(
        open_activation_readers(prepared.files["observed_onnx"], workers=1), pixels, draws=draws,
        names=observed_names(prepared.plan), image_names=[str(i) for i in range(len(pixels))], mean=MEAN, std=STD,
        bins=1024, channel_axes=[None] * len(observed_names(prepared.plan)),
    )  # fmt: skip
    return [trial.histograms for trial in found]


def tables(prepared, method, **options):
    (trial,) = histograms(prepared, [range(32)], **options)
    return amax_table(trial, plan=prepared.plan, dialect="tensorrt", method=method, percentile=99.0)


def test_calibration_runs_on_the_running_statistics_of_batchnorm_and_leaves_them_alone(prepared):
    # In train() mode BatchNorm normalizes with the statistics of the batch at hand and overwrites its running means:
    # an image's activations would then depend on the images beside it.
    model = small_resnet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    image = torch.from_numpy((PIXELS[:1].transpose(0, 3, 1, 2) / np.float32(255) - 0.5) / 0.25).float()
    with torch.inference_mode():
        expected = float(model.relu(model.bn1(model.conv1(image))).max())
    (trial,) = histograms(prepared, [[0]])
    found = trial.maxima[observed_names(prepared.plan).index("maxpool")]
    assert found == pytest.approx(expected, rel=1e-4)
    assert not model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_image_counts_the_same_whatever_images_are_beside_it(prepared):
    (alone,), (together,) = histograms(prepared, [[7]]), histograms(prepared, [[7]], pixels=PIXELS[:8])
    assert alone.counts.tolist() == together.counts.tolist()
    first, second = histograms(prepared, [[7], range(40)])
    assert first.counts.tolist() == alone.counts.tolist()
    assert second.totals.tolist() == [40 * total for total in alone.totals]


def test_the_four_methods_choose_four_different_tables(prepared):
    chosen = [tuple(tables(prepared, method).values()) for method in ("max", "percentile", "mse", "entropy")]
    assert len(set(chosen)) == 4


def test_exactly_the_asked_number_of_images_is_counted(prepared):
    (trial,) = histograms(prepared, [draw_calibration_indices(np.zeros(40, int), images=17, seed=3)])
    assert trial.totals[0] == 17 * 3 * 16 * 16


def test_a_draw_is_seeded(prepared):
    labels = np.arange(40) % 4
    first = draw_calibration_indices(labels, images=17, seed=3)
    assert first.tolist() == draw_calibration_indices(labels, images=17, seed=3).tolist()
    assert first.tolist() != draw_calibration_indices(labels, images=17, seed=4).tolist()
    assert len(set(first.tolist())) == 17


def test_the_reference_library_s_default_calibrator_is_max_for_every_method():
    # Why the tutorial's four methods were one: unless told otherwise, its quantizers have a MaxCalibrator, which
    # ignores the method. Here no calibrator of the library is used at all.
    quantizer = quant_nn.QuantConv2d(3, 4, 1)._input_quantizer
    assert type(quantizer._calibrator).__name__ == "MaxCalibrator"
