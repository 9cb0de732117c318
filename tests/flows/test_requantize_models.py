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


class Models:
    """A folder of model configs, whose store and output lie beside it."""

    def __init__(self, directory, images):
        self.directory, self.images, self.folder = directory, images, directory / "models"
        self.folder.mkdir()

    def add(self, name, checkpoint):
        path = self.directory / f"{name}.pth"
        path.write_bytes(checkpoint)
        config = {
            "model": {"name": "networks:SmallResNet", "checkpoint": str(path), "publish_as": self.published(name)},
            "data": {"path": str(self.images), "preprocessing": {"resize": 24, "crop": 24}},
            "calibration": {"trials": 1, "images": 32, "methods": ["max"]},
            "engine": {"name": "openvino", "threads": 1},
            "benchmark": {"batch_sizes": [1], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
            "gate": {"max_drop_pp": 50, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
            "output": {"store": str(self.directory / "store"), "directory": str(self.directory / "output" / name)},
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))

    def requantize(self, **options):
        return requantize_models(str(self.folder), return_state=True, **options)

    def published(self, name):
        return f"{name}_{self.directory.name}"

    @property
    def store(self):
        return open_store(str(self.directory / "store"))

    def nights_of(self, name):
        return read_nights(self.store, self.published(name))

    def page_of(self, name):
        return (self.directory / "output" / name / "history.html").read_bytes()


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def worse(state, shift):
    return {**state, "fc.weight": state["fc.weight"].roll(shift, 0), "fc.bias": state["fc.bias"].roll(shift, 0)}


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


@pytest.fixture(scope="module")
def four_nights(prefect_backend, trained, image_folder, tmp_path_factory):
    """Two nights with the same checkpoint and two with worse ones, the last with a block that nobody saved.

    Returns the models, the state that each night ended in, and the page and the artifacts after the second.
    """
    models = Models(tmp_path_factory.mktemp("four-nights"), image_folder)
    models.add("small", saved(trained))
    models.add("large", b"never read: it is not among the names")
    states = [models.requantize(names=["small"]) for _ in range(2)]
    page = models.page_of("small")
    artifacts = artifacts_of(f"ptq-nightly-{models.published('small')}".replace("_", "-"))
    for shift, notify in ((1, []), (2, ["slack-webhook/nobody"])):
        models.add("small", saved(worse(trained, shift)))
        states.append(models.requantize(names=["small"], notify=notify))
    return models, states, page, artifacts


def test_an_unchanged_night_is_all_cached_decodes_nothing_and_stands_on_the_page(four_nights):
    models, states, page, _ = four_nights
    assert [(state.type.value, state.message) for state in states[:2]] == [("COMPLETED", "1 models done: small.")] * 2
    first, second = models.nights_of("small")[:2]
    assert (first.decision, first.found.is_new, first.cached_stages) == ("accept", True, 0)
    # 32 calibration, 32 selection and 48 test images.
    assert first.images_decoded == 112
    assert (second.decision, second.found.is_new, second.found.version) == ("accept", False, first.found.version)
    assert (second.cached_stages, second.images_decoded) == (second.stages, 0)
    assert second.found.latencies == first.found.latencies
    assert page.count(b'<tr class="night') == 2
    assert models.store.recall("history", digest(models.published("small"))) == models.page_of("small")


def test_the_nights_are_an_artifact_of_the_model(four_nights):
    _, _, _, artifacts = four_nights
    assert [artifact.type for artifact in artifacts] == ["markdown", "markdown"]
    for artifact in artifacts:
        assert "# Nightly quantization of small" in artifact.data
        assert "data:image/png;base64," in artifact.data


def test_only_the_named_models_are_done(four_nights):
    models = four_nights[0]
    assert (len(models.nights_of("small")), models.nights_of("large")) == (4, [])


def test_an_unchanged_night_announces_nothing_and_a_worse_model_is_announced_as_rejected(four_nights):
    models, states, _, _ = four_nights
    assert states[2].type.value == "COMPLETED"
    # Events come in the order in which they were emitted: one for the first night, none for the second.
    found = events_of(models.published("small"), until="model.rejected")
    assert found == ["model.published", "model.rejected", "model.rejected"]
    assert [night.decision for night in models.nights_of("small")] == ["accept", "accept", "regress", "regress"]


def test_a_rejected_model_whose_block_is_unknown_is_noted_as_rejected_and_the_run_fails(four_nights):
    models, states, _, _ = four_nights
    assert states[3].message.startswith(
        "1 of 1 models failed. small: UsageError: notify names the block 'slack-webhook/nobody'"
    )
    assert models.nights_of("small")[3].decision == "regress"


@pytest.mark.slow
def test_models_that_fail_are_named_and_noted_and_keep_no_other_from_being_done(trained, image_folder, tmp_path):
    models = Models(tmp_path, image_folder)
    models.add("broken", saved(trained)[:-2000])
    (models.folder / "odd.yaml").write_text("model: {nam: resnet18}")
    models.add("small", saved(trained))
    state = models.requantize()
    assert state.type.value == "FAILED"
    assert state.message.startswith("2 of 3 models failed. broken: CheckpointError: ")
    assert "broken.pth" in state.message
    assert " odd: UsageError: Model config " in state.message
    (failed,) = models.nights_of("broken")
    assert (failed.decision, failed.found) == ("failed", None)
    assert failed.reason.startswith("CheckpointError: ")
    assert failed.stages > 0
    (night,) = models.nights_of("small")
    assert night.decision == "accept"
    assert b"failed, nothing was published: CheckpointError" in models.page_of("broken")


def test_a_name_without_a_config_is_refused(trained, image_folder, tmp_path):
    models = Models(tmp_path, image_folder)
    models.add("small", saved(trained))
    with pytest.raises(UsageError, match=r"names has huge, which have no config in .*; there are configs for small\."):
        requantize_models(str(models.folder), names=["huge"])
