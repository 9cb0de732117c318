"""A run whose store is a bucket, run again: nothing is computed, no image is decoded."""

import threading
from pathlib import Path

import networks
import pytest
import torch

from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from ptq.data import images
from ptq.storage.store import open_store

pytestmark = pytest.mark.usefixtures("prefect_backend")


@pytest.fixture
def decoded(monkeypatch):
    """The images that were decoded, counted where their bytes are opened."""
    opened, lock = [], threading.Lock()
    plain = images.Image.open

    def counting(source, *arguments, **options):
        with lock:
            opened.append(source)
        return plain(source, *arguments, **options)

    monkeypatch.setattr(images.Image, "open", counting)
    return opened


def config_of(checkpoint, folder, directory, uri):
    return PtqConfig.model_validate(
        {
            "model": {"name": "networks:SmallResNet", "checkpoint": str(checkpoint), "publish_as": "small"},
            "data": {"path": str(folder), "preprocessing": {"resize": 24, "crop": 24}},
            "calibration": {"trials": 2, "images": 16, "methods": ["max"]},
            "engine": {"name": "openvino", "threads": 1},
            "benchmark": {"batch_sizes": [1], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
            "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
            "output": {"store": uri, "directory": str(directory)},
        }
    )


@pytest.mark.slow
def test_a_second_machine_finds_the_stages_of_a_run_on_a_bucket_and_decodes_no_image(
    s3_uri, image_folder, tmp_path, monkeypatch, decoded
):
    checkpoint = tmp_path / "small.pth"
    torch.save(networks.small_resnet().state_dict(), checkpoint)
    first = quantize_model(config_of(checkpoint, image_folder, tmp_path / "first", s3_uri))
    assert first.accepted
    assert len(decoded) > 0
    decoded.clear()

    # Another machine: its cache is empty, its folder another one.
    monkeypatch.setenv("PTQ_CACHE_DIR", str(tmp_path / "another machine"))
    second = quantize_model(config_of(checkpoint, image_folder, tmp_path / "second", s3_uri))
    store = open_store(s3_uri)
    assert {note["cached"] for note in store.run_stages(second.run_id)} == {True}
    assert decoded == []
    assert len(store.run_stages(second.run_id)) == len(store.run_stages(first.run_id)) >= 15
    models = [(tmp_path / name / "model_int8.onnx").read_bytes() for name in ("first", "second")]
    assert models[0] == models[1]
    assert any(path.is_file() for path in Path(tmp_path / "another machine").rglob("*"))
