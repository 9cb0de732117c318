"""What does a Prefect server need before it can run this project's flows?

Creates the work pool, every deployment of prefect.yaml and the automations on the server that PREFECT_API_URL names.
Repeating it changes nothing but what has changed in the files. `python -m deployments.bootstrap` runs it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Cancelling
from prefect.workers.process import ProcessWorker

from deployments.automations import set_up_automations
from deployments.server_calls import POOL
from ptq.config import DEFAULT_STORE

WATCHER = "watch-checkpoints/watch-checkpoints"
# The automations take up a run that has crashed.
_GOING_ON = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CRASHED]
ROOT = Path(os.environ.get("PTQ_HOME") or Path(__file__).parents[1])


def create_work_pool() -> None:
    """Create the work pool for processes, unless it is there."""
    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        except ObjectAlreadyExists:
            return


def deploy_all(root: Path = ROOT) -> None:
    """Deploy every entry of prefect.yaml.

    Args:
        root: folder of prefect.yaml, in which workers will run the flows.

    Raises:
        SystemExit: one of them could not be deployed; Prefect has said why.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    defaults = {"PTQ_WATCHED": "checkpoints", "PTQ_STORE": DEFAULT_STORE}
    server = get_current_settings().to_environment_variables(exclude_unset=True)
    environment = {**defaults, **os.environ, **server, "PTQ_HOME": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"prefect deploy ended with status {done.returncode}; what it found wrong stands above.")


def queue_limits(content: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns the limit of each work queue of prefect.yaml that one deployment alone uses: that deployment's.

    >>> checkpoints = {"work_pool": {"name": POOL, "work_queue_name": "checkpoints"}, "concurrency_limit": 2}
    >>> gpu = {"work_pool": {"name": POOL, "work_queue_name": "gpu"}, "concurrency_limit": {"limit": 1}}
    >>> free = {"work_pool": {"name": POOL, "work_queue_name": "free"}}
    >>> elsewhere = {"work_pool": {"name": "cluster", "work_queue_name": "checkpoints"}}
    >>> queue_limits({"deployments": [checkpoints, gpu, gpu, free, elsewhere, {}]})
    {'checkpoints': 2, 'free': None}
    """
    limits: dict[str, list[int | None]] = {}
    for deployment in content["deployments"]:
        pool, limit = deployment.get("work_pool") or {}, deployment.get("concurrency_limit")
        queue = pool.get("work_queue_name")
        if queue and pool.get("name") == POOL:
            limits.setdefault(queue, []).append(limit.get("limit") if isinstance(limit, Mapping) else limit)
    return {queue: found[0] for queue, found in limits.items() if len(found) == 1}


def limit_queues(root: Path = ROOT) -> None:
    """Give each work queue of prefect.yaml its limit.

    The limit of a deployment alone would do, but every run that it turns away asks again and again.
    """
    with get_client(sync_client=True) as client:
        for name, limit in queue_limits(yaml.safe_load((root / "prefect.yaml").read_text())).items():
            queue = client.read_work_queue_by_name(name, work_pool_name=POOL)
            client.update_work_queue(queue.id, concurrency_limit=limit)


def end_other_watches() -> None:
    """End the runs that watch another prefix than the deployment does by now, or remember it in another store."""
    with get_client(sync_client=True) as client:
        current = client.read_deployment_by_name(WATCHER).parameters
        message = f"{current['prefix']} is watched now."
        for run in list(_watches(client)):
            if all(run.parameters.get(name) == current[name] for name in ("prefix", "store")):
                continue
            if run.state_type == StateType.SCHEDULED:
                client.delete_flow_run(run.id)
            elif run.state_type == StateType.CRASHED:
                client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
            else:
                # Its worker ends the process and tells when it has.
                client.set_flow_run_state(run.id, Cancelling(message=message))


def _watches(client: SyncPrefectClient) -> Iterator[FlowRun]:
    """The runs of the watch that go on or may, page by page: those that no worker takes pile up."""
    deployment = DeploymentFilter(name=DeploymentFilterName(any_=[WATCHER.split("/")[1]]))
    going_on = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_GOING_ON)))
    found = 0
    while page := client.read_flow_runs(
        flow_run_filter=going_on, deployment_filter=deployment, sort=FlowRunSort.ID_DESC, limit=200, offset=found
    ):
        yield from page
        found += len(page)


def main() -> None:
    """Set up the server in use."""
    create_work_pool()
    deploy_all()
    limit_queues()
    set_up_automations()
    end_other_watches()
    # Its schedule alone would leave the folder unwatched for up to five minutes.
    run_deployment(WATCHER, timeout=0)
    typer.echo(f"The server has the work pool {POOL}, the deployments of {ROOT / 'prefect.yaml'} and the automations.")


if __name__ == "__main__":
    main()
