"""What is left when two processes publish the same model at once?

Two processes meet at a barrier and publish, again and again, to a folder and to real servers on loopback. Each time
there must be one whole pointer, at the last entry of a history that holds both versions.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from benchmarks.subject import write_result
from ptq.storage.store import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import s3_servers


def publish(uri: str, name: str, rounds: int, barrier: Any) -> None:
    """Publishes `name` as a version of a new model in each round."""
    store = open_store(uri)
    for number in range(rounds):
        barrier.wait(timeout=120)
        store.publish(f"m{number}", name, {"from": name})


def main() -> None:
    """Races on each kind of store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--name", default="")
    parser.add_argument("--model", default="loopback", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        found["local"] = race(str(Path(folder) / "store"), options.rounds)
        for kind, started in s3_servers.SERVERS.items():
            with started(Path(folder) / kind) as server:
                os.environ.update(server.environment())
                found[kind] = race(f"s3://{s3_servers.BUCKET}/{uuid.uuid4().hex}", options.rounds)
    write_result(options, "store_publish_race", found)
    for kind, result in found.items():
        print(kind, result)


def race(uri: str, rounds: int) -> dict[str, Any]:
    """Returns how often both versions and a whole pointer were there."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=publish, args=(uri, name, rounds, barrier)) for name in ("v1", "v2")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    store = open_store(uri)
    both = whole = 0
    for number in range(rounds):
        history = store.history(f"m{number}")
        both += sorted(entry["version"] for entry in history) == ["v1", "v2"]
        pointer = json.loads(store.backend.read(f"models/m{number}/latest.json")[0])
        pointer.pop("digest", None)
        whole += bool(history) and pointer == history[-1] == store.latest(f"m{number}")
    return {
        "rounds": rounds, "conditions": store.backend.has_conditions, "both_in_history": both, "whole_pointer": whole,
        "processes_failed": sum(process.exitcode != 0 for process in processes),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
