"""Files in a folder or a bucket in, one event for each new checkpoint out."""

from typing import Annotated

from prefect import flow
from pydantic import Field

from ptq.config import DEFAULT_STORE
from tasks.service.watching import LONGEST_READING_S, watch_prefix


@flow(name="watch-checkpoints", flow_run_name="{prefix}")
def watch_checkpoints(
    prefix: str,
    store: str,
    watch_for_s: Annotated[float, Field(ge=0)] = 0,
    interval_s: Annotated[float, Field(gt=0)] = 10,
    settle_s: Annotated[float, Field(ge=0)] = 5,
    stalled_after_s: Annotated[float, Field(ge=0)] = 600,
    skip_existing: bool = False,
) -> int:
    """Announce each new checkpoint under a prefix once, as an event checkpoint.created; return how many there were.

    Again and again: 1. list the prefix   2. digest what nobody has written to for a while   3. claim what is new in the
    store, send its event, confirm the claim. Runs may overlap, and end at any moment.

    Args:
        prefix: folder or s3://bucket/prefix that holds one folder for each model.
        store: URI of the store that remembers what was announced.
        watch_for_s: seconds to watch; 0: one look.
        interval_s: seconds between two looks.
        settle_s: seconds for which nobody must have written to a file.
        stalled_after_s: seconds after which a file whose end is missing is announced as it is, so that its run says so.
        skip_existing: announce nothing of what lies there when the prefix is watched for the first time.
    """
    watch = watch_prefix.with_options(timeout_seconds=watch_for_s + LONGEST_READING_S)
    return watch(
        prefix,
        store,
        watch_for_s=watch_for_s,
        interval_s=interval_s,
        settle_s=settle_s,
        stalled_after_s=stalled_after_s,
        skip_existing=skip_existing,
    )


if __name__ == "__main__":
    watch_checkpoints("checkpoints", DEFAULT_STORE)
