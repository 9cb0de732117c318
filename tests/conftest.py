"""Fixtures that several folders of tests share."""

import gc
import os
import tempfile
import uuid
from unittest.mock import patch

# Before torch is imported: where two test processes share the cores, threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import certifi
import hypothesis
import numpy as np
import pytest
import s3_servers
import torch
from PIL import Image

import ptq.engines.openvino  # noqa: F401 - a test that imports OpenVINO itself first would have it send telemetry

# Before Prefect is imported: nothing phones home, and a busy machine may take its time to start the server.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("UVICORN_LOOP", "tasks.runtime.prefect_server:event_loop")
# A machine that others use, or coverage, makes any example slow now and then.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
# Runs of the tests wait for each other, not for those of whoever uses this machine.
_LOCKS = tempfile.TemporaryDirectory(prefix="ptq-test-locks-")
os.environ["PTQ_LOCK_DIR"] = _LOCKS.name
# Every client of Prefect's API reads its certificates anew, which takes longer than a call. Nothing here is encrypted:
# the first of them is enough.
_CERTIFICATE = os.path.join(_LOCKS.name, "one-certificate.pem")
with open(certifi.where(), encoding="utf-8") as _all, open(_CERTIFICATE, "w", encoding="utf-8") as _first:
    _end = "-----END CERTIFICATE-----\n"
    _first.write(_all.read().partition(_end)[0] + _end)
os.environ.setdefault("PREFECT_API_SSL_CERT_FILE", _CERTIFICATE)
# Loops of the server that no test waits for; each of them wakes every few seconds.
for _service in ("LATE_RUNS", "FOREMAN", "PAUSE_EXPIRATIONS", "CLEANUP_RECONCILER"):
    os.environ.setdefault(f"PREFECT_SERVER_SERVICES_{_service}_ENABLED", "false")
# Events are in the database, where tests look for them, after half a second rather than five.
os.environ.setdefault("PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL", "0.5")


# What they run beside Prefect is run by the tests of the rooms as well.
_UNTRACED = {"test_invalidation", "test_layers", "test_onnx_view", "test_run_fuzz", "test_deterministic_graphs"}


def pytest_itemcollected(item):
    """Coverage is that of the other tests: to trace Prefect through whole flows takes a third of their time more."""
    if item.path.parent.name in ("flows", "deployments") or item.path.stem in _UNTRACED:
        item.add_marker("no_cover")
    if hasattr(item, "callspec") and "rclone" in item.callspec.params.values():  # the second kind of server
        item.add_marker("slow")


def pytest_collection_finish(session):
    """What the imports made stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """The weights that a test draws are the same every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def prefect_backend(tmp_path_factory):
    """A Prefect server for the session, with a database and a result folder of its own.

    It is told of every flow run, and of the task runs only where a test asks for `recorded_task_runs`: to take in each
    of their states costs as much as what the tasks of a small run compute.
    """
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOCAL_STORAGE_PATH,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings(
            {
                PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
                PREFECT_LOGGING_TO_API_ENABLED: False,
                PREFECT_LOCAL_STORAGE_PATH: tmp_path_factory.mktemp("results"),
            }
        ),
        patch("prefect.task_engine.emit_task_run_state_change_event", lambda **_: None),
    ):
        yield


@pytest.fixture
def recorded_task_runs(prefect_backend, monkeypatch):
    """The server is told of task runs too, as it is outside the tests."""
    from prefect.utilities.engine import emit_task_run_state_change_event as emit

    monkeypatch.setattr("prefect.task_engine.emit_task_run_state_change_event", emit)


def draw_class(label, index):
    """A 24 x 24 picture of class `label`: noise, with a bright quarter that tells the class."""
    generator = np.random.default_rng(1000 * label + index)
    pixels = generator.integers(0, 120, (24, 24, 3), dtype=np.uint8)
    row, column = divmod(label, 2)
    pixels[12 * row : 12 * row + 12, 12 * column : 12 * column + 12] += 100
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """An image folder with four classes: 24 training, 8 selection and 12 test images each."""
    root = tmp_path_factory.mktemp("images")
    start = 0
    for split, count in (("train", 24), ("val", 8), ("test", 12)):
        for label, name in enumerate(("north-east", "north-west", "south-east", "south-west")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                draw_class(label, start + index).save(folder / f"{index:03d}.png")
        start += count
    return root


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory):
    """An S3-compatible server that honours conditions."""
    with s3_servers.moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory):
    """An S3-compatible server that ignores conditions, and rejects wrong credentials."""
    with s3_servers.rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(params=["moto", "rclone"])
def s3_server(request, monkeypatch, tmp_path):
    """Each S3-compatible server in turn, as the one that this process uses, with an empty cache."""
    server = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PTQ_CACHE_DIR", str(tmp_path / "cache"))
    return server


@pytest.fixture
def s3_uri(s3_server):
    """The URI of a store of its own on that server."""
    return f"s3://{s3_servers.BUCKET}/{uuid.uuid4().hex}"
