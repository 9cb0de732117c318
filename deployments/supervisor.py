"""How do a Prefect server and a worker stay up on this machine?

The supervisor starts both, sets the server up, and restarts whichever dies, and a server that answers nobody. It runs
in the background, tells its state in a file, and ends both when it is told to end. It imports nothing of Prefect: it
talks to the server as curl would.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil

from deployments.processes import ProcessRecord, end_marked, end_processes, mark_of, record_of
from deployments.server_calls import POOL, give_up_lost_runs, has_worker_since, is_healthy

ROOT = Path(__file__).parents[1]
LONGEST_START_S = 300.0
_LONGEST_PAUSE_S = 60.0
_LOG_BYTES = 10_000_000
_PATIENCE_S = 5.0
# Longer than a server on SQLite may wait for its database.
_LONGEST_SILENCE_S = 180.0
_ASK_EVERY_S = 15.0

Phase = Literal["starting", "running", "failed"]


class ServiceError(Exception):
    """The service cannot be started; the message says what was found and what to do."""


@dataclass(frozen=True, slots=True)
class Service:
    """Where a service lives: its folder, the folder of the project, and the port of its server on 127.0.0.1."""

    folder: Path
    root: Path
    port: int

    @property
    def address(self) -> str:
        """Address of the UI."""
        return f"http://127.0.0.1:{self.port}"

    def log(self, part: str) -> Path:
        """The log of the server, the worker, the supervisor or bootstrap."""
        return self.folder / f"{part}.log"

    def environment(self, part: str) -> dict[str, str]:
        """What every process of the service runs with.

        Settings of Prefect in the caller's environment are left out: they are of another server.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        paths = [str(self.root), *filter(None, [inherited.get("PYTHONPATH")])]
        return (
            inherited
            | mark_of(self.folder, part)
            | {
                "PYTHONPATH": os.pathsep.join(paths),
                "PYTHONUNBUFFERED": "1",
                "NO_PROXY": ",".join(filter(None, ["127.0.0.1", inherited.get("NO_PROXY")])),
                "PTQ_HOME": str(self.root),
                "PREFECT_HOME": str(self.folder / "prefect"),
                "PREFECT_API_URL": f"{self.address}/api",
                "PREFECT_WORKER_QUERY_SECONDS": "2",
                # How soon a run that found its deployment's limit reached asks again.
                "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
                "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
                # Nothing phones home: neither the server, nor the client, nor the newer UI.
                "DO_NOT_TRACK": "1",
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_SERVER_UI_V2_ENABLED": "false",
                "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            }
        )


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What the supervisor tells of itself."""

    phase: Phase
    port: int
    message: str = ""
    processes: dict[str, ProcessRecord] = field(default_factory=dict)
    restarts: int = 0

    def write(self, folder: Path) -> None:
        """Write the state, whole, where `read_state` finds it."""
        fresh = folder / "state.json.new"
        fresh.write_text(json.dumps(asdict(self)))
        os.replace(fresh, folder / "state.json")


def read_state(folder: Path) -> ServiceState | None:
    """Returns the last state of a service, None where there has been none."""
    try:
        content = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return None
    content["processes"] = {name: ProcessRecord(**record) for name, record in content["processes"].items()}
    return ServiceState(**content)


def end_of_log(path: Path, lines: int = 20) -> str:
    """Returns the last lines of a log, each indented."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


class Supervisor:
    """Keeps the server and the worker of one service running."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parts: dict[str, subprocess.Popen] = {}
        self._started: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._pause_s: dict[str, float] = {}
        self._asked = self._answered = 0.0
        self._phase: Phase = "starting"
        self._restarts = 0
        self._is_stopping = False

    def run(self) -> None:
        """Start everything and stay until a signal comes; the state file tells how it went."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            self._start("server")
            self._wait_until_healthy()
            self._bootstrap()
            self._start("worker")
            self._wait_for_worker()
            self._phase = "running"
            self._tell()
            while True:
                self._end_silent_server()
                self._revive()
                time.sleep(0.5)
        except _Stopped:
            self._end_all()
        except ServiceError as error:
            self._end_all()
            self._phase = "failed"
            self._tell(str(error))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            raise _Stopped

    def _command(self, part: str) -> list[str]:
        python = [sys.executable, "-m"]
        if part == "server":
            address = ["--host", "127.0.0.1", "--port", str(self._service.port)]
            return [*python, "tasks.runtime.prefect_server", "server", "start", *address]
        return [*python, "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "this-machine"]

    def _start(self, part: str) -> None:
        if part == "worker":
            lost = give_up_lost_runs(self._service.address)
            _note(f"Starting the worker; {lost} runs had lost their process.")
        with _open_log(self._service.log(part)) as log:
            self._parts[part] = subprocess.Popen(
                self._command(part),
                cwd=self._service.root,
                env=self._service.environment(part),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started[part] = time.monotonic()
        self._tell()

    def _end_silent_server(self) -> None:
        """End a server that lives and answers nobody, so that it starts again."""
        now = time.monotonic()
        if self._parts["server"].poll() is not None or now - self._asked < _ASK_EVERY_S:
            return
        self._asked = now
        if is_healthy(self._service.address):
            self._answered = now
            return
        silent_s = now - max(self._answered, self._started["server"])
        if silent_s > (_LONGEST_SILENCE_S if self._has_answered else LONGEST_START_S):
            _note(f"The server lives and has not answered for {silent_s:.0f} s; it is ended.")
            end_marked(self._service.folder, "server", patience_s=_PATIENCE_S)

    @property
    def _has_answered(self) -> bool:
        """Whether the server that runs now has answered since it started."""
        return self._answered > self._started["server"]

    def _revive(self) -> None:
        """Start again what has died, after a pause that doubles each time and begins anew after a quiet minute."""
        for part, process in list(self._parts.items()):
            if process.poll() is None:
                continue
            now = time.monotonic()
            if part not in self._due:
                if now - self._started[part] > _LONGEST_PAUSE_S and (part != "server" or self._has_answered):
                    self._pause_s[part] = 0
                # A run whose worker is dead cannot report any more.
                end_marked(self._service.folder, part, patience_s=_PATIENCE_S)
                pause = self._pause_s.get(part, 0)
                _note(f"The {part} ended with status {process.returncode}; it starts again in {pause:g} s.")
                self._due[part], self._pause_s[part] = now + pause, min(max(2 * pause, 1), _LONGEST_PAUSE_S)
            if now >= self._due[part]:
                del self._due[part]
                self._restarts += 1
                self._start(part)

    def _wait_until_healthy(self) -> None:
        address = self._service.address
        self._wait(lambda: is_healthy(address), "server", f"The Prefect server did not answer on {address}")

    def _wait_for_worker(self) -> None:
        address, begun = self._service.address, time.time()
        self._wait(lambda: has_worker_since(address, begun), "worker", "No worker reported to the Prefect server")

    def _wait(self, is_there: Callable[[], bool], part: str, problem: str) -> None:
        """Wait for a part that was started last; whatever dies meanwhile ends the wait."""
        deadline = time.monotonic() + LONGEST_START_S
        while not is_there():
            for started in self._parts:
                self._fail_if_dead(started)
            if time.monotonic() > deadline:
                path = self._service.log(part)
                raise ServiceError(
                    f"{problem} within {LONGEST_START_S:g} s. Its log, {path}, ends with:\n{end_of_log(path)}"
                )
            time.sleep(0.3)

    def _bootstrap(self) -> None:
        path = self._service.log("bootstrap")
        with _open_log(path) as log:
            done = subprocess.run(
                [sys.executable, "-m", "deployments.bootstrap"],
                cwd=self._service.root,
                env=self._service.environment("bootstrap"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise ServiceError(
                f"The deployments of prefect.yaml could not be made; {path} ends with:\n{end_of_log(path)}"
            )

    def _fail_if_dead(self, part: str) -> None:
        status = self._parts[part].poll()
        if status is not None:
            path = self._service.log(part)
            raise ServiceError(f"The {part} ended with status {status}; {path} ends with:\n{end_of_log(path)}")

    def _end_all(self) -> None:
        """End the runs, while the server still takes their last word, then the worker, then the server."""
        self._is_stopping = True
        folder = self._service.folder
        worker = self._parts.get("worker")
        if worker is not None and worker.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                end_processes(psutil.Process(worker.pid).children(recursive=True), patience_s=_PATIENCE_S)
        for part in ("worker", "bootstrap", "server"):
            end_marked(folder, part, patience_s=_PATIENCE_S)
        self._parts.clear()

    def _tell(self, message: str = "") -> None:
        processes = {"supervisor": record_of(os.getpid())}
        for part, process in self._parts.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                processes[part] = record_of(process.pid)
        state = ServiceState(self._phase, self._service.port, message, processes, self._restarts)
        state.write(self._service.folder)


class _Stopped(Exception):
    """A signal came."""


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[Any]:
    """A log to append to; one that has grown large is set aside."""
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        os.replace(path, path.with_suffix(".log.1"))
    with path.open("a") as log:
        yield log


def _note(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    sys.stdout.flush()
