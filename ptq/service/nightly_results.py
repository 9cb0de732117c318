"""How did a model do, night after night?

One record a night, kept in the store beside the others and never overwritten. A night is told from what its run has
stored: nothing is measured here, and nothing is drawn; see `history_page.py`.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from ptq.records.base import record_from_json, to_jsonable
from ptq.records.benchmark import BenchmarkRecord
from ptq.records.decision import RunDecision, RunResult
from ptq.records.verdict import Verdict
from ptq.storage.store import Store
from ptq.wording import engine_text

logger = logging.getLogger(__name__)

# Nights that a page shows.
NIGHTS_SHOWN = 90
NightDecision = Literal[RunDecision, "failed"]

_KIND = "nights"
# Where the records of the stages that decode images hold how many.
_DECODED = {"prepare_split": ("images",), "draw_calibration_images": ("prepared", "images")}


@dataclass(frozen=True, slots=True)
class NightLatency:
    """Median latency of one batch in milliseconds; None where the precision was not measured."""

    batch_size: int
    int8_ms: float | None
    fp32_ms: float | None


@dataclass(frozen=True, slots=True)
class NightFindings:
    """What a night that came to a verdict found, on the test split.

    `engine` and `machine` are those on which the latencies were measured: where they differ, latencies cannot be
    compared.
    """

    version: str
    is_new: bool
    fp32_top1_percent: float
    top1_percent: float
    drop_pp: float
    drop_interval_pp: tuple[float, float]
    test_images: int
    latencies: tuple[NightLatency, ...]
    engine: str
    machine: str


@dataclass(frozen=True, slots=True)
class Night:
    """One night of one model.

    `started_at` is UTC in ISO format, `reason` says why nothing was published, empty where the model was accepted.
    `seconds` is the wall time of the whole run, where it did not fail without the wait for its model's turn.
    `images_decoded` counts those of finished stages that were not in the store. `found` is None where the run failed.
    """

    started_at: str
    model: str
    run_id: str
    decision: NightDecision
    reason: str
    seconds: float
    stages: int
    cached_stages: int
    images_decoded: int
    found: NightFindings | None = None


def night_of_run(
    store: Store,
    model: str,
    *,
    run_id: str,
    started_at: datetime,
    seconds: float,
    result: RunResult | None,
    error: str = "",
) -> Night:
    """Returns the night that a run makes.

    Args:
        store: where the run kept its artifacts.
        model: name under which the model is published.
        run_id: the run's name.
        started_at: when it started, with its time zone.
        seconds: how long it took.
        result: what it returned; None: it failed.
        error: what it failed with; the first line is kept.
    """
    notes = store.run_stages(run_id)
    return Night(
        started_at=started_at.astimezone(UTC).isoformat(timespec="seconds"),
        model=model,
        run_id=run_id,
        decision=result.decision if result else "failed",
        reason=_reason(result, error),
        seconds=round(seconds, 1),
        stages=len(notes),
        cached_stages=sum(note["cached"] for note in notes),
        images_decoded=sum(_images_decoded(store, note) for note in notes if not note["cached"]),
        found=_findings(store, result, notes) if result else None,
    )


def keep_nightly_result(store: Store, night: Night) -> None:
    """Adds a night to those of its model."""
    store.append(_KIND, night.model, to_jsonable(night))


def read_nights(store: Store, model: str, *, last: int = NIGHTS_SHOWN) -> list[Night]:
    """Returns the last nights of a model, oldest first; one that cannot be read is left out with a warning."""
    nights = []
    for document in store.appended(_KIND, model, last=last):
        try:
            nights.append(record_from_json(Night, document))
        except ValidationError as error:
            logger.warning("A night of %s in %s cannot be read: %s", model, store.uri, error)
    return nights


def _reason(result: RunResult | None, error: str) -> str:
    if result is None:
        return next(iter(error.splitlines()), "")
    return "" if result.accepted else next(iter(result.reasons), "")


def _images_decoded(store: Store, note: dict[str, Any]) -> int:
    entry = store.read_stage(note["stage"], note["key"]) if note["stage"] in _DECODED else None
    if entry is None:
        return 0
    value = entry.record
    for field in _DECODED[note["stage"]]:
        value = value[field]
    return int(value)


def _findings(store: Store, result: RunResult, notes: list[dict[str, Any]]) -> NightFindings:
    verdict = Verdict.model_validate_json(store.get_bytes(result.verdict))
    latency = {(each.precision, each.batch_size): each.latency_ms.median for each in verdict.benchmark}
    return NightFindings(
        version=result.version,
        is_new=result.is_new,
        fp32_top1_percent=verdict.fp32.top1_percent,
        top1_percent=result.top1_percent,
        drop_pp=result.drop_pp,
        drop_interval_pp=verdict.best.drop_interval_pp,
        test_images=verdict.fp32.n_images,
        latencies=tuple(
            NightLatency(size, latency.get(("int8", size)), latency.get(("fp32", size)))
            for size in sorted({size for _, size in latency})
        ),
        engine=engine_text(**verdict.engine.model_dump()),
        machine=_machine(verdict, store, notes),
    )


def _machine(verdict: Verdict, store: Store, notes: list[dict[str, Any]]) -> str:
    """Where the verdict's latencies were measured: a benchmark that was not repeated tells of the machine it ran on.

    A run that tried something before giving up has several benchmarks; the verdict's medians are those of one.
    """
    judged = [measured.latency_ms.median for measured in verdict.benchmark]
    for note in notes:
        entry = store.read_stage("benchmark", note["key"]) if note["stage"] == "benchmark" else None
        record = record_from_json(BenchmarkRecord, entry.record) if entry else None
        if record and [measured.median_ms for measured in record.measurements] == judged:
            return f"{record.machine}, threads: {record.engine.threads or 'all'}"
    return "unknown machine"
