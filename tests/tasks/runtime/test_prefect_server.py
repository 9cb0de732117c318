"""Does the server's process collect its garbage where nobody waits for it?"""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from s3_servers import free_port

from deployments.supervisor import Service, Supervisor
from flows import cli_environment

ROOT = Path(__file__).parents[3]
LOOP = "tasks.runtime.prefect_server:event_loop"

# A cycle that tells, as it is collected, on which thread; more than enough is allocated to start a collection.
PROGRAM = """
import gc, threading, time
from tasks.runtime import prefect_server

class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self):
        found.append(threading.current_thread().name)

found = []
{before}
Cycle()
kept = [[] for _ in range(100_000)]
end = time.monotonic() + 30
while not found and time.monotonic() < end:
    time.sleep(0.1)
print(gc.isenabled(), found)
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", "True ['MainThread']"),
        ("prefect_server.collect_elsewhere()", "False ['garbage-collection']"),
        ("prefect_server.event_loop().close()", "False ['garbage-collection']"),
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
    port = free_port()
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
def test_prefect_s_server_for_one_process_is_given_that_variable():
    from prefect.server.api.server import SubprocessASGIServer

    environment = Path(f"/proc/{SubprocessASGIServer().server_process.pid}/environ").read_bytes().split(b"\0")
    assert f"UVICORN_LOOP={LOOP}".encode() in environment


def test_the_command_line_gives_the_variable_where_a_server_would_find_the_module(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli_environment.settings()["UVICORN_LOOP"] == LOOP
    monkeypatch.chdir(tmp_path)
    assert cli_environment.settings()["UVICORN_LOOP"] == LOOP
    (tmp_path / "tasks.py").write_text("raise SystemExit('a module of somebody else')")
    assert "UVICORN_LOOP" not in cli_environment.settings()


@pytest.mark.slow
def test_as_a_program_it_is_prefect_and_collects_elsewhere():
    program = """
import gc, runpy, sys
sys.argv[1:] = ["version"]
try:
    runpy.run_module("tasks.runtime.prefect_server", run_name="__main__")
except SystemExit as end:
    print("ended with", end.code or 0, gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "API version" in done.stdout
    assert done.stdout.splitlines()[-1] == "ended with 0 False"


def test_the_service_runs_its_server_so(tmp_path):
    command = Supervisor(Service(tmp_path, tmp_path, 4200))._command("server")
    assert command[1:5] == ["-m", "tasks.runtime.prefect_server", "server", "start"]
