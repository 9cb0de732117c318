"""What a nightly run leaves for people: a record of each night, and the page that shows them."""

from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger

from ptq.config import PtqConfig
from ptq.files import write_file
from ptq.records.base import digest
from ptq.records.decision import RunResult
from ptq.report.nightly_page import headline, history_html, history_markdown
from ptq.service import nightly_results
from ptq.storage.store import open_store
from tasks.runtime.progress import artifact_key


def failure_of(state: State) -> str:
    """Returns what a run failed with, in one line; empty where it has not failed."""
    if state.is_completed():
        return ""
    error = state.result(raise_on_failure=False)
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else state.message or state.name or ""
    return next(iter(text.splitlines()), "")


@task(timeout_seconds=600, cache_policy=NO_CACHE)
def keep_nightly_result(config: PtqConfig, flow_run_id: UUID, result: RunResult | None, *, error: str) -> None:
    """Note the night that a run of `quantize_model` makes, and write the page of all nights."""
    store, model = open_store(config.output.store), config.model.published_name
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run_id)
    night = nightly_results.night_of_run(
        store,
        model,
        run_id=run.name,
        started_at=run.start_time or datetime.now(UTC),
        seconds=run.total_run_time.total_seconds() - (result.waited_s if result else 0.0),
        result=result,
        error=error,
    )
    nightly_results.keep_nightly_result(store, night)
    shown = nightly_results.read_nights(store, model)
    page = history_html(shown).encode()
    store.remember("history", digest(model), page)
    path = Path(config.output.directory) / "history.html"
    write_file(path, page)
    create_markdown_artifact(
        key=artifact_key("ptq-nightly", model), markdown=history_markdown(shown), description=f"The nights of {model}"
    )
    get_run_logger().info("%s The last %d nights: %s", headline(shown), len(shown), path.absolute())
