"""Where do the stages run that a flow maps?

On a thread of its own machine, unless `spread_stages` sends them to the workers of a Dask cluster. Stages that a flow
calls stay where the flow is. What a cluster is asked stands in `tasks.runtime.dask_runner`.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from prefect import Task
from prefect.client.schemas.objects import RunInput
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, PrefectFutureList
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from ptq.config import PtqConfig
from ptq.extras import extra
from ptq.records.graph import EngineIdentity
from tasks.runtime.worker_check import worker_requirements


class StageRunner(TaskRunner[PrefectFuture[Any]]):
    """Runs mapped stages on threads of this machine until it is given another runner.

    Args:
        threads: stages that run at the same time on this machine.
    """

    def __init__(self, *, threads: int) -> None:
        super().__init__()
        self._threads = threads
        self._started_runners = ExitStack()
        self._runner: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=threads)

    def duplicate(self) -> "StageRunner":
        """Returns a runner with as many threads, as yet on this machine."""
        return StageRunner(threads=self._threads)

    def use_(self, runner: TaskRunner[Any]) -> None:
        """Starts a runner that takes what is mapped from here on, until this one ends."""
        self._runner = self._started_runners.enter_context(runner)

    def submit(
        self,
        task: Task[..., Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> PrefectFuture[Any]:
        """Starts a stage and returns its future."""
        return self._runner.submit(task, parameters, wait_for, dependencies)

    def map(
        self, task: Task[..., Any], parameters: dict[str, Any], wait_for: Iterable[PrefectFuture[Any]] | None = None
    ) -> PrefectFutureList[Any]:
        """Starts a stage for each set of parameters and returns their futures."""
        return self._runner.map(task, parameters, wait_for)

    def __enter__(self) -> "StageRunner":
        super().__enter__()
        self._started_runners.enter_context(self._runner)
        return self

    def __exit__(self, *details: Any) -> None:
        self._started_runners.__exit__(*details)
        super().__exit__(*details)


def spread_stages(config: PtqConfig, engine: EngineIdentity) -> None:
    """Sends what the running flow maps from here on to the Dask cluster of the config; with threads it stays here.

    Args:
        config: of the run, whose section `runner` names the cluster.
        engine: the engine of the flow's machine, which workers must have as well.

    Raises:
        UsageError: the cluster cannot be reached within a minute, has no worker, or a worker differs from this machine.
        PtqError: the store cannot be written.
        TypeError: the running flow has another task runner than a `StageRunner`.
    """
    if config.runner.name != "dask":
        return
    # Imported here: distributed takes half a second, which runs on threads need not wait for.
    with extra("dask", needed_by="`runner.name: dask`"):
        from tasks.runtime.dask_runner import DaskStages

    context = FlowRunContext.get()
    runner = context.task_runner if context else None
    if not isinstance(runner, StageRunner):
        raise TypeError(f"The task runner is {type(runner).__name__}; expected a flow with a StageRunner.")
    terms = worker_requirements(engine, threads=config.engine.threads, store_uri=config.output.store)
    runner.use_(DaskStages(config.runner.address, terms))
