"""What do Dask workers on this machine do to a run's time, and to its bits?

Runs the demo's calibration and candidates on digits with 1, 2 and 4 Dask workers, each a process with one thread, and
on threads, each time in a store of its own and the flow in a process of its own; `kill` has two workers, of which one
is killed in the first evaluation. Reported: wall time from the end of decoding to the end of the selection, by the
store's notes, the time of the whole flow run, the load of the machine just before (of 1 and 5 minutes), the SHA-256 of
every amax table and of the INT8 graph, and the best candidate, which must be the same each time.
"""

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import distributed

from benchmarks.flow_process import QUIET, result_of
from benchmarks.subject import write_result

RUN = """
import json, sys, time
from pathlib import Path
from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from ptq.storage.store import open_store
config = PtqConfig.model_validate_json(sys.argv[1])
started = time.monotonic()
result = quantize_model(config)
flow_s = time.monotonic() - started
store = open_store(config.output.store)
notes = store.run_stages(result.run_id)
ended = {note["stage"]: note["noted_at"] / 1e9 for note in notes}
before = max(note["noted_at"] / 1e9 for note in notes if note["stage"] == "prepare_split")
tables = {}
for note in notes:
    if note["stage"] == "compute_amax":
        record = store.read_stage(note["stage"], note["key"]).record
        tables[f"{record['method']}-{record['trial']}"] = record["table"]["sha256"]
verdict = json.loads((Path(config.output.directory) / "verdict.json").read_text())
print("RESULT " + json.dumps({
    "flow_s": flow_s, "spread_s": ended["select_candidate"] - before, "amax_sha256": dict(sorted(tables.items())),
    "best": verdict["best"], "int8_onnx_sha256": verdict["files"]["model_int8.onnx"]["sha256"],
    "stage_seconds": {name: verdict["stage_seconds"][name] for name in sorted(verdict["stage_seconds"])},
}))
"""


@contextmanager
def cluster_of(workers: int) -> Iterator[distributed.LocalCluster]:
    """A cluster of processes with one thread each, stages imported; a killed one is started again."""
    with (
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        client.run(_import_stages)
        yield cluster


def _import_stages() -> None:
    import tasks.stages.amax  # noqa: F401 - so that no run waits for imports
    import tasks.stages.calibration
    import tasks.stages.evaluation  # noqa: F401


def run(config: dict[str, Any], home: Path) -> dict[str, Any]:
    """Returns times and digests of one run in a process of its own."""
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home)}
    return result_of(RUN, config, environment)


def kill_one_in(stage: str, address: str, killed: list[dict[str, Any]]) -> None:
    """Kills the process of a worker as soon as one runs a stage of that name."""
    with distributed.Client(address, set_as_default=False) as client:
        while not killed:
            busy = client.run(
                lambda dask_worker: (os.getpid(), [task.key for task in dask_worker.state.executing])
            )  # fmt: skip
            for pid, keys in busy.values():
                if not killed and any(key.startswith(f"{stage}-") for key in keys):
                    os.kill(pid, signal.SIGKILL)
                    killed.append({"stage": keys[0].split("-")[0], "at": time.time()})
            time.sleep(0.02)


def config_of(options: argparse.Namespace, directory: Path, address: str) -> dict[str, Any]:
    """The demo's config with a short benchmark; an address sends stages to Dask."""
    return {
        "model": {"name": "resnet18", "checkpoint": str(options.demo / "resnet18_digits.pth")},
        "data": {
            "path": str(options.demo / "digits"),
            "preprocessing": {"channels": 1, "resize": 32, "crop": 32, "mean": [0.5], "std": [0.5]},
        },
        "calibration": {"trials": options.trials, "images": options.images},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.2, "rounds": 1},
        "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0},
        "runner": {"name": "dask", "address": address, "shards": options.shards} if address else {},
        "output": {"store": str(directory / "store"), "directory": str(directory / "output")},
    }


def measure(options: argparse.Namespace, way: str, directory: Path) -> dict[str, Any]:
    """Returns what one way of running gives: `threads`, a number of workers, or `kill`."""
    if way == "threads":
        return run(config_of(options, directory, ""), directory / "home")
    with cluster_of(2 if way == "kill" else int(way)) as cluster:
        killed: list[dict[str, Any]] = []
        if way == "kill":
            arguments = ("evaluate", cluster.scheduler_address, killed)
            threading.Thread(target=kill_one_in, args=arguments, daemon=True).start()
        found = run(config_of(options, directory, cluster.scheduler_address), directory / "home")
        return {**found, "killed_in": [each["stage"] for each in killed]} if way == "kill" else found


def main() -> None:
    """Measures what is asked for, adds it to what was measured before, and compares the bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, help="folder of a finished `ptq demo`")
    parser.add_argument("--ways", nargs="+", default=["threads", "1", "2", "4", "kill"])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="")
    parser.add_argument("--model", default="digits", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.demo = options.demo.absolute()
    path = options.results / f"dask_scaling_{options.name or options.model}.json"
    ways = json.loads(path.read_text())["found"]["ways"] if path.is_file() else {}
    for way in options.ways:
        with tempfile.TemporaryDirectory() as folder:
            load = [round(value, 1) for value in os.getloadavg()[:2]]
            ways[way] = {**measure(options, way, Path(folder)), "load_before": load}
        print(way, {key: ways[way][key] for key in ("flow_s", "spread_s")}, flush=True)
    compared = ("amax_sha256", "int8_onnx_sha256", "best")
    same = {key: len({json.dumps(found[key], sort_keys=True) for found in ways.values()}) == 1 for key in compared}
    cores = len(os.sched_getaffinity(0))
    note = f"{cores} cores, engine.threads 1: flow, scheduler, server and all workers share them."
    write_result(options, "dask_scaling", {"note": note, "same_bits": same, "ways": ways})
    if not all(same.values()):
        raise SystemExit(f"the ways differ in {[key for key, value in same.items() if not value]}")


if __name__ == "__main__":
    main()
