"""Stages that evaluate a model on the engine and choose the best candidate."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from prefect.logging import get_run_logger

from ptq.engines import open_engine
from ptq.evaluation.evaluate import Evaluation, evaluate_graph, split_images_from_files
from ptq.evaluation.fp32_accuracy import fp32_warning
from ptq.evaluation.predictions import tables_from_parquet
from ptq.evaluation.selection import compared_images, rank_candidates, select
from ptq.files import arrays_from_npz
from ptq.graph.candidate import write_candidate
from ptq.quantization.prepared import plan_from_file
from ptq.records.base import ArtifactRef
from ptq.records.calibration import AmaxRecord
from ptq.records.data import PreparedImages
from ptq.records.evaluation import EvaluationRecord, Selection
from ptq.records.plan import ModelRecord
from ptq.storage.store import Store
from tasks.runtime.context import RunContext
from tasks.runtime.progress import progress_logger, say
from tasks.runtime.stage import stage

# How a graph is evaluated, whichever it is.
_USED = ("config.engine.evaluation_batch_size", "identity", "normalization", "threads")


@stage(returns=EvaluationRecord, timeout_seconds=4 * 3600, uses=_USED, machine="shared")
def evaluate_baseline(
    fp32_onnx: ArtifactRef, splits: Mapping[str, PreparedImages], *, run: RunContext
) -> EvaluationRecord:
    """Evaluate FP32 on the engine."""
    found = _evaluate(run.store.get_path(fp32_onnx), "fp32", splits, None, run, what="FP32 images")
    return _record(run.store, found, candidate="fp32", amax=None)


def check_fp32_accuracy(
    baseline: EvaluationRecord, model: ModelRecord, stated_percent: float | None, run: RunContext
) -> None:
    """Warns where FP32 is as good as guessing, or far below what is stated for these weights on ImageNet."""
    split = baseline.on(run.config.data.test_split)
    warning = fp32_warning(split, classes=model.num_classes, stated_percent=stated_percent)
    if warning:
        say(warning, level=logging.WARNING)


@stage(
    returns=EvaluationRecord,
    timeout_seconds=None,
    uses=(*_USED, "config.engine.float_remainder", "dialect"),
    run_name="evaluate-{amax.method}-{amax.trial}",
    machine="shared",
)
def evaluate(
    model: ModelRecord,
    template: ArtifactRef,
    amax: AmaxRecord,
    baseline: EvaluationRecord,
    splits: Mapping[str, PreparedImages],
    *,
    run: RunContext,
) -> EvaluationRecord:
    """Evaluate the INT8 graph of one amax table on the engine."""
    store = run.store
    with tempfile.TemporaryDirectory() as directory:
        graph = Path(directory) / "candidate.onnx"
        write_candidate(
            store.get_path(template),
            graph,
            plan=plan_from_file(store.get_path(model.plan)),
            dialect=run.dialect,
            activation_amax=json.loads(store.get_bytes(amax.table)),
            biases=arrays_from_npz(store.get_path(amax.biases)) if amax.biases else None,
            metadata={},
        )
        found = _evaluate(graph, "int8", splits, baseline, run, what=f"{amax.method}-{amax.trial} images")
    for metrics in found.splits:
        get_run_logger().info(
            "%s-%d on %s: top-1 %.2f %%, agreement with FP32 %.2f %%, SQNR %.1f dB",
            amax.method,
            amax.trial,
            metrics.split,
            metrics.top1_percent,
            metrics.agreement_percent,
            metrics.sqnr_db,
        )
    return _record(store, found, candidate=f"{amax.method}-{amax.trial}", amax=amax)


@stage(
    returns=EvaluationRecord,
    timeout_seconds=4 * 3600,
    uses=(*_USED, "config.engine.float_remainder"),
    machine="shared",
)
def evaluate_published(
    onnx: ArtifactRef, baseline: EvaluationRecord, splits: Mapping[str, PreparedImages], *, run: RunContext
) -> EvaluationRecord:
    """Evaluate the graph of the version in service on today's images and engine."""
    found = _evaluate(run.store.get_path(onnx), "int8", splits, baseline, run, what="Images in service")
    return _record(run.store, found, candidate="in service", amax=None)


def _evaluate(
    graph: Path,
    precision: Literal["fp32", "int8"],
    splits: Mapping[str, PreparedImages],
    baseline: EvaluationRecord | None,
    run: RunContext,
    *,
    what: str,
) -> Evaluation:
    store = run.store
    images = [
        split_images_from_files(
            split,
            pixels=store.get_path(prepared.pixels),
            labels=store.get_path(prepared.labels),
            files=store.get_path(prepared.sha256_of_files),
        )
        for split, prepared in splits.items()
    ]
    return evaluate_graph(
        graph,
        engine=open_engine(run.identity.name, threads=run.threads),
        precision=precision,
        batch_size=run.config.engine.evaluation_batch_size,
        # It means something to an INT8 graph alone.
        float_remainder=run.config.engine.float_remainder if precision == "int8" else "fp32",
        splits=images,
        mean=run.normalization.mean,
        std=run.normalization.std,
        reference_logits=arrays_from_npz(store.get_path(baseline.logits)) if baseline else None,
        progress=progress_logger(what),
    )


def _record(store: Store, found: Evaluation, *, candidate: str, amax: AmaxRecord | None) -> EvaluationRecord:
    return EvaluationRecord(
        candidate=candidate,
        trial=amax.trial if amax else None,
        method=amax.method if amax else None,
        splits=found.splits,
        predictions=store.put_bytes(found.predictions, "predictions.parquet"),
        logits=store.put_bytes(found.logits, "logits.npz"),
    )


@stage(returns=Selection, timeout_seconds=600, uses=("config.data.test_split", "selection_split"))
def select_candidate(
    candidates: Sequence[EvaluationRecord],
    tables: Sequence[AmaxRecord],
    baseline: EvaluationRecord,
    *,
    run: RunContext,
) -> Selection:
    """Choose the best candidate on the selection split and compare it with FP32 on the test split."""
    store, selection_split, test_split = run.store, run.selection_split, run.config.data.test_split
    best = rank_candidates(candidates, selection_split=selection_split)[0]
    images = compared_images(
        tables_from_parquet(store.get_path(baseline.predictions)),
        tables_from_parquet(store.get_path(best.predictions)),
        split=test_split,
    )
    chosen = select(
        candidates=candidates,
        tables=tables,
        test_images=images,
        selection_split=selection_split,
        test_split=test_split,
        is_selection_on_test=selection_split == test_split,
    )
    get_run_logger().info("%s %s", chosen.reason, chosen.spread_sentence)
    return chosen
