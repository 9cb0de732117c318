"""What the schedule starts: every model with its own config, a note of each night, and its page."""

import io
import time

import pytest
import torch
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter

from flows.requantize_models import requantize_models
from ptq.errors import UsageError
from ptq.records.base import digest
from ptq.service.nightly_results import read_nights
from ptq.storage.store import open_store

pytestmark = pytest.mark.usefixtures("prefect_backend")


@pytest.fixture
def nightly(trained, image_folder, tmp_path):
    """A folder of model configs, and what adds one: its name, its checkpoint's bytes."""
    folder = tmp_path / "models"
    folder.mkdir()

    def add(name, checkpoint=None):
        path = tmp_path / f"{name}.pth"
        path.write_bytes(saved(trained) if checkpoint is None else checkpoint)
        config = {
            "model": {"name": "networks:SmallResNet", "checkpoint": str(path), "publish_as": published(name, tmp_path)},
            "data": {"path": str(image_folder), "preprocessing": {"resize": 24, "crop": 24}},
            "calibration": {"trials": 1, "images": 32, "methods": ["max"]},
            "engine": {"name": "openvino", "threads": 1},
            "benchmark": {"batch_sizes": [1], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
            "gate": {"max_drop_pp": 50, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
            "output": {"store": str(tmp_path / "store"), "directory": str(tmp_path / "output" / name)},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))

    return folder, add


def published(name, folder):
    return f"{name}_{folder.name}"


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def worse(state):
    return {**state, "fc.weight": state["fc.weight"].roll(1, 0), "fc.bias": state["fc.bias"].roll(1, 0)}


def nights_of(name, folder):
    return read_nights(open_store(str(folder / "store")), published(name, folder))


def events_of(model, *, until, seconds=30):
    """The names of a model's events, as soon as there is one named `until`, or what there is in the end."""
    wanted = EventFilter(
        event=EventNameFilter(name=["model.published", "model.rejected"]),
        resource=EventResourceFilter(id=[f"ptq.model.{model}"]),
    )
    end = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while True:
            found = sorted(event.event for event in client.read_events(filter=wanted, limit=50).events)
            if until in found or time.monotonic() > end:
                return found
            time.sleep(0.5)


def artifacts_of(key):
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_an_unchanged_night_is_all_cached_decodes_nothing_and_stands_on_the_page(nightly, tmp_path):
    folder, add = nightly
    add("small")
    for _ in range(2):
        state = requantize_models(str(folder), return_state=True)
        assert (state.type.value, state.message) == ("COMPLETED", "1 models done: small.")
    first, second = nights_of("small", tmp_path)
    assert (first.decision, first.found.is_new, first.cached_stages) == ("accept", True, 0)
    # 32 calibration, 32 selection and 48 test images.
    assert first.images_decoded == 112
    assert (second.decision, second.found.is_new, second.found.version) == ("accept", False, first.found.version)
    assert (second.cached_stages, second.images_decoded) == (second.stages, 0)
    assert second.found.latencies == first.found.latencies
    page = (tmp_path / "output" / "small" / "history.html").read_bytes()
    assert page.count(b'<tr class="night') == 2
    assert open_store(str(tmp_path / "store")).recall("history", digest(published("small", tmp_path))) == page


def test_the_nights_are_an_artifact_of_the_model(nightly, tmp_path):
    folder, add = nightly
    add("small")
    requantize_models(str(folder))
    (artifact,) = artifacts_of(f"ptq-nightly-small-{tmp_path.name}".replace("_", "-"))
    assert artifact.type == "markdown"
    assert "# Nightly quantization of small" in artifact.data
    assert "data:image/png;base64," in artifact.data


def test_a_model_that_fails_is_named_and_noted_and_keeps_no_other_from_being_done(nightly, trained, tmp_path):
    folder, add = nightly
    add("broken", checkpoint=saved(trained)[:-2000])
    add("small")
    state = requantize_models(str(folder), return_state=True)
    assert state.type.value == "FAILED"
    assert state.message.startswith("1 of 2 models failed. broken: CheckpointError: ")
    assert "broken.pth" in state.message
    (failed,) = nights_of("broken", tmp_path)
    assert (failed.decision, failed.found) == ("failed", None)
    assert failed.reason.startswith("CheckpointError: ")
    assert failed.stages > 0
    (night,) = nights_of("small", tmp_path)
    assert night.decision == "accept"
    assert b"failed, nothing was published: CheckpointError" in (
        (tmp_path / "output" / "broken" / "history.html").read_bytes()
    )


def test_a_config_that_cannot_be_used_is_named_and_keeps_no_other_from_being_done(nightly, tmp_path):
    folder, add = nightly
    add("small")
    (folder / "odd.yaml").write_text("model: {nam: resnet18}")
    state = requantize_models(str(folder), return_state=True)
    assert state.type.value == "FAILED"
    assert state.message.startswith("1 of 2 models failed. odd: UsageError: Model config ")
    assert len(nights_of("small", tmp_path)) == 1


def test_only_the_named_models_are_done(nightly, tmp_path):
    folder, add = nightly
    add("large")
    add("small")
    requantize_models(str(folder), names=["small"])
    assert (len(nights_of("small", tmp_path)), nights_of("large", tmp_path)) == (1, [])


def test_a_name_without_a_config_is_refused(nightly):
    folder, add = nightly
    add("small")
    with pytest.raises(UsageError, match=r"names has huge, which have no config in .*; there are configs for small\."):
        requantize_models(str(folder), names=["huge"])


def test_an_unchanged_night_announces_nothing_and_a_worse_model_is_announced_as_rejected(nightly, trained, tmp_path):
    folder, add = nightly
    add("small")
    requantize_models(str(folder))
    requantize_models(str(folder))
    add("small", checkpoint=saved(worse(trained)))
    state = requantize_models(str(folder), return_state=True)
    assert state.type.value == "COMPLETED"
    # Events come in the order in which they were emitted: one for the first night, none for the second.
    found = events_of(published("small", tmp_path), until="model.rejected")
    assert found == ["model.published", "model.rejected"]
    assert [night.decision for night in nights_of("small", tmp_path)] == ["accept", "accept", "regress"]


def test_a_rejected_model_whose_block_is_unknown_is_noted_as_rejected_and_the_run_fails(nightly, trained, tmp_path):
    folder, add = nightly
    add("small")
    requantize_models(str(folder))
    add("small", checkpoint=saved(worse(trained)))
    state = requantize_models(str(folder), notify=["slack-webhook/nobody"], return_state=True)
    assert state.message.startswith(
        "1 of 1 models failed. small: UsageError: notify names the block 'slack-webhook/nobody'"
    )
    assert [night.decision for night in nights_of("small", tmp_path)] == ["accept", "regress"]
