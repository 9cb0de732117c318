"""Does the service on this machine come up whole, mend itself, and leave nothing behind?"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from deployments import local_service, supervisor
from deployments.processes import ProcessRecord, end_marked, find_marked, is_running, mark_of, record_of
from deployments.supervisor import Service, ServiceState, Supervisor, end_of_log, read_state

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds=60):
    """What the condition returns, as soon as it is true; its last answer after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.3)
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The commands, with a folder of their own."""
    monkeypatch.setattr(local_service, "FOLDER", tmp_path / "service")
    monkeypatch.setattr(local_service, "WATCHED", tmp_path / "checkpoints")
    return tmp_path / "service"


@pytest.fixture
def sleeper(tmp_path):
    """A marked process that sleeps, and that has started another one in a session of its own."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    child += "start_new_session=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", child], env=os.environ | mark_of(tmp_path, "worker"))
    until(lambda: len(find_marked(tmp_path)) == 2)
    yield process
    end_marked(tmp_path, patience_s=5)
    process.wait()


def test_a_process_that_was_given_the_id_of_another_one_is_a_stranger():
    own = record_of(os.getpid())
    assert is_running(own)
    assert not is_running(ProcessRecord(own.pid, own.created - 60))


def test_a_child_whose_parent_died_is_still_found_and_ended(sleeper, tmp_path):
    assert len(find_marked(tmp_path)) == 2
    sleeper.kill()
    sleeper.wait()
    assert len(find_marked(tmp_path, "worker")) == 1
    assert end_marked(tmp_path, "worker", patience_s=5) == 1
    assert find_marked(tmp_path) == []


@pytest.mark.slow
def test_the_processes_of_another_part_or_folder_are_left_alone(sleeper, tmp_path):
    assert end_marked(tmp_path, "server", patience_s=1) == 0
    assert end_marked(tmp_path / "other", patience_s=1) == 0
    assert sleeper.poll() is None


def test_a_taken_port_is_named_with_what_to_do(here):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = CliRunner().invoke(local_service.app, ["start", "--port", str(port)])
    assert done.exit_code == 1
    assert f"Port {port} of 127.0.0.1 cannot be used" in done.output
    assert f"PTQ_PORT={port + 1} make serve" in done.output


def test_stop_where_nothing_runs_says_so(here):
    done = CliRunner().invoke(local_service.app, ["stop"])
    assert (done.exit_code, done.output) == (0, "Nothing is running.\n")


def test_status_where_nothing_runs_fails(here):
    done = CliRunner().invoke(local_service.app, ["status"])
    assert done.exit_code == 1
    assert done.output.split() == ["supervisor", "absent", "server", "absent", "worker", "absent"]


def test_the_callers_own_prefect_settings_do_not_reach_the_service(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFECT_API_KEY", "of-another-server")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:///elsewhere.db")
    environment = Service(tmp_path, tmp_path, 4200).environment("worker")
    assert "PREFECT_API_KEY" not in environment
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in environment
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert environment["DO_NOT_TRACK"] == "1"


def test_a_state_that_was_written_is_read_again(tmp_path):
    state = ServiceState("running", 4200, "", {"server": ProcessRecord(7, 1.5)}, 2)
    state.write(tmp_path)
    assert read_state(tmp_path) == state
    assert read_state(tmp_path / "absent") is None


def test_the_end_of_a_log_is_its_last_lines(tmp_path):
    (tmp_path / "a.log").write_text("one\ntwo\nthree\n")
    assert end_of_log(tmp_path / "a.log", lines=2) == "    two\n    three"


class WithSleepingServer(Supervisor):
    """A supervisor whose server is a process that sleeps."""

    def _command(self, part):
        return [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def sleeping_server(tmp_path, monkeypatch):
    """Its supervisor, the process, and the address at which somebody may answer in its place."""
    monkeypatch.setattr(supervisor, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(supervisor, "_LONGEST_SILENCE_S", 1.0)
    monkeypatch.setattr(supervisor, "LONGEST_START_S", 1.0)
    service = Service(tmp_path, tmp_path, free_port())
    found = WithSleepingServer(service)
    found._start("server")
    first = found._parts["server"]
    yield found, first, service.port
    end_marked(tmp_path, patience_s=5)
    for process in (first, found._parts["server"]):
        process.wait(5)


def test_a_server_that_lives_and_answers_nobody_is_ended_and_started_again(sleeping_server):
    keeper, server, _ = sleeping_server
    begun = keeper._started["server"]
    while server.poll() is None and time.monotonic() - begun < 30:
        keeper._end_silent_server()
    assert server.poll() is not None
    assert time.monotonic() - begun > 1
    keeper._revive()
    assert keeper._parts["server"].poll() is None


def test_a_server_that_answers_is_left_alone(sleeping_server):
    keeper, server, port = sleeping_server
    with HTTPServer(("127.0.0.1", port), Healthy) as answering:
        threading.Thread(target=answering.serve_forever).start()
        begun = time.monotonic()
        while time.monotonic() - begun < 2:
            keeper._end_silent_server()
        answering.shutdown()
    assert server.poll() is None


class Healthy(BaseHTTPRequestHandler):
    """Answers as a Prefect server that is well."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *arguments):
        pass


class Copy:
    """A copy of the project with a service of its own."""

    def __init__(self, root):
        self.root, self.port = root, free_port()
        for name in ("ptq", "tasks", "flows", "deployments"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "prefect.yaml", root)

    def call(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "deployments.local_service", *arguments], cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(self.root), "PTQ_PORT": str(self.port)}, capture_output=True, text=True,
            timeout=330, check=False,
        )  # fmt: skip

    def ask(self, path, content):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}", json.dumps(content).encode(),
            {"content-type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def runs_of(self, flow):
        return self.ask("flow_runs/filter", {"flows": {"name": {"any_": [flow]}}})

    def process_of(self, part):
        return read_state(self.folder).processes[part]

    @property
    def folder(self):
        return self.root / ".ptq" / "service"


@pytest.mark.slow
def test_the_service_comes_up_mends_itself_and_ends_whole(tmp_path):
    copy = Copy(tmp_path)
    try:
        started = copy.call("start")
        assert started.returncode == 0, started.stderr
        assert f"http://127.0.0.1:{copy.port}" in started.stdout
        assert (tmp_path / "checkpoints").is_dir()
        assert len(list((tmp_path / "demo" / "digits").glob("*/*/*.png"))) == 1797
        assert "running already" in copy.call("start").stdout
        assert copy.call("status").returncode == 0

        assert len(copy.ask("deployments/filter", {})) == 4
        assert until(lambda: len(copy.runs_of("requantize-models")) >= 3)
        assert until(lambda: [run for run in copy.runs_of("watch-checkpoints") if run["state_type"] == "RUNNING"])

        worker = copy.process_of("worker")
        os.kill(worker.pid, signal.SIGKILL)
        assert until(lambda: copy.process_of("worker") != worker and is_running(copy.process_of("worker")))
        assert read_state(copy.folder).restarts == 1
    finally:
        stopped = copy.call("stop")
    assert stopped.stdout == "The service has ended.\n"
    assert find_marked(copy.folder) == []
    assert [found.pid for found in psutil.process_iter() if str(tmp_path) in " ".join(cmdline_of(found))] == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", copy.port)) != 0
    assert copy.call("stop").stdout == "Nothing is running.\n"


def cmdline_of(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []
