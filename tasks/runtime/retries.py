"""Which failures are worth another attempt?

Transport faults are; the project's own errors never are, for they say what a person has to change.
"""

from typing import Any

from ptq.errors import PtqError

_TRANSPORT = (ConnectionError, TimeoutError)


def is_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Whether a failed task run should be retried: Prefect's `retry_condition_fn`."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, _TRANSPORT) and not isinstance(error, PtqError)
