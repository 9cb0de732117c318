"""Stages that evaluate a model on the engine and choose the best candidate."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect.logging import get_run_logger

from ptq.config import Dialect, EngineConfig, Normalization, Precision
from ptq.engines import open_engine
from ptq.evaluation.evaluate import Evaluation, evaluate_graph, split_images_from_files
from ptq.evaluation.predictions import tables_from_parquet
from ptq.evaluation.selection import compared_images, rank_candidates, select
from ptq.files import arrays_from_npz
from ptq.graph.candidate import write_candidate
from ptq.quantization.prepared import plan_from_file
from ptq.records.base import ArtifactRef
from ptq.records.calibration import AmaxRecord
from ptq.records.data import PreparedImages
from ptq.records.evaluation import EvaluationRecord, Selection
from ptq.records.graph import EngineIdentity
from ptq.records.plan import ModelRecord
from ptq.storage.store import Store, open_store
from tasks.runtime.progress import progress_logger
from tasks.runtime.stage import RunContext, stage


@stage(returns=EvaluationRecord, timeout_seconds=4 * 3600, machine="shared")
def evaluate_baseline(
    fp32_onnx: ArtifactRef,
    splits: Mapping[str, PreparedImages],
    normalization: Normalization,
    *,
    engine: EngineConfig,
    identity: EngineIdentity,
    run: RunContext,
) -> EvaluationRecord:
    """Evaluate FP32 on the engine."""
    store = open_store(run.store_uri)
    graph = store.get_path(fp32_onnx)
    found = _evaluate(store, graph, "fp32", splits, normalization, engine, identity, None, what="FP32 images")
    return _record(store, found, candidate="fp32", amax=None)


@stage(
    returns=EvaluationRecord,
    timeout_seconds=None,
    run_name="evaluate-{amax.method}-{amax.trial}",
    machine="shared",
)
def evaluate(
    model: ModelRecord,
    template: ArtifactRef,
    amax: AmaxRecord,
    baseline: EvaluationRecord,
    splits: Mapping[str, PreparedImages],
    normalization: Normalization,
    *,
    engine: EngineConfig,
    identity: EngineIdentity,
    dialect: Dialect,
    run: RunContext,
) -> EvaluationRecord:
    """Evaluate the INT8 graph of one amax table on the engine."""
    store = open_store(run.store_uri)
    reference = store.get_path(baseline.logits)
    with tempfile.TemporaryDirectory() as directory:
        graph = Path(directory) / "candidate.onnx"
        write_candidate(
            store.get_path(template),
            graph,
            plan=plan_from_file(store.get_path(model.plan)),
            dialect=dialect,
            activation_amax=json.loads(store.get_bytes(amax.table)),
            biases=arrays_from_npz(store.get_path(amax.biases)) if amax.biases else None,
            metadata={},
        )
        what = f"{amax.method}-{amax.trial} images"
        found = _evaluate(store, graph, "int8", splits, normalization, engine, identity, reference, what=what)
    for metrics in found.splits:
        get_run_logger().info(
            "%s-%d on %s: top-1 %.2f %%, agreement with FP32 %.2f %%, SQNR %.1f dB",
            amax.method, amax.trial, metrics.split, metrics.top1_percent, metrics.agreement_percent, metrics.sqnr_db,
        )  # fmt: skip
    return _record(store, found, candidate=f"{amax.method}-{amax.trial}", amax=amax)


@stage(returns=EvaluationRecord, timeout_seconds=4 * 3600, machine="shared")
def evaluate_published(
    onnx: ArtifactRef,
    baseline: EvaluationRecord,
    splits: Mapping[str, PreparedImages],
    normalization: Normalization,
    *,
    engine: EngineConfig,
    identity: EngineIdentity,
    run: RunContext,
) -> EvaluationRecord:
    """Evaluate the graph of the version in service on today's images and engine."""
    store = open_store(run.store_uri)
    reference = store.get_path(baseline.logits)
    found = _evaluate(
        store,
        store.get_path(onnx),
        "int8",
        splits,
        normalization,
        engine,
        identity,
        reference,
        what="Images in service",
    )
    return _record(store, found, candidate="in service", amax=None)


def _evaluate(
    store: Store,
    graph: Path,
    precision: Precision,
    splits: Mapping[str, PreparedImages],
    normalization: Normalization,
    engine: EngineConfig,
    identity: EngineIdentity,
    reference: Path | None,
    *,
    what: str,
) -> Evaluation:
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
        engine=open_engine(identity.name, threads=engine.threads),
        precision=precision,
        batch_size=engine.evaluation_batch_size,
        float_remainder=engine.float_remainder,
        splits=images,
        mean=normalization.mean,
        std=normalization.std,
        reference_logits=arrays_from_npz(reference) if reference else None,
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


@stage(returns=Selection, timeout_seconds=600)
def select_candidate(
    candidates: Sequence[EvaluationRecord],
    tables: Sequence[AmaxRecord],
    baseline: EvaluationRecord,
    *,
    selection_split: str,
    test_split: str,
    run: RunContext,
) -> Selection:
    """Choose the best candidate on the selection split and compare it with FP32 on the test split."""
    store = open_store(run.store_uri)
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
