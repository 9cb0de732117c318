"""What happens when many checkpoints of a model arrive at once?

Needs a running service (`make serve`) that watches `--watched`. Drops checkpoints that differ in one number, all at
once, and waits until every run has ended. Reported: events and runs per checkpoint, how many runs were ever at work
at the same time by the server's own record, how they ended, the time it took, and the memory of the watching processes.
The model's config is small, so that the runs do little beside what the service does around them.
"""

import argparse
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client

from benchmarks.subject import write_result

SMALL = {
    "quantization": {"equalization": False},
    "calibration": {"methods": ["max"], "trials": 1, "images": 16},
    "benchmark": {"batch_sizes": [1], "warmup_ms": 5.0, "duration_s": 0.05, "min_iterations": 10, "rounds": 1},
    "gate": {"max_drop_pp": 100.0, "min_speedup_fp32": 0.0, "max_regression_pp": 100.0, "max_slowdown": 1000.0},
}
DEPLOYMENT = {"deployments": {"name": {"any_": ["on-new-checkpoint"]}}}
UNFINISHED = ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]


def write_config(base: Path, model: str) -> Path:
    """Writes the small config of a model beside the one it is made from, and returns its path."""
    config = yaml.safe_load(base.read_text())
    for section, values in SMALL.items():
        config[section] = {**config.get(section, {}), **values}
    config["model"]["publish_as"] = model
    config["output"]["directory"] = f"ptq-output/{model}"
    path = base.with_name(f"{model}.yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def write_checkpoints(checkpoint: Path, directory: Path, count: int) -> dict[str, str]:
    """Writes checkpoints that differ in one number; returns their file names by SHA-256."""
    state = torch.load(checkpoint, weights_only=True)
    state = state.get("model_state_dict", state)
    name = next(key for key, value in state.items() if value.is_floating_point() and value.ndim == 1)
    found = {}
    for number in range(count):
        changed = {**state, name: state[name].clone()}
        changed[name][0] += 1e-4 * (number + 1)
        path = directory / f"{number:04d}.pth"
        torch.save(changed, path)
        found[hashlib.sha256(path.read_bytes()).hexdigest()] = path.name
    return found


def runs_of(client: SyncPrefectClient, model: str, since: str) -> list[dict[str, Any]]:
    """Returns the runs that events of the model have started since a moment."""
    found: list[dict[str, Any]] = []
    while True:
        wanted = {**DEPLOYMENT, "sort": "ID_DESC", "limit": 200, "offset": len(found)}
        page = client.request("POST", "/flow_runs/filter", json=wanted).json()
        found += page
        if len(page) < 200:
            return [run for run in found if run["parameters"].get("model") == model and run["created"] >= since]


def count(client: SyncPrefectClient, states: list[str]) -> int:
    """Returns how many runs of the deployment are in one of the states."""
    wanted = {**DEPLOYMENT, "flow_runs": {"state": {"type": {"any_": states}}}}
    return int(client.request("POST", "/flow_runs/count", json=wanted).json())


def watchers_mib(client: SyncPrefectClient) -> list[float]:
    """Returns the resident memory of every process that runs watch-checkpoints, in MiB."""
    wanted = {"deployments": {"name": {"any_": ["watch-checkpoints"]}},
              "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}  # fmt: skip
    ids = {run["id"] for run in client.request("POST", "/flow_runs/filter", json=wanted).json()}
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") in ids:
                found.append(process.memory_info().rss / 2**20)
        except (psutil.Error, OSError):
            continue
    return found


def most_at_once(runs: list[dict[str, Any]]) -> int:
    """Returns the largest number of runs between their start and their end at any moment.

    >>> most_at_once([{"start_time": "1", "end_time": "3"}, {"start_time": "2", "end_time": "4"}])
    2
    >>> most_at_once([{"start_time": "1", "end_time": "2"}, {"start_time": "2", "end_time": "4"}])
    1
    """
    moments = [(run["end_time"], -1) for run in runs] + [(run["start_time"], 1) for run in runs]
    running = highest = 0
    for _, change in sorted(moments):
        running += change
        highest = max(highest, running)
    return highest


def summary(runs: list[dict[str, Any]], names: dict[str, str], dropped: str) -> dict[str, Any]:
    """Returns what the server's record says of the runs."""
    per_checkpoint = Counter(run["parameters"]["sha256"] for run in runs)
    ended = [run for run in runs if run["start_time"] and run["end_time"]]
    if not ended:
        raise SystemExit(
            f"{len(runs)} runs were made of {len(names)} checkpoints, and none ended: does the service run?"
        )
    seconds = sorted(run["total_run_time"] for run in ended)
    moment = datetime.fromisoformat
    return {
        "checkpoints": len(names), "runs": len(runs), "ended": len(ended),
        "checkpoints_with_one_run": sum(per_checkpoint[sha256] == 1 for sha256 in names),
        "states": dict(Counter(run["state_name"] for run in runs)),
        "attempts": dict(Counter(str(run["run_count"]) for run in runs)),
        "most_runs_at_once": most_at_once(ended),
        "first_start_s": round((moment(min(r["start_time"] for r in ended)) - moment(dropped)).total_seconds(), 1),
        "last_end_s": round((moment(max(r["end_time"] for r in ended)) - moment(dropped)).total_seconds(), 1),
        "run_s": {"min": round(seconds[0], 1), "median": round(seconds[len(seconds) // 2], 1),
                  "max": round(seconds[-1], 1)},
    }  # fmt: skip


def main() -> None:
    """Drops the checkpoints and writes what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint that fits --config")
    parser.add_argument("--config", type=Path, default=Path("deployments/models/digits.yaml"))
    parser.add_argument("--watched", type=Path, default=Path("checkpoints"), help="folder that the service watches")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--longest-s", type=float, default=3 * 3600.0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="")
    options = parser.parse_args()
    options.model = options.name or options.config.stem
    model = f"flood-{os.getpid()}"
    config = write_config(options.config, model)
    memory: list[float] = []
    try:
        with get_client(sync_client=True) as client, tempfile.TemporaryDirectory(dir=options.watched.parent) as folder:
            names = write_checkpoints(options.checkpoint, Path(folder), options.count)
            dropped = datetime.now(UTC).isoformat()
            os.replace(folder, options.watched / model)
            Path(folder).mkdir()
            begun = time.monotonic()
            while time.monotonic() - begun < options.longest_s:
                memory += watchers_mib(client)
                runs = runs_of(client, model, dropped)
                if len(runs) >= options.count and not count(client, UNFINISHED):
                    break
                print(f"{time.monotonic() - begun:6.0f} s: {len(runs)} runs, {count(client, UNFINISHED)} unfinished")
                time.sleep(5)
            found = summary(runs_of(client, model, dropped), names, dropped)
    finally:
        config.unlink()
        shutil.rmtree(options.watched / model, ignore_errors=True)
    sizes = [round(rss, 1) for rss in memory]
    if sizes:  # a service in containers shows none of its processes here
        found["watcher_mib"] = {"first": sizes[0], "min": min(sizes), "max": max(sizes), "last": sizes[-1]}
    print(found)
    write_result(options, "many_checkpoints", found)


if __name__ == "__main__":
    main()
