"""What does a Prefect server need before it can run this project's flows?

Creates the work pool, every deployment of prefect.yaml and the automations on the server that PREFECT_API_URL names.
Repeating it changes nothing but what has changed in the files. `python -m deployments.bootstrap` runs it.
"""

import os
import subprocess
import sys
from pathlib import Path

import typer
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from deployments.automations import set_up_automations
from deployments.server_calls import POOL

WATCHER = "watch-checkpoints/watch-checkpoints"
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
    defaults = {"PTQ_WATCHED": "checkpoints", "PTQ_STORE": "file://.ptq/store"}
    server = get_current_settings().to_environment_variables(exclude_unset=True)
    environment = {**defaults, **os.environ, **server, "PTQ_HOME": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"prefect deploy ended with status {done.returncode}; what it found wrong stands above.")


def main() -> None:
    """Set up the server in use."""
    create_work_pool()
    deploy_all()
    set_up_automations()
    # Its schedule alone would leave the folder unwatched for up to five minutes.
    run_deployment(WATCHER, timeout=0)
    typer.echo(f"The server has the work pool {POOL}, the deployments of {ROOT / 'prefect.yaml'} and the automations.")


if __name__ == "__main__":
    main()
