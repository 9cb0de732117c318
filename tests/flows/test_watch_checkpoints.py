"""Does a checkpoint that is put under a watched prefix become one event, from a folder and from a bucket?"""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.types._datetime import now
from s3_servers import BUCKET

from flows import cli
from flows.watch_checkpoints import watch_checkpoints
from ptq.errors import ArtifactError
from ptq.files import file_sha256
from tasks.service import announcements

pytestmark = pytest.mark.usefixtures("prefect_backend")

ROOT = Path(__file__).resolve().parents[2]
QUICKLY = {"watch_for_s": 0, "settle_s": 0.2}


@pytest.fixture
def model():
    """The name of a model that no other test has."""
    return f"model-{uuid.uuid4().hex}"


@pytest.fixture
def incoming(tmp_path, model):
    """The watched folder, with the model's folder in it."""
    (tmp_path / "incoming" / model).mkdir(parents=True)
    return tmp_path / "incoming"


def payloads(model):
    """The payloads of a model's events: those that the flow has seen on the server."""
    wanted = EventFilter(
        event=EventNameFilter(name=["checkpoint.created"]),
        resource=EventResourceFilter(id=[f"ptq.checkpoint.{model}"]),
        occurred=EventOccurredFilter(until=now("UTC").add(minutes=5)),
    )
    with get_client(sync_client=True) as client:
        page = client.read_events(filter=wanted, limit=50)
        found = [event.payload for event in page.events]
        while page.next_page is not None:
            page = page.get_next_page_sync(client)
            found += [event.payload for event in page.events]
    return found


def test_a_checkpoint_in_the_folder_is_announced_once_and_another_version_again(incoming, model, tmp_path):
    path, store = incoming / model / "epoch7.pth", str(tmp_path / "store")
    torch.save({"weight": torch.ones(3)}, path)
    assert watch_checkpoints(str(incoming), store, **QUICKLY) == 1
    first = {"uri": str(path), "model": model, "sha256": file_sha256(path), "size_bytes": path.stat().st_size}
    assert payloads(model) == [first]

    path.write_bytes(path.read_bytes())
    assert watch_checkpoints(str(incoming), store, **QUICKLY) == 0

    torch.save({"weight": torch.zeros(3)}, path)
    assert watch_checkpoints(str(incoming), store, **QUICKLY) == 1
    assert [payload["sha256"] for payload in payloads(model)] == [file_sha256(path), first["sha256"]]


def test_a_half_uploaded_file_is_announced_when_it_is_whole(incoming, model, tmp_path):
    path, store = incoming / model / "epoch7.pth", str(tmp_path / "store")
    torch.save({"weight": torch.ones(3)}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    path.write_bytes(content[:-100])
    assert watch_checkpoints(str(incoming), store, **QUICKLY) == 0
    path.write_bytes(content)
    assert watch_checkpoints(str(incoming), store, **QUICKLY) == 1
    assert [payload["size_bytes"] for payload in payloads(model)] == [len(content)]


def test_a_file_that_never_becomes_whole_is_announced_so_that_its_run_says_so(incoming, model, tmp_path):
    path = incoming / model / "epoch7.pth"
    path.write_bytes(b"PK\x03\x04 and no end")
    watch_checkpoints(str(incoming), str(tmp_path / "store"), **QUICKLY, stalled_after_s=0)
    assert [payload["uri"] for payload in payloads(model)] == [str(path)]


def test_a_checkpoint_in_a_bucket_is_announced_once(s3_server, s3_uri, model, tmp_path):
    client, folder = s3_server.client(), uuid.uuid4().hex
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    client.upload_file(str(tmp_path / "a.pth"), BUCKET, f"{folder}/{model}/epoch 7.pth")
    client.close()
    for expected in (1, 0):
        assert watch_checkpoints(f"s3://{BUCKET}/{folder}", s3_uri, **QUICKLY) == expected
    (payload,) = payloads(model)
    assert payload["uri"] == f"s3://{BUCKET}/{folder}/{model}/epoch 7.pth"
    assert payload["sha256"] == file_sha256(tmp_path / "a.pth")


@pytest.mark.slow
def test_two_hundred_checkpoints_at_once_are_announced_once_each(incoming, model, tmp_path):
    for index in range(200):
        (incoming / model / f"{index}.onnx").write_bytes(index.to_bytes(2, "big"))
    assert watch_checkpoints(str(incoming), str(tmp_path / "store"), **QUICKLY) == 200
    assert watch_checkpoints(str(incoming), str(tmp_path / "store"), **QUICKLY) == 0


def test_a_prefix_that_is_away_fails_the_run_and_says_what_is_expected(tmp_path):
    with pytest.raises(ArtifactError, match="watched folder .*nowhere does not exist"):
        watch_checkpoints(str(tmp_path / "nowhere"), str(tmp_path / "store"), **QUICKLY)


# Watches in a process of its own, which is killed after so many claims were confirmed.
KILLED = """
import os, signal, sys
from flows import cli
from flows.watch_checkpoints import watch_checkpoints
from tasks.service import announcements

confirm, left = announcements.confirm, [int(sys.argv[1])]

def killed(*arguments, **options):
    confirm(*arguments, **options)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

announcements.confirm, announcements._UNCONFIRMED_S = killed, 0.0
watch_checkpoints(sys.argv[2], sys.argv[3], watch_for_s=0, settle_s=0.2)
"""


@pytest.mark.slow
def test_a_watch_that_is_killed_again_and_again_announces_everything_once(incoming, model, tmp_path, monkeypatch):
    monkeypatch.setattr(announcements, "_UNCONFIRMED_S", 0.0)
    paths = [incoming / model / f"{index}.onnx" for index in range(60)]
    for path in paths:
        path.write_bytes(path.name.encode())
    arguments = [str(incoming), str(tmp_path / "store")]
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": str(ROOT)}
    left = []
    for confirmed in (3, 30):
        code = subprocess.run([sys.executable, "-c", KILLED, str(confirmed), *arguments], env=environment).returncode
        left.append((code, len(list((tmp_path / "store" / "claims" / "checkpoint.created").glob("*.json")))))
    # A server that is slow to show what it took leaves nothing to confirm, and then nobody is killed.
    assert all(code in (-9, 0) for code, _ in left)
    assert [claims for _, claims in left] == [60, 60]
    assert watch_checkpoints(*arguments, **QUICKLY) == 0
    assert sorted(payload["uri"] for payload in payloads(model)) == sorted(map(str, paths))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `ptq` in this process and returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptq", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_the_command_announces_what_is_there_and_says_how_much(command, incoming, model, tmp_path):
    (incoming / model / "a.onnx").write_bytes(model.encode())
    options = ["--store", tmp_path / "store", "--once", "--settle", 0.2, "--json"]
    assert command("watch", incoming, *options)[:2] == (0, '{\n "announced": 1\n}\n')
    assert command("watch", incoming, *options)[:2] == (0, '{\n "announced": 0\n}\n')
    assert len(payloads(model)) == 1


@pytest.mark.slow
def test_the_command_watches_until_it_is_interrupted(incoming, model, tmp_path):
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    arguments = [str(incoming), "--store", str(tmp_path / "store"), "--interval", "0.5", "--settle", "0.2"]
    with subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "watch", *arguments], env=environment, cwd=ROOT, stderr=subprocess.PIPE
    ) as process:
        (incoming / model / "a.onnx").write_bytes(model.encode())
        lines = []
        while not lines or (lines[-1] and b"New checkpoint" not in lines[-1]):
            lines.append(process.stderr.readline())
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
        process.stderr.read()
    assert f"New checkpoint of {model}: {incoming / model / 'a.onnx'}".encode() in lines[-1]
    assert code == 130


@pytest.mark.slow
def test_the_command_names_a_server_that_is_away_or_missing(command, incoming):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        code, _, err = command("watch", incoming, "--once")
    assert (code, "http://127.0.0.1:9/api/ takes no events" in err) == (1, True)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        code, _, err = command("watch", incoming, "--once")
    assert (code, "PREFECT_API_URL is not set" in err) == (2, True)
