"""How do stages run on the workers of a Dask cluster?

The only importer of `prefect_dask` and `distributed`. A stage travels by its name and is imported by the worker, which
first makes sure that it meets the terms of the run; its task run is Prefect's as on threads, so states and logs show
as usual. A worker that dies is Dask's business: it gives the stage to another one, under the same task run. Where no
worker is left, or the scheduler, the wait ends with an error.
"""

import asyncio
import importlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, cast
from uuid import uuid4

import cloudpickle
import distributed
import httpx
from prefect import Task
from prefect.client.schemas.objects import RunInput, State
from prefect.context import FlowRunContext, hydrated_context, serialize_context
from prefect.futures import PrefectFuture, PrefectFutureList
from prefect.logging import get_run_logger
from prefect.logging.handlers import set_api_log_sink
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from prefect.task_engine import run_task_sync
from prefect_dask.task_runners import DaskTaskRunner, PrefectDaskFuture

from ptq.errors import PtqError, UsageError
from tasks.runtime.progress import has_lasting_server
from tasks.runtime.worker_check import WorkerRequirements, worker_mismatch

CONNECT_S = 15.0
# A worker that is started again, or a machine that is replaced, comes back within this.
WITHOUT_WORKERS_S = 60.0
_LOOK_EVERY_S = 2.0


class DaskStages(DaskTaskRunner):
    """Runs stages on the workers of a cluster that exists, each of which meets the terms of the run.

    Args:
        address: the scheduler's, as tcp://host:port.
        terms: what workers must have in common with this machine.
    """

    def __init__(self, address: str, terms: WorkerRequirements) -> None:
        super().__init__(address=address, client_kwargs={"timeout": CONNECT_S})
        self._terms = terms
        self._context = b""

    def duplicate(self) -> "DaskStages":
        """Returns a runner of the same cluster, not connected yet."""
        return DaskStages(self.address or "", self._terms)

    def __enter__(self) -> "DaskStages":
        """Connects, and makes sure that there are workers and that each of them meets the terms.

        Raises:
            UsageError: there is no such scheduler, or a worker does not meet the terms.
            PtqError: the scheduler has no worker.
        """
        super().__enter__()
        try:
            _connect(self)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        server = _server_of_flow()
        # Workers have to know the server that this process has started for itself, too.
        with temporary_settings({PREFECT_API_URL: server[0]}):
            self._context = cloudpickle.dumps((server, serialize_context()))
        return self

    def submit(
        self,
        task: Task[..., Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> Any:
        """Starts a stage on some worker and returns its future, a `PrefectDaskFuture`."""
        task_run_id = uuid4()
        # A relative path would name another folder on the worker.
        run = replace(parameters["run"], store_uri=self._terms.store_uri)
        call = cloudpickle.dumps(
            {
                "task_run_id": task_run_id,
                "parameters": {**parameters, "run": run},
                "wait_for": wait_for,
                "dependencies": dependencies,
            }
        )
        future = self.client.submit(
            run_on_worker,
            self._terms,
            f"{task.fn.__module__}:{task.fn.__name__}",
            call,
            self._context,
            key=f"{task.name}-{task_run_id}",
        )
        return PrefectDaskFuture(wrapped_future=future, task_run_id=task_run_id)

    def map(
        self, task: Task[..., Any], parameters: dict[str, Any], wait_for: Iterable[PrefectFuture[Any]] | None = None
    ) -> PrefectFutureList[Any]:
        """Starts a stage for each set of parameters; the wait for results ends where the cluster is gone."""
        return _StageFutures(self, super().map(task, parameters, wait_for))


class _StageFutures(PrefectFutureList[Any]):
    """The futures of a mapped stage."""

    def __init__(self, stages: DaskStages, futures: Iterable[PrefectFuture[Any]]) -> None:
        super().__init__(futures)
        self._stages = stages

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> list[Any]:
        """Returns every stage's result; the first failure is raised as soon as it is known."""
        end = None if timeout is None else time.monotonic() + timeout
        pending = {future.wrapped_future: future for future in self if isinstance(future, PrefectDaskFuture)}
        results: dict[Any, Any] = {}
        while pending:
            for ended in self._await_some(list(pending), end):
                future = pending.pop(ended)
                results[future.task_run_id] = self._result_of(future, raise_on_failure)
        return [results[future.task_run_id] for future in self]

    def _await_some(self, pending: list[distributed.Future], end: float | None) -> set[distributed.Future]:
        """Waits until some have ended, whichever way, but not for a cluster that is gone."""
        client = self._stages.client
        lost_at: float | None = None
        while True:
            try:
                with client.as_current():
                    found = distributed.wait(pending, timeout=_LOOK_EVERY_S, return_when="FIRST_COMPLETED")
                return cast(set[distributed.Future], found.done)
            except distributed.CancelledError as error:
                raise _gone(self._stages, "is gone") from error
            except TimeoutError:
                if end is not None and time.monotonic() > end:
                    raise
            try:
                has_workers = bool(client.nthreads())
            except OSError as error:
                raise _gone(self._stages, "is gone") from error
            now = time.monotonic()
            lost_at = None if has_workers else lost_at or now
            if lost_at is not None and now > lost_at + WITHOUT_WORKERS_S:
                raise _gone(self._stages, f"has had no worker for {now - lost_at:.0f} s")

    def _result_of(self, future: PrefectDaskFuture[Any], raise_on_failure: bool) -> Any:
        try:
            return future.result(raise_on_failure=raise_on_failure)
        except distributed.CancelledError as error:
            raise _gone(self._stages, "is gone") from error
        except distributed.KilledWorker as error:
            raise PtqError(
                f"Stage {str(error.task).split('-')[0]} ended {error.allowed_failures + 1} workers, the last one at "
                f"{error.last_worker.address}. Expected a worker that lives through it. The likeliest cause is memory: "
                "see the workers' logs, give them more, or set runner.shards higher."
            ) from error


def run_on_worker(terms: WorkerRequirements, stage: str, call: bytes, context: bytes) -> State[Any]:
    """Runs a stage on this worker and returns the final state of its task run.

    Args:
        terms: of the run.
        stage: the stage as `module:function`.
        call: arguments of `run_task_sync`, pickled; read once the sources are known to be the same.
        context: the flow's server, as `_server_of_flow` has it, and Prefect's context of the flow run, pickled.

    Raises:
        UsageError: this machine does not meet the terms.
    """
    _meet(terms)
    module, name = stage.split(":")
    task = getattr(importlib.import_module(module), name)
    server, flow_run = cloudpickle.loads(context)
    address, is_own = _server_here(*server)
    # Prefect sends logs by threads that know the worker's own settings alone: without an address among them, they
    # would start a server here.
    set_api_log_sink(None if is_own else _drop)
    with hydrated_context(flow_run), temporary_settings({PREFECT_API_URL: address}):
        return cast(State[Any], run_task_sync(task, return_type="state", **cloudpickle.loads(call)))


def _server_of_flow() -> tuple[str, bool]:
    """The address of Prefect's server, and whether it outlives this process, which otherwise has started it."""
    flow_run = FlowRunContext.get()
    if flow_run is None:
        raise RuntimeError("Stages are spread outside of a flow run; expected to be called by a flow.")
    return str(flow_run.client.api_url), has_lasting_server()


def _server_here(address: str, is_lasting: bool) -> tuple[str, bool]:
    """What this worker calls the flow's server, and whether the worker's own settings say so."""
    own = get_current_settings().api.url
    return (own, True) if own and is_lasting else (address, False)


def _drop(log: dict[str, Any]) -> None:
    """Takes a log that no server is to have; it stands in the worker's own."""


def _obstacle(terms: WorkerRequirements, server: tuple[str, bool]) -> str:
    """What keeps this worker from running stages of the run, empty if nothing."""
    address, _ = _server_here(*server)
    try:
        httpx.get(f"{address.rstrip('/')}/health", timeout=CONNECT_S)
    except httpx.TransportError as error:
        return (
            f"cannot reach the Prefect server at {address}: {error}. Set PREFECT_API_URL, for the worker or for the "
            "flow, to an address at which the worker finds it."
        )
    return worker_mismatch(terms)


@cache
def _meet(terms: WorkerRequirements) -> None:
    problem = worker_mismatch(terms)
    if problem:
        raise UsageError(f"Dask worker {distributed.get_worker().address} {problem}")


def _connect(stages: DaskStages) -> None:
    address = stages.address or ""
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _shake_hands(address)).result()
        client = stages.client
    # What listens there may be anything, and answer anything.
    except Exception as error:
        raise UsageError(
            f"No Dask scheduler answers at runner.address {address}: {str(error) or type(error).__name__}. Expected "
            "the address that `dask scheduler` prints. Start one, with `make dask` here, or correct the address."
        ) from error
    try:
        client.wait_for_workers(1, timeout=WITHOUT_WORKERS_S)
    except TimeoutError as error:
        raise _gone(stages, f"has had no worker for {WITHOUT_WORKERS_S:.0f} s") from error
    problems = client.run(_obstacle, stages._terms, _server_of_flow(), on_error="return")
    for worker, problem in sorted(problems.items()):
        if problem:
            is_answer = isinstance(problem, str)
            told = problem if is_answer else f"cannot be asked: {problem!r}. Install this project on it."
            raise UsageError(f"Dask worker {worker} {told}")
    threads = client.nthreads()
    get_run_logger().info("Mapped stages run on %d workers of the Dask cluster at %s", len(threads), address)
    if max(threads.values()) > 1:
        get_run_logger().warning(
            "Dask workers at %s have up to %d threads; expected 1, for each stage uses engine.threads threads. Start "
            "them with --nthreads 1.",
            address,
            max(threads.values()),
        )


async def _shake_hands(address: str) -> None:
    """Connects once, and not longer than `CONNECT_S`: a client waits for ever for a listener that says nothing."""
    arguments = distributed.Security().get_connection_args("client")
    connecting = distributed.comm.connect(address, timeout=CONNECT_S / 2, **arguments)
    (await asyncio.wait_for(connecting, CONNECT_S)).abort()


def _gone(stages: DaskStages, what: str) -> PtqError:
    return PtqError(
        f"The Dask cluster at runner.address {stages.address} {what}. Expected a scheduler and at least one worker. "
        f"Start workers with `dask worker {stages.address} --nthreads 1` and run again: finished stages are in the "
        "store, and are found there."
    )
