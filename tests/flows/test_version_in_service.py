"""A model that passes the gate is held against the version it would replace."""

import shutil

import pytest
import torch

from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from ptq.records.verdict import Verdict
from ptq.storage.store import open_store

pytestmark = pytest.mark.usefixtures("prefect_backend")


def saved(state, path):
    torch.save(state, path)
    return path


def run(checkpoint, images, directory, *, name="networks:SmallResNet", **gate):
    config = {
        "model": {"name": name, "checkpoint": str(checkpoint), "publish_as": "small"},
        "data": {"path": str(images), "preprocessing": {"resize": 24, "crop": 24}},
        "calibration": {"trials": 1, "images": 32, "methods": ["max"]},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
        # Microseconds say nothing about speed, which tests of `ptq.regression` are about.
        "gate": {"max_drop_pp": 50, "min_speedup_fp32": 0.0, "max_slowdown": 1000, **gate},
        "output": {"store": str(directory / "store"), "directory": str(directory / "output")},
    }
    result = quantize_model(PtqConfig.model_validate(config))
    verdict = Verdict.model_validate_json((directory / "output" / "verdict.json").read_bytes())
    return result, verdict, open_store(str(directory / "store"))


@pytest.fixture(scope="module")
def first(prefect_backend, trained, image_folder, tmp_path_factory):
    """The folder of a first run, which published its model, and its result."""
    directory = tmp_path_factory.mktemp("first")
    result, verdict, _ = run(saved(trained, directory / "good.pth"), image_folder, directory)
    assert (result.decision, verdict.in_service) == ("accept", None)
    assert verdict.best.top1_percent > 90
    return directory, result


@pytest.fixture
def in_service(first, tmp_path):
    """The result of the first run, whose store and checkpoint are in this test's folder too."""
    directory, result = first
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    return result


@pytest.mark.slow
def test_a_worse_checkpoint_stays_out_of_service_though_its_int8_is_as_good_as_its_fp32(
    in_service, trained, image_folder, tmp_path
):
    worse = {**trained, "fc.weight": trained["fc.weight"].roll(1, 0), "fc.bias": trained["fc.bias"].roll(1, 0)}
    second, verdict, store = run(saved(worse, tmp_path / "worse.pth"), image_folder, tmp_path)
    assert not second.accepted
    assert second.decision == verdict.in_service.decision == "regress"
    assert verdict.in_service.change_pp < -80
    version = in_service.version
    assert verdict.in_service.version == version
    assert second.reasons[0].startswith(f"The model is worse than version {version} in service, which stays.")
    assert store.latest("small")["version"] == version
    report = (tmp_path / "output" / "report.html").read_text()
    assert f"Against version {version} in service: regress" in report
    assert "Drift of amax" in report

    third, verdict, _ = run(tmp_path / "good.pth", image_folder, tmp_path)
    assert (third.decision, verdict.in_service) == ("accept", None)


@pytest.mark.slow
def test_an_equally_good_checkpoint_replaces_the_one_in_service_and_its_drift_is_told(
    in_service, trained, image_folder, tmp_path
):
    # The same function with other ranges inside: ReLU commutes with a positive factor. Equalization would undo it.
    scaled = {**trained, "fc.weight": trained["fc.weight"] * 3, "fc.bias": trained["fc.bias"] * 3}
    second, verdict, store = run(saved(scaled, tmp_path / "scaled.pth"), image_folder, tmp_path)
    assert second.decision == verdict.in_service.decision == "accept"
    assert abs(verdict.in_service.change_pp) < 5
    assert verdict.in_service.latency_ratio.keys() == {"1"}
    assert set(verdict.in_service.amax_factor.values()) == {1.0}
    assert store.latest("small")["replaced"] == in_service.version


@pytest.mark.slow
def test_a_network_with_other_classes_cannot_be_compared_and_is_not_published_in_place_of_it(
    in_service, trained, image_folder, tmp_path
):
    fewer = tmp_path / "fewer"
    for split in ("train", "val", "test"):
        for folder in sorted((image_folder / split).iterdir())[:2]:
            (fewer / split).mkdir(parents=True, exist_ok=True)
            (fewer / split / folder.name).symlink_to(folder)
    state = {**trained, "fc.weight": trained["fc.weight"][:2], "fc.bias": trained["fc.bias"][:2]}
    second, verdict, store = run(saved(state, tmp_path / "two.pth"), fewer, tmp_path)
    assert (second.decision, second.accepted) == ("inconclusive", False)
    assert "tells 4 classes apart, the new model reads 3 x 24 x 24 and tells 2" in verdict.in_service.reasons[0]
    assert store.latest("small")["version"] == in_service.version

    third, _, _ = run(tmp_path / "two.pth", fewer, tmp_path, publish_inconclusive=True)
    assert (third.decision, third.accepted) == ("accept", True)
    assert store.latest("small")["version"] == second.version
