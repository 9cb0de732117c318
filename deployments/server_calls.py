"""What does the supervisor ask of the Prefect server?

Plain HTTP, as curl would: importing Prefect takes two seconds and 150 MB that a supervisor has no use for.
"""

import json
import urllib.request
from datetime import datetime
from typing import Any

POOL = "ptq"


def is_healthy(address: str) -> bool:
    """Whether the server at this address answers."""
    return _ask(f"{address}/api/health") is True


def has_worker_since(address: str, moment: float) -> bool:
    """Whether a worker of the pool reported after `moment`, in seconds since 1970."""
    workers = _ask(f"{address}/api/work_pools/{POOL}/workers/filter", {}) or []
    heard = [datetime.fromisoformat(found["last_heartbeat_time"]) for found in workers if found["last_heartbeat_time"]]
    return any(time.timestamp() >= moment for time in heard)


def give_up_lost_runs(address: str) -> int:
    """Tell the server of the runs whose processes have ended with their worker. Call it while there is no worker.

    A run that had not begun is scheduled again. One that had is marked as crashed; the automations schedule it again
    unless it has used up its attempts. Runs that a person started outside the worker are left alone.

    Returns:
        number of runs; 0 also where the server does not answer.
    """
    wanted = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
    found = _ask(f"{address}/api/flow_runs/filter", wanted) or []
    lost = [run for run in found if run["deployment_id"] or run["parent_task_run_id"]]
    for run in lost:
        after = {"CANCELLING": "CANCELLED", "PENDING": "SCHEDULED"} if run["deployment_id"] else {}
        state = {"type": after.get(run["state_type"], "CRASHED"), "message": "Its process ended with the worker."}
        _ask(f"{address}/api/flow_runs/{run['id']}/set_state", {"state": state})
    return len(lost)


def _ask(address: str, content: object = None) -> Any:
    """What the server answers, None where it does not."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"content-type": "application/json"})
    # Without the proxies of the environment: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None
