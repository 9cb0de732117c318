"""How does a person start and stop the whole thing on this machine?

`start` brings up a Prefect server on 127.0.0.1, a worker and every deployment, in the background; `stop` ends them and
the runs in progress, which go on after the next start; `status` tells what runs. Everything it keeps is in
.ptq/service: logs, process ids, Prefect's database.
"""

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from deployments.processes import end_marked, end_processes, find_marked, is_running
from deployments.supervisor import (
    LONGEST_START_S,
    ROOT,
    Service,
    ServiceState,
    Supervisor,
    end_of_log,
    read_state,
)
from ptq.uris import is_remote

FOLDER = ROOT / ".ptq" / "service"
WATCHED = ROOT / "checkpoints"
_PATIENCE_S = 20.0

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Port = Annotated[
    int, typer.Option(envvar="PTQ_PORT", min=1, max=65535, help="Port of the Prefect server on 127.0.0.1.")
]


@app.command()
def start(port: Port = 4200) -> None:
    """Start the server, the worker and the deployments; returns when all are up."""
    with _alone():
        state = _running_state()
        if state is not None:
            typer.echo(f"It is running already: http://127.0.0.1:{state.port}. `make stop` ends it.")
            return
        # What a supervisor that was killed has left behind.
        end_marked(FOLDER, patience_s=_PATIENCE_S)
        _fail_if_taken(port)
        # Not at the top: scikit-learn would take stop and status more time than they take.
        from ptq.data.demo_digits import DEMO, write_digits_folder

        write_digits_folder(ROOT / "demo" / "digits", image_size=DEMO.image_size, seed=0)
        WATCHED.mkdir(exist_ok=True)
        service = Service(FOLDER, ROOT, port)
        typer.echo("Starting a Prefect server, the deployments of prefect.yaml and a worker ...")
        try:
            problem = _problem_at_start(service, _start_supervisor(service))
        except KeyboardInterrupt:
            problem = "Interrupted; nothing was started."
        if problem:
            end_marked(FOLDER, patience_s=_PATIENCE_S)
            _fail(problem)
    elsewhere = os.environ.get("PTQ_WATCHED", "")
    watched = elsewhere or WATCHED.name
    example = f"demo/{DEMO.model}_digits.pth"
    hand_in = f"mkdir -p {watched}/digits && cp {example} {watched}/digits/"
    if is_remote(watched):
        hand_in = f"aws s3 cp {example} {watched}/digits/"
    typer.echo(
        f"The service is up.\n"
        f"  UI                {service.address}\n"
        f"  watched           {elsewhere or WATCHED}\n"
        f"  logs              {FOLDER}\n"
        "Next: train the example's checkpoint and hand it in; a run starts within a minute.\n"
        f"  make demo\n"
        f"  {hand_in}\n"
        f"A model of your own: a config deployments/models/NAME.yaml, its checkpoints in {watched}/NAME/.\n"
        "`make stop` ends the service."
    )


@app.command()
def stop() -> None:
    """End the service and the runs in progress; they go on after the next start."""
    with _alone():
        state = _running_state()
        if state is not None:
            # It ends the runs while the server still hears of it.
            end_processes(find_marked(FOLDER, "supervisor"), patience_s=_PATIENCE_S)
        ended = end_marked(FOLDER, patience_s=_PATIENCE_S)
        (FOLDER / "state.json").unlink(missing_ok=True)
    typer.echo("The service has ended." if state is not None or ended else "Nothing is running.")


@app.command()
def status() -> None:
    """Tell what runs; the exit code is 1 unless all does."""
    state = read_state(FOLDER)
    parts = dict.fromkeys(("supervisor", "server", "worker"), "absent")
    if state is not None:
        for part, record in state.processes.items():
            parts[part] = f"running, process {record.pid}" if is_running(record) else "ended"
    for part, what in parts.items():
        typer.echo(f"{part:<12}{what}")
    if state is not None:
        typer.echo(f"{'UI':<12}http://127.0.0.1:{state.port}\n{'restarts':<12}{state.restarts}")
    if not all(what.startswith("running") for what in parts.values()):
        raise typer.Exit(1)


@app.command(hidden=True)
def supervise(port: Port = 4200) -> None:
    """Be the supervisor, in the foreground."""
    Supervisor(Service(FOLDER, ROOT, port)).run()


@contextmanager
def _alone() -> Iterator[None]:
    """Keeps a second start or stop waiting until this one is through."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _running_state() -> ServiceState | None:
    """The state of a service whose supervisor runs, else None."""
    state = read_state(FOLDER)
    if state is None or not is_running(state.processes["supervisor"]):
        return None
    return state


def _fail_if_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            _fail(
                f"Port {port} of 127.0.0.1 cannot be used: {error.strerror}. Expected a free port; end what listens "
                f"there, or choose another: PTQ_PORT={port + 1} make serve"
            )


def _start_supervisor(service: Service) -> subprocess.Popen:
    (service.folder / "state.json").unlink(missing_ok=True)
    with service.log("supervisor").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deployments.local_service", "supervise", "--port", str(service.port)],
            cwd=service.root,
            env=service.environment("supervisor"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _problem_at_start(service: Service, supervisor: subprocess.Popen) -> str:
    """Waits until everything is up; returns what is wrong where it does not come up."""
    deadline = time.monotonic() + LONGEST_START_S
    while time.monotonic() < deadline:
        state = read_state(service.folder)
        if state is not None and state.phase == "running":
            return ""
        if state is not None and state.phase == "failed":
            return state.message
        if supervisor.poll() is not None:
            return f"The supervisor ended; its log ends with:\n{end_of_log(service.log('supervisor'))}"
        time.sleep(0.2)
    return f"The service was not up after {LONGEST_START_S:g} s; the logs are in {service.folder}."


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
