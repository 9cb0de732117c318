"""Does the server's process collect its garbage where nobody waits for it?"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from flows.cli import _ENVIRONMENT

ROOT = Path(__file__).parents[2]
LOOP = "tasks.prefect_server:event_loop"

# A cycle that tells, as it is collected, on which thread; more than enough is allocated to start a collection.
PROGRAM = """
import gc, threading, time
from tasks import prefect_server

class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self):
        found.append(threading.current_thread().name)

found = []
{before}
Cycle()
kept = [[] for _ in range(100_000)]
time.sleep(1.5)
print(gc.isenabled(), found)
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", "True ['MainThread']"),
        ("prefect_server.collect_elsewhere()", "False ['garbage-collection']"),
        ("prefect_server.event_loop(use_subprocess=False).close()", "False ['garbage-collection']"),
    ],
)
def test_garbage_is_collected_on_a_thread_of_its_own(before, expected):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)], cwd=ROOT, capture_output=True,
        text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == expected


APPLICATION = """
import gc

def create():
    async def application(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": str(gc.isenabled()).encode()})
    return application
"""


@pytest.mark.parametrize(("environment", "collects"), [({}, "True"), ({"UVICORN_LOOP": LOOP}, "False")])
def test_a_variable_gives_uvicorn_such_a_loop(environment, collects, tmp_path):
    (tmp_path / "application.py").write_text(APPLICATION)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if name != "UVICORN_LOOP"}
    # The command is that of Prefect's server for one process.
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--app-dir", str(tmp_path), "--factory", "application:create", "--host",
         "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "off"],
        cwd=tmp_path, env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:
            answer = client.get(f"http://127.0.0.1:{port}/", timeout=60)
    finally:
        process.terminate()
        process.wait(30)
    assert answer.text == collects


@pytest.mark.usefixtures("prefect_backend")
def test_the_command_line_gives_prefect_s_server_for_one_process_such_a_loop():
    from prefect.server.api.server import SubprocessASGIServer

    assert _ENVIRONMENT["UVICORN_LOOP"] == LOOP
    environment = Path(f"/proc/{SubprocessASGIServer().server_process.pid}/environ").read_bytes().split(b"\0")
    assert f"UVICORN_LOOP={LOOP}".encode() in environment
