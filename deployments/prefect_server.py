"""How does Prefect's server run on SQLite without standing still for a minute?

A cursor that belongs to a reference cycle is closed by whichever thread runs Python's garbage collector. Closing waits
for the cursor's connection, and that connection may itself wait, for up to the 60 s of Prefect's `busy_timeout`, for a
lock that another one holds. Where the collector ran on the thread of the server's event loop, the one that holds the
lock waits for the loop, the loop for the cursor: nothing is answered until the 60 s are over. Some ten runs created at
once are enough for it.

So nothing is collected on that thread: a thread of its own does it, and may wait without keeping anybody.
"""

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


def _collect() -> None:
    for number in range(1, 1 << 62):
        time.sleep(_PAUSE_S)
        gc.collect(2 if number % _WHOLE_EVERY == 0 else 1)


if __name__ == "__main__":
    collect_elsewhere()
    from prefect.cli import app

    # The rest of the command line is that of `prefect`: server start --host 127.0.0.1
    app()
