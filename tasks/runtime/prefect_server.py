"""How does Prefect's server run on SQLite without standing still for a minute?

A cursor that belongs to a reference cycle is closed by whichever thread runs Python's garbage collector. Closing waits
for the cursor's connection, and that connection may itself wait, for up to the 60 s of Prefect's `busy_timeout`, for a
lock that another one holds. Where the collector ran on the thread of the server's event loop, the one that holds the
lock waits for the loop, the loop for the cursor: nothing is answered until the 60 s are over. Some ten runs created at
once are enough for it.

So nothing is collected on that thread: a thread of its own does it, and may wait without keeping anybody.

    python -m tasks.runtime.prefect_server server start     `prefect server start`, so
    UVICORN_LOOP=tasks.runtime.prefect_server:event_loop    a server that Prefect starts for one process, so
"""

import asyncio
import gc
import threading
import time

_PAUSE_S = 1.0
# Everything is looked through once a minute, what is young every second, as the collector itself would.
_WHOLE_EVERY = 60


def collect_elsewhere() -> None:
    """Moves garbage collection from the threads that allocate to a thread of its own, for good."""
    gc.disable()
    threading.Thread(target=_collect, name="garbage-collection", daemon=True).start()


def event_loop() -> asyncio.AbstractEventLoop:
    """Returns an event loop whose thread collects no garbage."""
    collect_elsewhere()
    return asyncio.new_event_loop()


def _collect() -> None:
    looks = 0
    while True:
        time.sleep(_PAUSE_S)
        looks += 1
        gc.collect(1 if looks % _WHOLE_EVERY else 2)


if __name__ == "__main__":
    collect_elsewhere()
    from prefect.cli import app

    app()
