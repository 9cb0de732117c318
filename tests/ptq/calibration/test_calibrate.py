"""Do the ways to collect statistics agree, and does equalization fit between preparation and calibration?"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from ptq.calibration.calibrate import ObservedOnDevice, ranges_from_files, trials_from_files
from ptq.config import QuantizationConfig
from ptq.engines import open_activation_readers
from ptq.files import npy_from_array
from ptq.quantization.prepare_torch import equalize_model, observed_model, prepare_torch_model
from ptq.quantization.prepared import PreparedModel
from ptq.records.base import ArtifactRef
from ptq.records.calibration import CalibrationDraws
from ptq.records.data import PreparedImages
from tests.ptq.quantization.test_equalize import with_uneven_channels
from tests.support.networks import PLACEMENT, SmallResNet

NAME = "tests.support.networks:SmallResNet"
SHAPE = (3, 16, 16)
SCALING = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


@dataclass
class Case:
    """A prepared model with 12 images."""

    prepared: PreparedModel
    directory: Path

    @property
    def model(self):
        return {"name": NAME, "num_classes": 4, "input_shape": SHAPE}


@pytest.fixture
def case(tmp_path):
    torch.manual_seed(0)
    checkpoint = tmp_path / "small.pth"
    torch.save(with_uneven_channels(SmallResNet()).state_dict(), checkpoint)
    prepared = prepare_torch_model(
        name=NAME, checkpoint=checkpoint, class_count=4, has_named_classes=True, input_shape=SHAPE,
        quantization=QuantizationConfig(**PLACEMENT), directory=tmp_path,
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "pixels.npy").write_bytes(npy_from_array(pixels))
    (tmp_path / "labels.npy").write_bytes(npy_from_array(np.arange(12) % 4))
    (tmp_path / "files.json").write_text(json.dumps([[f"{i}.png", f"{i:064d}"] for i in range(12)]))
    return Case(prepared, tmp_path)


def trials(case, **options):
    nothing = ArtifactRef(name="", sha256="", size_bytes=0)
    prepared = PreparedImages(pixels=nothing, labels=nothing, sha256_of_files=nothing, images=12)
    return trials_from_files(
        observed_onnx=case.prepared.files["observed_onnx"], plan=case.prepared.plan,
        pixels=case.directory / "pixels.npy", labels=case.directory / "labels.npy", files=case.directory / "files.json",
        draws=CalibrationDraws(prepared=prepared, indices=((0, 1, 2, 5), tuple(range(12))), warnings=()),
        class_names=("a", "b", "c", "d"), stopping=None, bins=4096, threads=2, **SCALING, **options,
    ).trials  # fmt: skip


def test_torch_on_a_device_sees_what_the_engine_sees(case):
    observed = observed_model(case.prepared.files["weights"], plan=case.prepared.plan, **case.model)

    on_engine, on_device = trials(case), trials(case, on_device=ObservedOnDevice(observed, "cpu"))

    for left, right in zip(on_engine, on_device, strict=True):
        np.testing.assert_array_equal(left.histograms.totals, right.histograms.totals)
        np.testing.assert_allclose(left.histograms.maxima, right.histograms.maxima, rtol=1e-4)
        for ours, theirs in zip(left.channel_sums.means(), right.channel_sums.means(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def ranges(case, *, images=12, threads=1):
    return ranges_from_files(
        observed_onnx=case.prepared.files["observed_onnx"], plan=case.prepared.plan,
        pixels=case.directory / "pixels.npy", images=images, threads=threads, **SCALING,
    )  # fmt: skip


def test_ranges_do_not_depend_on_the_number_of_workers(case):
    one, three = ranges(case), ranges(case, threads=3)

    assert {name: found.tolist() for name, found in one.items()} == {name: f.tolist() for name, f in three.items()}
    assert one["x"].shape == (3,)
    assert all((ranges(case, images=2)[name] <= found).all() for name, found in one.items())


def test_an_equalized_model_has_the_same_logits_and_closer_ranges(case):
    files, changed = equalize_model(
        weights=case.prepared.files["weights"], plan=case.prepared.plan, ranges=ranges(case),
        directory=case.directory, **case.model,
    )  # fmt: skip

    assert changed > 0
    image = np.random.default_rng(1).standard_normal((1, *SHAPE), dtype=np.float32)
    (before,) = open_activation_readers(case.prepared.files["observed_onnx"], workers=1)
    (after,) = open_activation_readers(files["observed_onnx"], workers=1)
    # The last observed tensor is what the linear layer reads; its weights undo the factors.
    weights = (case.prepared.files["weights"], files["weights"])
    head = [safetensors.torch.load_file(path)["fc.weight"].numpy() for path in weights]
    np.testing.assert_allclose(before(image)[-1] @ head[0].T, after(image)[-1] @ head[1].T, rtol=1e-3, atol=1e-4)


def test_nothing_to_equalize_leaves_the_files_alone(case):
    even = {name: np.ones_like(found) for name, found in ranges(case).items()}

    found = equalize_model(
        weights=case.prepared.files["weights"], plan=case.prepared.plan, ranges=even, directory=case.directory,
        **case.model,
    )  # fmt: skip

    assert found == ({}, 0)
