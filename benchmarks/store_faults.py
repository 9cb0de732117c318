"""Does a store on S3 ever accept a wrong object, however its connections break?

A seeded proxy between the store and a real server on loopback refuses, resets, slows down, truncates and changes bytes.
Each operation either ends with the right bytes or with an ArtifactError; every object that the operations left behind
is read again without the proxy.
"""

import argparse
import os
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subject import write_result
from ptq.errors import ArtifactError
from ptq.records.base import ArtifactRef, to_jsonable
from ptq.storage import s3_bucket
from ptq.storage.cache import ObjectCache
from ptq.storage.store import StageEntry, Store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import s3_servers
from fault_proxy import KINDS, FaultProxy

SIZES = (200, 20_000, 400_000, 3_000_000)
# A client that is asked to slow down does, for all that follows: that fault is drawn less often than the others.
DRAWN = tuple(kind for kind in KINDS if kind != "slow_down") * 6 + ("slow_down",)


@dataclass
class Tally:
    """What the operations came to."""

    operations: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    corrupt_accepted: int = 0
    other_exceptions: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


def main() -> None:
    """Injects faults until each server has had its share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=300, help="faults for each server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.25, help="share of connections that have a fault")
    parser.add_argument("--refuse-s", type=float, default=20.0, help="seconds for which connections are refused once")
    parser.add_argument("--limit-s", type=float, default=240.0, help="seconds after which a server's run ends")
    parser.add_argument("--name", default="")
    parser.add_argument("--model", default="loopback", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    found = {kind: run_on(kind, options) for kind in s3_servers.SERVERS}
    total = sum(sum(result["faults"].values()) for result in found.values())
    write_result(options, "store_faults", {"faults_in_all": total, **found})
    print(f"{total} faults, {sum(result['corrupt_accepted'] for result in found.values())} corrupt objects accepted")


def run_on(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the tally of one server."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, s3_servers.SERVERS[kind](Path(folder) / kind) as server:
        os.environ.update(server.environment())
        s3_bucket.MULTIPART_BYTES, s3_bucket._PART_BYTES = 2_000_000, 5 * 2**20
        uri = f"s3://{s3_servers.BUCKET}/{uuid.uuid4().hex}"
        with FaultProxy(server.port, seed=options.seed, share=options.share, kinds=DRAWN) as proxy:
            os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
            store = Store(s3_bucket.S3Bucket(uri), cache=ObjectCache(Path(folder) / "cache", limit_bytes=2**33))
            tally, kept = Tally(), []
            rng = np.random.default_rng(options.seed)
            refused = False
            while sum(proxy.injected.values()) < options.faults and time.monotonic() - started < options.limit_s:
                operate(store, rng, tally, kept, Path(folder))
                if not refused and sum(proxy.injected.values()) > options.faults // 2:
                    refused = True
                    thread = proxy.refuse_for(options.refuse_s)
                    operate(store, rng, tally, kept, Path(folder))
                    thread.join()
            injected = dict(proxy.injected)
        os.environ["AWS_ENDPOINT_URL_S3"] = server.endpoint
        check_all(uri, kept, tally, Path(folder))
    return {
        "faults": injected, "operations": dict(tally.operations), "ended_with_artifact_error": dict(tally.errors),
        "messages": tally.messages, "other_exceptions": tally.other_exceptions,
        "corrupt_accepted": tally.corrupt_accepted,
        "slowest_operation_s": round(tally.slowest_s, 2), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def operate(store: Store, rng: np.random.Generator, tally: Tally, kept: list, folder: Path) -> None:
    """One round: put an object, get it, write and read a stage, publish and look at the pointer."""
    data = rng.bytes(int(rng.choice(SIZES)))
    (folder / "source").write_bytes(data)
    number = tally.operations["put"]
    ref = attempt("put", tally, lambda: store.put_file(folder / "source", f"{number}.bin"))
    if ref is None:
        return
    kept.append((ref, data))
    got = attempt("get", tally, lambda: store.get_bytes(ref))
    tally.corrupt_accepted += got is not None and got != data
    key = f"{number:064x}"
    entry = StageEntry("evaluate", key, {"object": to_jsonable(ref)}, 1.0, 2.0)
    if attempt("write_stage", tally, lambda: (store.write_stage(entry), True)):
        read = attempt("read_stage", tally, lambda: store.read_stage("evaluate", key))
        tally.corrupt_accepted += read is not None and read != entry
    if number % 5 == 0 and attempt("publish", tally, lambda: (store.publish("m", f"v{number}", {}), True)):
        latest = attempt("latest", tally, lambda: store.latest("m"))
        tally.corrupt_accepted += latest is not None and latest["version"] != f"v{number}"


def attempt(kind: str, tally: Tally, call: Any) -> Any:
    """What the call returns, None where it ended with an ArtifactError."""
    tally.operations[kind] += 1
    started = time.monotonic()
    try:
        return call()
    except ArtifactError as error:
        tally.errors[kind] += 1
        tally.messages.append(f"{kind}: {error}"[:300])
    except Exception as error:
        tally.other_exceptions.append(f"{kind}: {type(error).__name__}: {error}"[:300])
    finally:
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - started)
    return None


def check_all(uri: str, kept: list[tuple[ArtifactRef, bytes]], tally: Tally, folder: Path) -> None:
    """Reads everything again, without faults and with an empty cache."""
    store = Store(s3_bucket.S3Bucket(uri), cache=ObjectCache(folder / "second", limit_bytes=2**33))
    for ref, data in kept:
        got = attempt("get_afterwards", tally, lambda ref=ref: store.get_bytes(ref))
        tally.corrupt_accepted += got is not None and got != data
    sequence = [entry["sequence"] for entry in store.history("m")]
    tally.corrupt_accepted += sequence != sorted(sequence)


if __name__ == "__main__":
    main()
