"""Does a run that is killed anywhere end, run again, with the same bytes and no stage computed twice?

`ptq quantize` on the demo's digits, each time with an empty store at the same place: it is ended with SIGKILL, with its
whole process group, at a seeded moment, and run again to its end. On S3
it is also measured what an unchanged second run costs, on the same machine and on one whose cache is empty.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.subject import write_result
from ptq.data.demo_digits import DEMO, write_digits_folder
from ptq.storage.store import Store, open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import s3_servers

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300.0
# Fields of the verdict that are measured or name the run. All others are compared.
MEASURED_FIELDS = ("run_id", "stage_seconds", "benchmark", "red_flags")
# Files that hold measurements, or a page that shows them. All others are compared by SHA-256 and size, but engines:
# OpenVINO writes a counter of the process into their layers' names, so their bytes tell what was built before.
MEASURED_FILES = ("benchmark.parquet", "report.html", "report.md")


@dataclass(frozen=True, slots=True)
class Subject:
    """What every run quantizes: images and a checkpoint, and the folder of Prefect's own database."""

    folder: Path

    def config(self, *, store: str, output: Path) -> Path:
        """Writes the config of a run and returns its path."""
        side = DEMO.image_size
        content = {
            "model": {"name": DEMO.model, "checkpoint": str(self.folder / "digits.pth"), "publish_as": "digits"},
            "data": {"path": str(self.folder / "digits"), "preprocessing": preprocessing(side)},
            "calibration": {"trials": 1, "images": 128, "methods": ["max", "percentile"]},
            "engine": {"name": "openvino", "threads": 2},
            "benchmark": {"batch_sizes": [1], "duration_s": 0.5, "rounds": 2},
            # Accepted however fast it is: a busy machine must not decide what a run publishes.
            "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0},
            "output": {"store": store, "directory": str(output)},
        }  # fmt: skip
        path = output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(content))
        return path

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a run."""
        return {**os.environ, "PREFECT_HOME": str(self.folder / "prefect"), **more}


@dataclass(frozen=True, slots=True)
class Moment:
    """When so many stages are finished, and so many seconds later; where none is, so many seconds after the start."""

    finished: int
    after_s: float

    def wait(self, process: subprocess.Popen, store: Store) -> None:
        """Waits for the moment, or for the end of the process."""
        while process.poll() is None and len(list(store.backend.entries("stages/"))) < self.finished:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.after_s)


def preprocessing(side: int) -> dict[str, Any]:
    """How the demo's digits are read."""
    return {"channels": 1, "resize": side, "crop": side, "mean": [0.5], "std": [0.5]}


def main() -> None:
    """Kills and resumes on a folder and on a server, or runs one counted command."""
    if sys.argv[1:2] == ["counted"]:
        counted(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills on a store in a folder")
    parser.add_argument("--s3-kills", type=int, default=6, help="kills on a store in a bucket")
    parser.add_argument("--server", choices=sorted(s3_servers.SERVERS), default="moto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="")
    parser.add_argument("--model", default="digits", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subject = prepared(Path(folder))
        rng = random.Random(options.seed)
        found: dict[str, Any] = {
            "not_compared": {"fields": [*MEASURED_FIELDS, "gate.reasons"], "files": [*MEASURED_FILES, "*.engine"]}
        }
        if options.kills:
            found["local"] = kill_runs(subject, Path(folder) / "local", options.kills, rng, place="")
            write_result(options, "store_kills", found)
        if options.s3_kills:
            with s3_servers.SERVERS[options.server](Path(folder) / options.server) as server:
                os.environ.update(server.environment())
                place = f"s3://{s3_servers.BUCKET}/kills"
                found["s3"] = {
                    "server": options.server,
                    "again": run_again(subject, Path(folder) / "again", place=f"{place}/again"),
                    **kill_runs(subject, Path(folder) / "s3", options.s3_kills, rng, place=f"{place}/killed"),
                }
    path = write_result(options, "store_kills", found)
    print(path.read_text())


def prepared(folder: Path) -> Subject:
    """Writes the digits and trains one epoch on them."""
    side = DEMO.image_size
    write_digits_folder(folder / "digits", image_size=side, seed=0)
    subject = Subject(folder)
    config = {
        "model": DEMO.model, "output": str(folder / "digits.pth"), "epochs": 1, "batch_size": DEMO.batch_size,
        "learning_rate": DEMO.learning_rate,
        "data": {"path": str(folder / "digits"), "preprocessing": preprocessing(side)},
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    command = ["train", "--config", str(folder / "train.yaml"), "--store", str(folder / "trained"), "--json"]
    subprocess.run(
        [sys.executable, "-m", "flows.cli", *command], check=True, cwd=ROOT, env=subject.environment(),
        stdout=subprocess.DEVNULL, timeout=LIMIT_S,
    )  # fmt: skip
    return subject


def kill_runs(subject: Subject, folder: Path, kills: int, rng: random.Random, *, place: str) -> dict[str, Any]:
    """Returns what came of killing that many runs.

    Args:
        subject: what is quantized.
        folder: for outputs, and for stores where `place` is empty.
        kills: runs to kill. Each moment is drawn evenly from the undisturbed run, between the begin of its first stage
            and the end of the process, and found again in the other run by the stages that are finished by then: how
            fast a machine is changes with what else it does.
        rng: draws the moments.
        place: s3:// URI under which each run has a store of its own; empty for stores in `folder`.
    """
    folder.mkdir()
    with run_of(subject, folder, place) as (process, store):
        started = time.time()
        require_accepted(process)
        whole_s = time.time() - started
    stages = [store.read_stage(note["stage"], note["key"]) for note in only_run(store)]
    ends_s = sorted(entry.finished_at - started for entry in stages if entry is not None)
    begins_s = min(entry.finished_at - entry.seconds for entry in stages if entry is not None) - started
    expected = outcome(folder / "run")
    runs: list[dict[str, Any]] = []
    # A run that ended before its moment is drawn again.
    while sum(run["was_killed"] for run in runs) < kills:
        clear(folder, store)
        moment_s = rng.uniform(begins_s, whole_s)
        finished = sum(end_s <= moment_s for end_s in ends_s)
        after_s = moment_s - max([0.0, *ends_s[:finished]])
        runs.append(kill_run(subject, folder, place, Moment(finished, after_s), expected))
        print(runs[-1], flush=True)
    return {
        "undisturbed_s": round(whole_s, 2), "first_stage_begins_s": round(begins_s, 2), "stages": len(stages),
        "kills": sum(run["was_killed"] for run in runs),
        "same_onnx_bytes": sum(run["same_onnx_bytes"] for run in runs),
        "same_verdict": sum(run["same_verdict"] for run in runs),
        "finished_stages_computed_again": sum(len(run["finished_but_computed_again"]) for run in runs),
        "partial_visible": sum(len(run["partial_visible"]) for run in runs),
        "model_int8_sha256": expected["onnx"], "runs": runs,
    }  # fmt: skip


def clear(folder: Path, store: Store) -> None:
    """Forgets the run before: its store, its output and its cache."""
    for entry in list(store.backend.entries("")):
        store.backend.delete(entry.name)
    for name in ("run", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)


def kill_run(subject: Subject, folder: Path, place: str, moment: Moment, expected: dict[str, Any]) -> dict[str, Any]:
    """Kills one run, runs it again and compares."""
    with run_of(subject, folder, place) as (process, store):
        moment.wait(process, store)
        was_killed = process.poll() is None
        if was_killed:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    partial = partial_names(store)
    finished = {entry.name for entry in store.backend.entries("stages/")}
    before = {entry.name.split("/")[1] for entry in store.backend.entries("runs/")}
    started = time.monotonic()
    with run_of(subject, folder, place) as (process, store):
        require_accepted(process)
    (resumed,) = {entry.name.split("/")[1] for entry in store.backend.entries("runs/")} - before
    notes = store.run_stages(resumed)
    computed = {f"stages/{note['stage']}/{note['key']}.json" for note in notes if not note["cached"]}
    found = outcome(folder / "run")
    return {
        "after_stages": moment.finished, "and_s": round(moment.after_s, 2), "was_killed": was_killed,
        "finished_stages": len(finished),
        "cached_in_resume": len(notes) - len(computed), "computed_in_resume": len(computed),
        "finished_but_computed_again": sorted(computed & finished),
        "partial_visible": [*partial, *partial_names(store)],
        "same_onnx_bytes": found["onnx"] == expected["onnx"], "same_verdict": found["verdict"] == expected["verdict"],
        "differs_in": differences(found["verdict"], expected["verdict"]),
        "resume_s": round(time.monotonic() - started, 2),
    }  # fmt: skip


@contextlib.contextmanager
def run_of(subject: Subject, folder: Path, place: str) -> Iterator[tuple[subprocess.Popen, Store]]:
    """A running `ptq quantize` in a process group of its own, and its store; the group is ended afterwards."""
    uri = place or f"file://{folder / 'store'}"
    config = subject.config(store=uri, output=folder / "run")
    environment = subject.environment(PTQ_CACHE_DIR=str(folder / "cache"))
    with (folder / "run.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "quantize", "--config", str(config)], cwd=ROOT, env=environment,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        os.environ["PTQ_CACHE_DIR"] = environment["PTQ_CACHE_DIR"]
        try:
            yield process, open_store(uri)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def require_accepted(process: subprocess.Popen) -> None:
    """Waits for the process; RuntimeError unless it ends well."""
    code = process.wait(LIMIT_S)
    if code != 0:
        raise RuntimeError(f"A run ended with exit code {code}; expected 0. Look into its log.")


def only_run(store: Store) -> list[dict[str, Any]]:
    """The notes of the only run of a store."""
    (run,) = {entry.name.split("/")[1] for entry in store.backend.entries("runs/")}
    return store.run_stages(run)


def partial_names(store: Store) -> list[str]:
    """Names of objects whose bytes are not theirs, and of documents that do not parse or name what is not there."""
    objects = [
        entry.name
        for entry in store.backend.entries("objects/")
        if hashlib.sha256(store.backend.read(entry.name)[0]).hexdigest() != entry.name.rpartition("/")[2]
    ]
    names = [entry.name for entry in store.backend.entries("stages/")]
    stages = [name for name in names if store.read_stage(name.split("/")[1], Path(name).stem) is None]
    runs = {entry.name.split("/")[1] for entry in store.backend.entries("runs/")}
    noted = sum(len(store.run_stages(run)) for run in runs)
    notes = ["runs/"] if noted != len(list(store.backend.entries("runs/"))) else []
    return [*objects, *stages, *notes, *(entry.name for entry in store.backend.entries("damaged/"))]


def outcome(folder: Path) -> dict[str, Any]:
    """The SHA-256 of the graph, and the verdict without what is measured."""
    verdict = json.loads((folder / "verdict.json").read_text())
    for field in MEASURED_FIELDS:
        del verdict[field]
    del verdict["gate"]["reasons"]
    verdict["files"] = {
        name: [file["sha256"], file["size_bytes"]]
        for name, file in verdict["files"].items()
        if name not in MEASURED_FILES
    }
    verdict["files"] |= {name: [] for name in verdict["files"] if name.endswith(".engine")}
    return {"onnx": hashlib.sha256((folder / "model_int8.onnx").read_bytes()).hexdigest(), "verdict": verdict}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The fields, and the files, in which two verdicts differ."""
    fields = [name for name in expected if name != "files" and found.get(name) != expected[name]]
    names = sorted({*found["files"], *expected["files"]})
    return fields + [name for name in names if found["files"].get(name) != expected["files"].get(name)]


def run_again(subject: Subject, folder: Path, *, place: str) -> dict[str, Any]:
    """Returns what a first run costs, an unchanged second one, and one on a machine whose cache is empty."""
    folder.mkdir()
    found: dict[str, Any] = {}
    for name, cache in (("first", "one"), ("unchanged", "one"), ("another_machine", "two")):
        config = subject.config(store=place, output=folder / name)
        environment = subject.environment(PTQ_CACHE_DIR=str(folder / f"cache-{cache}"))
        known = {entry.name.split("/")[1] for entry in open_store(place).backend.entries("runs/")}
        began = time.time()
        with (folder / f"{name}.log").open("wb") as log:
            command = ["counted", str(folder / f"{name}.json"), "quantize", "--config", str(config)]
            subprocess.run(
                [sys.executable, "-m", "benchmarks.store_kills", *command], check=True, cwd=ROOT, env=environment,
                stdout=log, stderr=log, timeout=LIMIT_S,
            )  # fmt: skip
        ended, counts = time.time(), json.loads((folder / f"{name}.json").read_text())
        store = open_store(place)
        (run,) = {entry.name.split("/")[1] for entry in store.backend.entries("runs/")} - known
        notes = store.run_stages(run)
        found[name] = {
            "start_up_s": round(counts["flow_began_at"] - began, 2),
            "after_start_up_s": round(ended - counts["flow_began_at"], 2),
            "flow_s": round(counts["flow_ended_at"] - counts["flow_began_at"], 2),
            "images_decoded": counts["decoded"], "stages": len(notes), "cached": sum(note["cached"] for note in notes),
            "model_int8_sha256": hashlib.sha256((folder / name / "model_int8.onnx").read_bytes()).hexdigest(),
        }  # fmt: skip
        print(name, found[name], flush=True)
    return found


def counted(path: Path, arguments: list[str]) -> None:
    """Runs one `ptq` command in this process and writes to `path` how many images it decoded and when its flow ran."""
    from flows import cli, quantize_model
    from ptq.data import images

    counts: dict[str, float] = {"decoded": 0}
    plain_open, plain_start, publish_end = images.Image.open, quantize_model.resolve_engine, quantize_model.write_report

    def opening(*parameters: Any, **more: Any) -> Any:
        counts["decoded"] += 1
        return plain_open(*parameters, **more)

    def beginning(*parameters: Any, **more: Any) -> Any:
        counts.setdefault("flow_began_at", time.time())
        return plain_start(*parameters, **more)

    def ending(*parameters: Any, **more: Any) -> Any:
        result = publish_end(*parameters, **more)
        counts["flow_ended_at"] = time.time()
        return result

    # Each is looked up where it is used: what the flow does first, what it does last, and the one way to decode.
    for module, name, replacement in (
        (images.Image, "open", opening), (quantize_model, "resolve_engine", beginning),
        (quantize_model, "write_report", ending),
    ):  # fmt: skip
        setattr(module, name, replacement)
    sys.argv = ["ptq", *arguments]
    try:
        cli.main()
    finally:
        path.write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
