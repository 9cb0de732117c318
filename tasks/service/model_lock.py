"""Who may quantize a model at the moment?"""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectAlreadyExists
from prefect.logging import get_run_logger

from ptq.records.base import digest
from tasks.runtime.progress import has_lasting_server

# Renewed while a run holds it; a run that is killed gives its turn back after so long.
_LEASE_S = 120.0
# As long as a run may take that another one waits for.
_LONGEST_WAIT_S = 24 * 3600.0
# The turns that this run has: the main flow waits for none that the flow around it took.
_HELD: ContextVar[frozenset[str]] = ContextVar("turns", default=frozenset())


@contextlib.contextmanager
def model_lock(model: str, store: str) -> Iterator[float]:
    """Waits until no other run quantizes this model for this store, on whatever machine, and keeps others waiting.

    Yields the seconds waited.

    Without a server that stays there is nobody to ask, and nobody waits.
    """
    limit = f"ptq-model-{model}-{digest(store)[:8]}"
    if not has_lasting_server() or limit in _HELD.get():
        yield 0.0
        return
    begun = time.monotonic()
    with get_client(sync_client=True) as client:
        with contextlib.suppress(ObjectAlreadyExists):  # another run was as fast
            client.upsert_global_concurrency_limit_by_name(limit, 1)
        is_taken = client.read_global_concurrency_limit_by_name(limit).active_slots > 0
    if is_taken and FlowRunContext.get():
        get_run_logger().info("Another run quantizes %s; waiting for it", model)
    # A server that is away for a minute costs the run its turn, not its life: whatever it stores stays whole.
    with concurrency(
        limit,
        occupy=1,
        strict=True,
        raise_on_lease_renewal_failure=False,
        lease_duration=_LEASE_S,
        timeout_seconds=_LONGEST_WAIT_S,
    ):
        token = _HELD.set(_HELD.get() | {limit})
        try:
            yield time.monotonic() - begun
        finally:
            _HELD.reset(token)
