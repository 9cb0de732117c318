"""Who is told of what a run decided?"""

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.logging import get_run_logger

from ptq.errors import PtqError, UsageError
from ptq.evaluation.gate import HEADLINES
from ptq.records.decision import RunResult


def is_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Whether telling is worth another attempt: after a fault on the way, not after an error of the project."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, PtqError)


@task(timeout_seconds=600, cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=is_transient)
def announce(result: RunResult, notify: Sequence[str]) -> None:
    """Emit `model.published` or `model.rejected`, and tell the notification blocks of a model that was rejected.

    Nothing is said of a model that was in service before, unchanged. The page of the run that called this gets the
    decision and a link to the page with the report.
    """
    link = f"\n\n[Verdict, tables, box plot and graph checks]({result.page})" if result.page else ""
    reasons = "\n".join(f"- {reason}" for reason in result.reasons)
    create_markdown_artifact(
        key="ptq-decision",
        markdown=f"**{result.sentence}**\n\n{reasons}{link}\n",
        description="Decision, and where to look",
    )
    if result.accepted and not result.is_new:
        get_run_logger().info("%s version %s is in service already", result.model, result.version)
        return
    payload = {
        "model": result.model,
        "version": result.version,
        "decision": result.decision,
        "reasons": list(result.reasons),
        "run_id": result.run_id,
        "top1_percent": result.top1_percent,
        "drop_pp": result.drop_pp,
        "report": f"{result.output_directory}/report.html",
    }
    event = "model.published" if result.accepted else "model.rejected"
    emit_event(event, resource={"prefect.resource.id": f"ptq.model.{result.model}"}, payload=payload)
    if result.accepted:
        return
    subject = f"{result.model}: {HEADLINES[result.decision]}"
    body = "\n\n".join([result.sentence, *result.reasons, f"Report: {payload['report']}"])
    for slug in notify:
        _block(slug).notify(body, subject=subject)
        get_run_logger().info("Told %s: %s", slug, subject)


def _block(slug: str) -> Any:
    """The notification block of that slug.

    Raises:
        UsageError: there is none, or it cannot notify.
    """
    try:
        block = Block.load(slug)
    except ValueError as error:
        raise UsageError(
            f"notify names the block {slug!r}, which Prefect does not have. Create it (UI, Blocks), or correct the "
            "parameter notify; expected type/name, such as slack-webhook/operations."
        ) from error
    if not hasattr(block, "notify"):
        raise UsageError(f"notify names {slug!r}, a block that cannot notify. Expected a notification block.")
    return block
