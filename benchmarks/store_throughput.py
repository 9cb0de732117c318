"""How fast are put and get through the store, against the plain calls of boto3?

On real servers on loopback, interleaved in one run. Both sides end with a file: the store's put begins with a file and
digests it, its get verifies the file that it wrote. The plain side is the faster of boto3's ways, with its defaults.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subject import write_result
from ptq.storage import s3_bucket
from ptq.storage.cache import ObjectCache
from ptq.storage.store import Store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import s3_servers


def main() -> None:
    """Measures each kind of server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="")
    parser.add_argument("--model", default="loopback", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    found = {kind: measure(kind, options) for kind in s3_servers.SERVERS}
    write_result(options, "store_throughput", found)
    for kind, result in found.items():
        print(kind, result)


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns median seconds of every way, and the ratios of the store to the faster plain one."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, s3_servers.SERVERS[kind](Path(folder) / kind) as server:
        os.environ.update(server.environment())
        where = Path(folder)
        source = where / "source"
        store = Store(
            s3_bucket.S3Bucket(f"s3://{s3_servers.BUCKET}/store"),
            cache=ObjectCache(where / "cache", limit_bytes=2**40),
        )
        plain = Plain(server.client(), where)
        times: dict[str, list[float]] = {}
        for number in range(options.rounds + 1):
            # Other bytes each time: the store does not put what it has.
            source.write_bytes(rng.bytes(options.megabytes * 10**6))
            steps: dict[str, Callable[[], Any]] = {
                "put_object": lambda: plain.put(source),
                "get_object": plain.get,
                "upload_file": lambda: plain.client.upload_file(str(source), s3_servers.BUCKET, plain.key),
                "download_file": lambda: plain.client.download_file(
                    s3_servers.BUCKET, plain.key, str(where / "target")
                ),
            }
            measured = run(steps) | run_store(store, source) if number % 2 else run_store(store, source) | run(steps)
            if number:  # the first round warms up
                for way, seconds in measured.items():
                    times.setdefault(way, []).append(seconds)
    medians = {way: round(statistics.median(seconds), 4) for way, seconds in times.items()}
    put = min(medians["put_object"], medians["upload_file"])
    get = min(medians["get_object"], medians["download_file"])
    return {
        "median_s": medians,
        "put_ratio": round(put / medians["store_put"], 3),
        "get_ratio": round(get / medians["store_get"], 3),
        "get_ratio_to_download_file": round(medians["download_file"] / medians["store_get"], 3),
        "seconds": {way: [round(second, 4) for second in seconds] for way, seconds in times.items()},
    }


class Plain:
    """boto3's own calls, with its defaults."""

    def __init__(self, client: Any, folder: Path) -> None:
        self.client = client
        self.key = uuid.uuid4().hex
        self._target = folder / "target"

    def put(self, source: Path) -> None:
        """Puts the file in one request."""
        with source.open("rb") as stream:
            self.client.put_object(Bucket=s3_servers.BUCKET, Key=self.key, Body=stream)

    def get(self) -> None:
        """Gets the object in one request, into a file."""
        body = self.client.get_object(Bucket=s3_servers.BUCKET, Key=self.key)["Body"]
        with self._target.open("wb") as stream:
            for chunk in body.iter_chunks(2**20):
                stream.write(chunk)


def run(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each step."""
    found = {}
    for way, step in steps.items():
        started = time.perf_counter()
        step()
        found[way] = time.perf_counter() - started
    return found


def run_store(store: Store, source: Path) -> dict[str, float]:
    """Seconds of put and get through the store; what was read is removed from the cache."""
    refs: list[Any] = []
    found = run(
        {"store_put": lambda: refs.append(store.put_file(source)), "store_get": lambda: store.get_path(refs[0])}
    )
    store.get_path(refs[0]).unlink()
    store.backend.delete(f"objects/{refs[0].sha256[:2]}/{refs[0].sha256}")
    return found


if __name__ == "__main__":
    main()
