"""The commands that announce new checkpoints: watch, receive."""

from typing import Annotated, Any

import typer

from flows.cli_options import Json, StoreUri
from flows.cli_output import FAILED, fail, print_json, run_flow
from ptq.config import DEFAULT_STORE
from ptq.extras import extra

_UNTIL_INTERRUPTED_S = 365 * 86_400.0


def watch(
    prefix: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix with one folder for each model.")],
    store: StoreUri = DEFAULT_STORE,
    once: Annotated[bool, typer.Option("--once", help="One look, and the wait until what it saw has settled.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
    settle: Annotated[float, typer.Option(min=0.0, help="Seconds for which nobody must have written to a file.")] = 5.0,
    stalled_after: Annotated[
        float, typer.Option(min=0.0, help="Seconds after which a file whose end is missing is announced as it is.")
    ] = 600.0,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Announce nothing of what lies there at the very first watch.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Announce each new checkpoint to the Prefect server once, until interrupted."""
    _check_server()
    from flows.watch_checkpoints import watch_checkpoints

    options: dict[str, Any] = {
        "watch_for_s": 0 if once else _UNTIL_INTERRUPTED_S, "interval_s": interval, "settle_s": settle,
        "stalled_after_s": stalled_after, "skip_existing": skip_existing,
    }  # fmt: skip
    try:
        if as_json:
            print_json({"announced": run_flow(watch_checkpoints, prefix=prefix, store=store, **options)})
        else:
            watch_checkpoints(prefix, store, **options)
    except ConnectionError as error:
        fail(str(error), FAILED)


def receive(
    prefix: Annotated[str, typer.Option(help="s3://bucket/prefix with one folder for each model.")],
    store: StoreUri = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 4201,
) -> None:
    """Take a bucket's notifications over HTTP, with the token of PTQ_RECEIVER_TOKEN, and announce new checkpoints."""
    with extra("server", needed_by="`ptq receive`"):
        from flows.receiver import receive

    receive(prefix, store, host=host, port=port)


def _check_server() -> None:
    """Makes sure that there is a Prefect server that stays, before a flow starts one that does not."""
    from tasks.service.announcements import check_server

    try:
        check_server()
    except ConnectionError as error:
        fail(str(error), FAILED)
