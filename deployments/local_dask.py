"""A Dask cluster on this machine, to try `runner.name: dask`: what `make dask` runs until it is interrupted.

Its workers are processes with one thread each, of which every stage uses `engine.threads` cores. For several machines
start `dask scheduler` on one and `dask worker tcp://host:8786 --nthreads 1` on the others instead.
"""

import argparse
import contextlib
import signal
import threading

from ptq.extras import extra

with extra("dask", needed_by="`make dask`"):
    import distributed


def main() -> None:
    """Starts scheduler and workers, says how to use them, and waits for SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="worker processes; default: %(default)s")
    parser.add_argument("--port", type=int, default=8786, help="the scheduler's; default: %(default)s")
    parser.add_argument("--dashboard", default=":8787", help="address of Dask's dashboard; default: %(default)s")
    options = parser.parse_args()
    # A worker that is killed is started again.
    with distributed.LocalCluster(
        n_workers=options.workers,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        scheduler_port=options.port,
        dashboard_address=options.dashboard,
    ) as cluster:
        print(  # noqa: T201 - what a person at a terminal waits for
            f"{options.workers} Dask workers at {cluster.scheduler_address}. In the config of a run:\n\n"
            f"runner:\n  name: dask\n  address: {cluster.scheduler_address}\n\nCtrl-C ends them.",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
