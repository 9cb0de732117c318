"""What an event starts: the model's own config, its turn, and who is told."""

import http.server
import json
import threading
import time

import pytest
import torch
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter

from flows.quantize_checkpoint import quantize_checkpoint
from ptq.errors import CheckpointError, UsageError
from ptq.files import file_sha256
from ptq.storage.store import open_store

pytestmark = pytest.mark.usefixtures("prefect_backend")


@pytest.fixture
def models(image_folder, tmp_path):
    """A folder with the config of one model, whose published name nobody else uses."""
    folder = tmp_path / "models"
    folder.mkdir()
    config = {
        "model": {"name": "networks:SmallResNet", "checkpoint": "none.pth", "publish_as": f"small-{tmp_path.name}"},
        "data": {"path": str(image_folder), "preprocessing": {"resize": 24, "crop": 24}},
        "calibration": {"trials": 1, "images": 32, "methods": ["max"]},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
        "gate": {"max_drop_pp": 50, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
        "output": {"store": str(tmp_path / "store"), "directory": str(tmp_path / "output")},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def webhook():
    """A server that keeps what it is told, and the slug of the notification block that tells it."""
    told = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    block = CustomWebhookNotificationBlock(
        name="operations",
        url=f"http://127.0.0.1:{server.server_port}/",
        json_data={"subject": "{{subject}}", "text": "{{body}}"},
    )
    block.save("operations", overwrite=True)
    yield "custom-webhook/operations", told
    server.shutdown()
    server.server_close()
    thread.join()


def saved(state, path):
    torch.save(state, path)
    return str(path)


def worse(state):
    return {**state, "fc.weight": state["fc.weight"].roll(1, 0), "fc.bias": state["fc.bias"].roll(1, 0)}


def events_of(model, name, *, count, seconds=30):
    """The payloads of a model's events of that name, as soon as there are `count`, or what there is in the end."""
    wanted = EventFilter(event=EventNameFilter(name=[name]), resource=EventResourceFilter(id=[f"ptq.model.{model}"]))
    end = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while True:
            found = client.read_events(filter=wanted, limit=50).events
            if len(found) >= count or time.monotonic() > end:
                return [event.payload for event in found]
            time.sleep(0.5)


def test_a_good_checkpoint_is_published_with_an_event_a_worse_one_is_rejected_and_told_and_the_same_again_is_neither(
    trained, models, webhook, tmp_path
):
    slug, told = webhook
    model = f"small-{tmp_path.name}"
    good = saved(trained, tmp_path / "good.pth")
    first = quantize_checkpoint(good, "small", models=str(models), notify=[slug], return_state=True)
    assert (first.name, first.type.value) == ("Published", "COMPLETED")
    again = quantize_checkpoint(
        good, "small", file_sha256(tmp_path / "good.pth"), str(models), [slug], return_state=True
    )
    assert again.name == "Published"
    (published,) = events_of(model, "model.published", count=1)
    assert published["decision"] == "accept"
    assert told == []

    bad = saved(worse(trained), tmp_path / "bad.pth")
    second = quantize_checkpoint(bad, "small", models=str(models), notify=[slug], return_state=True)
    assert (second.name, second.type.value) == ("Rejected", "COMPLETED")
    (rejected,) = events_of(model, "model.rejected", count=1)
    assert rejected["decision"] == "regress"
    assert [message["subject"] for message in told] == [f"{model}: the new INT8 model is worse than the one in service"]
    assert f"The model is worse than version {published['version']} in service, which stays." in told[0]["text"]
    assert open_store(str(tmp_path / "store")).latest(model)["version"] == published["version"]


def test_a_checkpoint_that_was_replaced_since_its_event_is_left_to_the_event_of_the_new_one(trained, models, tmp_path):
    path = saved(trained, tmp_path / "good.pth")
    state = quantize_checkpoint(path, "small", "0" * 64, str(models), return_state=True)
    assert (state.name, state.type.value) == ("Superseded", "COMPLETED")
    assert open_store(str(tmp_path / "store")).latest(f"small-{tmp_path.name}") is None


def test_a_model_without_a_config_fails_and_names_those_that_have_one(models, tmp_path):
    with pytest.raises(UsageError, match=r"no config for the model 'large' in .*; there are configs for small\."):
        quantize_checkpoint(str(tmp_path / "x.pth"), "large", models=str(models))


@pytest.mark.slow
def test_a_corrupt_checkpoint_and_an_unknown_block_fail_with_their_names_and_leave_what_is_published(
    trained, models, tmp_path
):
    path = tmp_path / "good.pth"
    saved(trained, path)
    quantize_checkpoint(str(path), "small", models=str(models))
    store, model = open_store(str(tmp_path / "store")), f"small-{tmp_path.name}"
    before = store.latest(model)
    corrupt = tmp_path / "corrupt.pth"
    corrupt.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="corrupt.pth"):
        quantize_checkpoint(str(corrupt), "small", models=str(models))
    assert store.latest(model) == before
    with pytest.raises(UsageError, match="notify names the block 'slack-webhook/nobody', which Prefect does not have"):
        quantize_checkpoint(
            saved(worse(trained), tmp_path / "bad.pth"), "small", models=str(models), notify=["slack-webhook/nobody"]
        )
    assert store.latest(model) == before
