import contextlib
import http.server
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path

import distributed
import networks
import pytest
import torch
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterName,
    TaskRunFilterState,
    TaskRunFilterStateName,
)

from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from ptq.errors import PtqError, UsageError
from ptq.storage.store import open_store
from tasks.runtime import dask_runner, machine_lock, runners

ROOT = Path(__file__).resolve().parents[2]
SPREAD = ("collect_shard", "compute_amax", "evaluate")
# The verdict says when, where and how fast; the rest of it must not differ.
TIMED = {"run_id", "config_sha256", "benchmark", "gate", "red_flags", "files", "stage_seconds"}
RUNNING = TaskRunFilterState(name=TaskRunFilterStateName(any_=["Running"]))

pytestmark = [pytest.mark.usefixtures("recorded_task_runs"), pytest.mark.slow]


class Cluster:
    """A scheduler and workers, each a process of its own with a cache and locks of its own."""

    def __init__(self, folder, **environment):
        self.folder = folder
        self._environment = environment
        self.workers = {}
        self._file = folder / "scheduler.json"
        self._scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", name="scheduler")
        self._await(self._file.is_file)
        self.address = json.loads(self._file.read_text())["address"]
        self.client = distributed.Client(self.address, set_as_default=False, timeout=30)

    def _start(self, program, *options, name):
        environment = {
            **os.environ,
            **self._environment,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
            "PTQ_CACHE_DIR": str(self.folder / f"{name}-cache"),
            "PTQ_LOCK_DIR": str(self.folder / "worker-locks"),
        }
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{program}", *options, "--no-dashboard"]
                + ["--scheduler-file", str(self._file)],
                env=environment, cwd=self.folder, stdout=log, stderr=log,
            )  # fmt: skip

    @staticmethod
    def _await(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    def add_worker(self):
        name = f"worker{len(self.workers)}"
        self.workers[name] = self._start("worker", "--nthreads", "1", "--no-nanny", "--name", name, name=name)
        self._await(lambda: name in self.names().values())

    def names(self):
        return {address: worker["name"] for address, worker in self.client.scheduler_info()["workers"].items()}

    def hold(self):
        """Keeps the stages that workers begin from going on until what is returned is closed."""
        held = contextlib.ExitStack()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(machine_lock.FOLDER_VARIABLE, str(self.folder / "worker-locks"))
            held.enter_context(machine_lock.whole_machine())
        return held

    def kill_scheduler_in(self, stage):
        """Kills the scheduler while a worker runs a stage of that name."""
        self._await_running(stage)
        self._scheduler.send_signal(signal.SIGKILL)

    def kill_worker_in(self, stage):
        """Kills one worker in a stage of which Prefect knows that it runs; returns the worker and the task run's id."""
        address, task_run = self._await_running(stage)
        name = self.names()[address]
        self.workers[name].send_signal(signal.SIGKILL)
        return name, task_run

    def _await_running(self, stage):
        found = []

        def is_running():
            of_stage = TaskRunFilter(name=TaskRunFilterName(like_=f"{stage}-"), state=RUNNING)
            with get_client(sync_client=True) as client:
                known = {str(run.id) for run in client.read_task_runs(task_run_filter=of_stage)}
            executing = self.client.run(lambda dask_worker: [task.key for task in dask_worker.state.executing])
            found[:] = [
                (address, key.removeprefix(f"{stage}-"))
                for address, keys in executing.items()
                for key in keys
                if key.removeprefix(f"{stage}-") in known
            ]
            return found

        self._await(is_running)
        return found[0]

    def close(self):
        self.client.close()
        for process in (*self.workers.values(), self._scheduler):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    started = Cluster(tmp_path_factory.mktemp("dask"))
    with contextlib.closing(started):
        yield started


@pytest.fixture(scope="module")
def configure(tmp_path_factory, image_folder):
    """What makes the config of a run with a store of its own; an address sends it to Dask."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "small.pth"
    torch.save(networks.small_resnet().state_dict(), checkpoint)

    def config_of(address=""):
        directory = tmp_path_factory.mktemp("run")
        return PtqConfig.model_validate(
            {
                "model": {"name": "networks:SmallResNet", "checkpoint": str(checkpoint), "publish_as": "small"},
                "data": {"path": str(image_folder), "preprocessing": {"resize": 24, "crop": 24}},
                "calibration": {"trials": 2, "images": 24, "methods": ["max", "percentile"], "percentiles": [99.9]},
                "engine": {"name": "openvino", "threads": 1},
                "benchmark": {"batch_sizes": [1], "duration_s": 0.02, "warmup_ms": 1.0, "rounds": 1},
                "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
                "runner": {"name": "dask", "address": address, "shards": 3} if address else {},
                "output": {"store": f"file://{directory / 'store'}", "directory": str(directory / "output")},
            }
        )

    return config_of


@pytest.fixture(scope="module")
def on_threads(prefect_backend, configure):
    """A finished run on this machine alone."""
    config = configure()
    quantize_model(config)
    return config


def stages_of(config):
    """The records of a store by stage and key."""
    root = open_store(config.output.store).backend.root / "stages"
    return {
        path.parent.name: {each.stem: json.loads(each.read_text())["record"] for each in path.parent.glob("*.json")}
        for path in root.glob("*/*.json")
    }


def verdict_of(config):
    verdict = json.loads((Path(config.output.directory) / "verdict.json").read_text())
    return {key: value for key, value in verdict.items() if key not in TIMED}


def assert_same_bits(config, reference):
    """Every stage that is not a measurement has the same keys and the same record, whichever way it was computed."""
    found, expected = stages_of(config), stages_of(reference)
    (merged,) = found["merge_statistics"].values()
    (collected,) = expected["collect_statistics"].values()
    assert merged == collected
    assert len(expected["compute_amax"]) == 4
    for stage in ("compute_amax", "correct_biases", "export_qdq", "evaluate", "evaluate_baseline", "write_graph"):
        assert found[stage] == expected[stage], stage
    assert verdict_of(config) == verdict_of(reference)


def task_runs_of(state):
    with get_client(sync_client=True) as client:
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        return client.read_task_runs(flow_run_filter=of_run)


def await_task_runs(state, *, count):
    """Task runs of the spread stages, as soon as Prefect has taken in so many that have ended."""
    end = time.monotonic() + 30
    while True:
        spread = [run for run in task_runs_of(state) if run.name.rsplit("-")[0] in SPREAD]
        spread = [run for run in spread if run.state and run.state.is_final()]
        if len(spread) >= count or time.monotonic() > end:
            return spread
        time.sleep(0.2)


def test_two_workers_give_the_same_bits_as_threads_and_find_them_again(cluster, configure, on_threads):
    cluster.add_worker()
    cluster.add_worker()
    config = configure(cluster.address)
    quantize_model(config)
    assert_same_bits(config, on_threads)
    spread = sum(len(stages_of(config)[stage]) for stage in SPREAD)
    again = quantize_model(config, return_state=True)
    runs = await_task_runs(again, count=spread)
    assert {run.state.name for run in runs} == {"Cached"}
    assert len(runs) == spread
    seen = cluster.client.run(lambda: "tasks.stages.calibration" in sys.modules)
    assert list(seen.values()) == [True, True]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "worker_requirements",
            lambda terms: replace(terms, sources="0" * 64),
            r"has the sources [0-9a-f]{12} of ptq, tasks",
        ),
        (
            "_server_of_flow",
            lambda server: ("http://127.0.0.1:9/api", False),
            r"cannot reach the Prefect server",
        ),
    ],
    ids=["other sources", "server out of reach"],
)
def test_a_worker_whose_results_could_differ_or_be_missed_is_refused(
    cluster, configure, monkeypatch, name, change, message
):
    module = runners if name == "worker_requirements" else dask_runner
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: change(original(*args, **kwargs)))
    with pytest.raises(UsageError, match=rf"Dask worker tcp://127\.0\.0\.1:[0-9]+ {message}"):
        quantize_model(configure(cluster.address))


def test_a_worker_that_is_killed_in_a_stage_changes_nothing_but_the_time(cluster, configure, on_threads):
    config = configure(cluster.address)
    held = cluster.hold()
    with ThreadPoolExecutor(1) as killer, held:
        # A copy of the context: Prefect's settings of the tests are in it.
        killed = killer.submit(copy_context().run, cluster.kill_worker_in, "collect_shard")
        killed.add_done_callback(lambda _: held.close())
        state = quantize_model(config, return_state=True)
    worker, task_run = killed.result()
    assert cluster.workers[worker].wait(10) == -signal.SIGKILL
    assert_same_bits(config, on_threads)
    spread = sum(len(stages_of(config)[stage]) for stage in SPREAD)
    runs = await_task_runs(state, count=spread)
    assert {run.state.name for run in runs} == {"Completed"}
    assert len(runs) == spread
    with get_client(sync_client=True) as client:
        names = [each.name for each in client.read_task_run_states(task_run)]
    assert names.count("Running") == 2
    assert names.count("Completed") == 1


def test_a_cluster_that_loses_its_last_worker_ends_the_run_with_what_to_do(cluster, configure, monkeypatch):
    monkeypatch.setattr(dask_runner, "WITHOUT_WORKERS_S", 3.0)
    with ThreadPoolExecutor(1) as killer, cluster.hold():
        killed = killer.submit(copy_context().run, cluster.kill_worker_in, "collect_shard")
        with pytest.raises(PtqError, match=r"Dask cluster at runner\.address tcp://.* has had no worker for [3-9] s"):
            quantize_model(configure(cluster.address))
    assert killed.result()


def test_a_scheduler_without_workers_is_told_of_within_the_time_they_have(cluster, configure, monkeypatch):
    monkeypatch.setattr(dask_runner, "WITHOUT_WORKERS_S", 1.0)
    with pytest.raises(PtqError, match=r"has had no worker for 1 s.* `dask worker tcp://127\.0\.0\.1:[0-9]+ --nthr"):
        quantize_model(configure(cluster.address))


@pytest.fixture(scope="module")
def strict_cluster(tmp_path_factory):
    """A cluster whose scheduler gives no stage a second worker."""
    started = Cluster(tmp_path_factory.mktemp("strict"), DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    with contextlib.closing(started):
        yield started


def test_a_stage_that_has_ended_as_many_workers_as_the_scheduler_allows_is_named(strict_cluster, configure):
    strict_cluster.add_worker()
    with ThreadPoolExecutor(1) as killer, strict_cluster.hold():
        killed = killer.submit(copy_context().run, strict_cluster.kill_worker_in, "collect_shard")
        with pytest.raises(PtqError, match=r"Stage collect_shard ended 1 workers, the last one at tcp://127\.0\.0\.1:"):
            quantize_model(configure(strict_cluster.address))
    assert killed.result()


def test_a_scheduler_that_is_lost_in_a_stage_ends_the_run(strict_cluster, configure):
    strict_cluster.add_worker()
    with ThreadPoolExecutor(1) as killer, strict_cluster.hold():
        killed = killer.submit(copy_context().run, strict_cluster.kill_scheduler_in, "collect_shard")
        with pytest.raises(PtqError, match=r"Dask cluster at runner\.address tcp://127\.0\.0\.1:[0-9]+ is gone"):
            quantize_model(configure(strict_cluster.address))
    killed.result()


@pytest.fixture(params=["nothing", "silence", "a web server"])
def wrong_address(request):
    """The address of something that is no scheduler."""
    if request.param == "nothing":
        yield "tcp://127.0.0.1:9"
        return
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        if request.param == "a web server":
            threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.server_address[1]}"
        if request.param == "a web server":
            server.shutdown()


def test_an_address_where_no_scheduler_answers_is_named_within_the_time_to_connect(
    configure, monkeypatch, wrong_address
):
    monkeypatch.setattr(dask_runner, "CONNECT_S", 1.0)
    with pytest.raises(UsageError, match=rf"No Dask scheduler answers at runner\.address {wrong_address}: \w+"):
        quantize_model(configure(wrong_address))


def test_make_dask_runs_a_cluster_until_it_is_told_to_end():
    command = [sys.executable, "-m", "deployments.local_dask", "--workers", "1", "--port", "0", "--dashboard", ":0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        said = "".join(process.stdout.readline() for _ in range(5))
        address = yaml.safe_load(said.split("\n\n")[1])["runner"]["address"]
        with distributed.Client(address, set_as_default=False, timeout=30) as client:
            assert list(client.nthreads().values()) == [1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
