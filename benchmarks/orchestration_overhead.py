"""How much of a run's time is spent outside its stages?

Runs the demo's four methods and five draws on digits in fresh processes: with the server that a flow starts for itself
and with one that runs already. In each, a first run computes everything and a second, in a process of its own, finds
everything. Reported: the time of the flow run by Prefect's own clock, the time inside the stages by the store's notes,
the difference, and what lies before the flow's first line (imports, and the server where the flow starts it).
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.flow_process import QUIET, result_of
from benchmarks.subject import write_result

RUN = """
import json, sys, time
started = time.time()
from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from ptq.storage.store import open_store
config = PtqConfig.model_validate_json(sys.argv[1])
state = quantize_model(config, return_state=True)
result = state.result()
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    run = client.read_flow_run(state.state_details.flow_run_id)
notes = open_store(config.output.store).run_stages(result.run_id)
print("RESULT " + json.dumps({
    "flow_s": (run.end_time - run.start_time).total_seconds(), "before_s": run.start_time.timestamp() - started,
    "stages_s": sum(note["seconds"] for note in notes if not note["cached"]), "stages": len(notes),
    "cached": sum(note["cached"] for note in notes),
}))
"""


@contextmanager
def running_server(home: Path) -> Any:
    """A Prefect server on loopback with a database of its own; yields the environment that names it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home)}
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "tasks.runtime.prefect_server", "server", "start", *address]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/api"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).read()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)
        yield {**environment, "PREFECT_API_URL": url}
    finally:
        server.terminate()
        server.wait(timeout=60)


def run(config: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Returns the times of one run in a process of its own."""
    found = result_of(RUN, config, environment)
    overhead_s = found["flow_s"] - found["stages_s"]
    return {
        **found,
        "overhead_s": round(overhead_s, 2),
        "overhead_percent": round(100 * overhead_s / found["flow_s"], 2),
    }


def main() -> None:
    """Measures both ways and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, help="folder of a finished `ptq demo`")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="")
    parser.add_argument("--model", default="digits", help=argparse.SUPPRESS)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("embedded", "server"):
            directory = Path(folder) / way
            (directory / "home").mkdir(parents=True)  # Prefect does not make it, and no database without it
            config = {
                "model": {"name": "resnet18", "checkpoint": str(options.demo / "resnet18_digits.pth")},
                "data": {
                    "path": str(options.demo / "digits"),
                    "preprocessing": {"channels": 1, "resize": 32, "crop": 32, "mean": [0.5], "std": [0.5]},
                },
                "calibration": {"trials": 5, "images": 256},
                "output": {"store": str(directory / "store"), "directory": str(directory / "output")},
            }
            embedded = {**os.environ, **QUIET, "PREFECT_HOME": str(directory / "home")}
            if way == "embedded":
                found[way] = [run(config, embedded) for _ in range(2)]
            else:
                with running_server(directory / "home") as environment:
                    found[way] = [run(config, environment) for _ in range(2)]
            for name, times in zip(("first", "second"), found[way], strict=True):
                print(way, name, times)
    write_result(options, "orchestration_overhead", found)


if __name__ == "__main__":
    main()
