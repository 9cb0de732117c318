"""Does what a bucket says of new checkpoints become events, and is everybody else turned away?"""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
import uvicorn
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.settings import PREFECT_API_URL
from prefect.types._datetime import now
from s3_servers import BUCKET, free_port

from flows.receiver import receive, receiver_app, receiver_token
from flows.watch_checkpoints import watch_checkpoints
from ptq.errors import UsageError
from ptq.files import file_sha256
from tasks.service import watching
from tasks.service.watching import Inbox

pytestmark = pytest.mark.usefixtures("prefect_backend")

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef-token"


class Receiver:
    """A running receiver, and how to talk to it."""

    def __init__(self, prefix, port):
        self.prefix = prefix
        self.port = port

    def ask(self, method="POST", path="/notifications", body=b"", token=TOKEN, **headers):
        """What it answers: the status and the JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, body=body, headers=headers)
        return answer_of(connection)


def answer_of(connection):
    response = connection.getresponse()
    status, content = response.status, response.read()
    connection.close()
    return status, json.loads(content) if content.startswith(b"{") else content


@pytest.fixture
def receiver(s3_server, s3_uri):
    """A receiver of a prefix of its own, with the store in the bucket, which listens on loopback."""
    inbox = Inbox(f"s3://{BUCKET}/{uuid.uuid4().hex}", s3_uri, settle_s=0.1)
    app = receiver_app(inbox, token=TOKEN)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield Receiver(inbox.prefix, server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join()


def notification(*keys, name="ObjectCreated:Put"):
    records = [{"eventName": name, "s3": {"bucket": {"name": BUCKET}, "object": {"key": key}}} for key in keys]
    return json.dumps({"Records": records}).encode()


def payloads(model, *, count):
    """The payloads of a model's events, as soon as there are `count`, or what there is in the end."""
    wanted = EventFilter(
        event=EventNameFilter(name=["checkpoint.created"]),
        resource=EventResourceFilter(id=[f"ptq.checkpoint.{model}"]),
    )
    end = time.monotonic() + 40
    with get_client(sync_client=True) as client:
        while True:
            wanted.occurred = EventOccurredFilter(until=now("UTC").add(minutes=5))
            found = client.read_events(filter=wanted, limit=50).events
            if len(found) >= count or time.monotonic() > end:
                return [event.payload for event in found]
            time.sleep(0.3)


def test_a_notified_checkpoint_becomes_one_event_whoever_else_watches(receiver, s3_server, s3_uri, tmp_path):
    model, client = f"model-{uuid.uuid4().hex}", s3_server.client()
    folder = receiver.prefix.removeprefix(f"s3://{BUCKET}/")
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    client.upload_file(str(tmp_path / "a.pth"), BUCKET, f"{folder}/{model}/epoch 7.pth")
    client.close()
    keys = [f"{folder}/{model}/epoch+7.pth", f"{folder}/{model}/notes.txt", f"elsewhere/{model}/a.pth"]
    assert receiver.ask(body=notification(*keys)) == (202, {"accepted": 1, "ignored": 2})
    assert receiver.ask(body=notification(*keys)) == (202, {"accepted": 1, "ignored": 2})
    (payload,) = payloads(model, count=1)
    assert payload == {
        "uri": f"{receiver.prefix}/{model}/epoch 7.pth", "model": model, "sha256": file_sha256(tmp_path / "a.pth"),
        "size_bytes": (tmp_path / "a.pth").stat().st_size,
    }  # fmt: skip
    assert watch_checkpoints(receiver.prefix, s3_uri, watch_for_s=0, settle_s=0.2) == 0
    assert len(payloads(model, count=1)) == 1


def test_what_is_created_nowhere_near_is_counted_and_deletions_are_nothing(receiver):
    assert receiver.ask(body=notification("elsewhere/a.pth")) == (202, {"accepted": 0, "ignored": 1})
    assert receiver.ask(body=notification("a.pth", name="ObjectRemoved:Delete")) == (202, {"accepted": 0, "ignored": 0})
    assert receiver.ask(body=b'{"Event": "s3:TestEvent"}') == (202, {"accepted": 0, "ignored": 0})


@pytest.mark.parametrize("token", ["", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é" * 20])
def test_whoever_lacks_the_token_is_turned_away(receiver, token):
    assert receiver.ask(body=notification("a.pth"), token=token) == (401, {"error": "no valid token"})


def test_the_token_under_another_scheme_is_none(receiver):
    status, _ = receiver.ask(body=notification("a.pth"), token="", Authorization=f"Basic {TOKEN}")
    assert status == 401


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"Records": 7}'])
def test_what_is_no_notification_is_refused_with_what_was_expected(receiver, body):
    status, content = receiver.ask(body=body)
    assert status == 400
    assert "Expected what AWS S3 or MinIO send" in content["error"]


def test_a_body_above_a_mebibyte_is_refused_before_it_is_read(receiver):
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=30)
    connection.putrequest("POST", "/notifications")
    connection.putheader("Authorization", f"Bearer {TOKEN}")
    connection.putheader("Content-Length", str(2**20 + 1))
    connection.endheaders()
    assert answer_of(connection) == (413, {"error": "the body is larger than 1048576 bytes"})


def test_a_body_above_a_mebibyte_that_does_not_say_so_is_refused(receiver):
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=30)
    connection.putrequest("POST", "/notifications")
    connection.putheader("Authorization", f"Bearer {TOKEN}")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(17):
        connection.send(b"10000\r\n" + b" " * 2**16 + b"\r\n")
    assert answer_of(connection) == (413, {"error": "the body is larger than 1048576 bytes"})


def test_a_body_of_a_mebibyte_is_read(receiver):
    body = notification("a.pth")
    assert receiver.ask(body=body + b" " * (2**20 - len(body))) == (202, {"accepted": 0, "ignored": 1})


def test_a_full_inbox_asks_to_come_back(receiver, monkeypatch):
    monkeypatch.setattr(watching, "_MOST_WAITING", 0)
    key = f"{receiver.prefix.removeprefix(f's3://{BUCKET}/')}/digits/a.pth"
    status, content = receiver.ask(body=notification(key))
    assert (status, content) == (503, {"error": "0 objects wait"})


def test_health_needs_no_token_and_other_paths_and_methods_are_nothing(receiver):
    status, content = receiver.ask("GET", "/health", token="")
    assert (status, content["status"]) == (200, "ok")
    assert receiver.ask("GET", "/notifications")[0] == 405
    assert receiver.ask("POST", "/")[0] == 404


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, "is not set"), ({"PTQ_RECEIVER_TOKEN": ""}, "is not set"), ({"PTQ_RECEIVER_TOKEN": "x" * 15}, "has 15 ch")],
)
def test_without_a_long_token_there_is_no_receiver(environment, found):
    with pytest.raises(UsageError, match=f"PTQ_RECEIVER_TOKEN {found}.*expected a secret of at least 16"):
        receiver_token(environment)


def test_the_token_is_asked_for_before_anything_else(monkeypatch, tmp_path):
    monkeypatch.delenv("PTQ_RECEIVER_TOKEN", raising=False)
    with pytest.raises(UsageError, match="PTQ_RECEIVER_TOKEN is not set"):
        receive(f"s3://{BUCKET}/in", str(tmp_path / "store"), host="127.0.0.1", port=0)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(moto_server, tmp_path):
    environment = {
        **os.environ, **moto_server.environment(), "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PTQ_RECEIVER_TOKEN": TOKEN, "PTQ_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    port, prefix = free_port(), f"s3://{BUCKET}/{uuid.uuid4().hex}"
    arguments = ["--prefix", prefix, "--store", str(tmp_path / "store"), "--port", str(port)]
    with subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "receive", *arguments], env=environment, cwd=ROOT, stderr=subprocess.PIPE
    ) as process:
        while (line := process.stderr.readline()) and b"Uvicorn running" not in line:
            pass
        answer = Receiver(prefix, port).ask(body=notification("elsewhere/a.pth"))
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        process.wait(timeout=60)
    assert answer == (202, {"accepted": 0, "ignored": 1})


@pytest.mark.slow
def test_the_command_refuses_to_serve_without_a_token(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PTQ_RECEIVER_TOKEN"}
    ended = subprocess.run(
        [sys.executable, "-m", "flows.cli", "receive", "--prefix", "s3://models/in", "--store", str(tmp_path)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, "PTQ_RECEIVER_TOKEN is not set" in ended.stderr) == (2, True)
