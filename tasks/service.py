"""What the flows that run by themselves need: a model's config, its turn, and someone who is told."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.exceptions import ObjectAlreadyExists
from prefect.logging import get_run_logger

from ptq.config import PtqConfig
from ptq.data.remote_inputs import Inputs
from ptq.errors import UsageError
from ptq.evaluation.gate import HEADLINES
from ptq.records.base import digest
from ptq.records.decision import RunResult
from ptq.service import model_configs
from ptq.storage.store import open_store
from tasks.progress import has_lasting_server
from tasks.retries import is_transient

# Renewed while a run holds it; a run that is killed gives its turn back after so long.
_LEASE_S = 120.0
# As long as a run may take that another one waits for.
_LONGEST_WAIT_S = 24 * 3600.0
# The turns that this run has: the main flow waits for none that the flow around it took.
_HELD: ContextVar[frozenset[str]] = ContextVar("turns", default=frozenset())


@task(timeout_seconds=60, cache_policy=NO_CACHE)
def find_models(models: str, names: Sequence[str]) -> list[str]:
    """List the models that have a config, or those of them that are named."""
    known = model_configs.model_names(Path(models))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"names has {', '.join(unknown)}, which have no config in {models}; there are configs for "
            f"{', '.join(known)}."
        )
    return list(names or known)


@task(timeout_seconds=60, cache_policy=NO_CACHE)
def load_model_config(models: str, model: str, *, checkpoint: str = "") -> PtqConfig:
    """Read the config of a model, with another checkpoint where one is given."""
    return model_configs.model_config(Path(models), model, checkpoint=checkpoint)


@task(timeout_seconds=3600, cache_policy=NO_CACHE)
def is_superseded(config: PtqConfig, sha256: str) -> bool:
    """Whether the checkpoint was replaced since the event that told of it; another event tells of the new one."""
    if not sha256:
        return False
    found = Inputs(open_store(config.output.store)).any_checkpoint_digest(config.model.checkpoint)
    if found != sha256:
        get_run_logger().warning(
            "%s now has the SHA-256 %s, not %s as when it was found: it was replaced since, and an event of its own "
            "tells of the new one",
            config.model.checkpoint, found[:12], sha256[:12],
        )  # fmt: skip
    return found != sha256


@contextlib.contextmanager
def turn_of(model: str, store: str) -> Iterator[float]:
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
        limit, occupy=1, strict=True, raise_on_lease_renewal_failure=False, lease_duration=_LEASE_S,
        timeout_seconds=_LONGEST_WAIT_S,
    ):  # fmt: skip
        token = _HELD.set(_HELD.get() | {limit})
        try:
            yield time.monotonic() - begun
        finally:
            _HELD.reset(token)


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
        "model": result.model, "version": result.version, "decision": result.decision, "reasons": list(result.reasons),
        "run_id": result.run_id, "top1_percent": result.top1_percent, "drop_pp": result.drop_pp,
        "report": f"{result.output_directory}/report.html",
    }  # fmt: skip
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
