"""Stages that tell whether the engine computes what the INT8 file says, here and under other instruction sets."""

import json
from collections.abc import Mapping

import numpy as np
from prefect.logging import get_run_logger

from ptq.data.images import network_input
from ptq.data.sampling import evenly_spaced
from ptq.engines import open_engine
from ptq.evaluation.evaluate import split_images_from_files
from ptq.evaluation.instruction_sets import evaluate_under_isas
from ptq.evaluation.parity import IMAGES, measure_parity
from ptq.files import arrays_from_npz
from ptq.graph.against_plan import Decisions, difference_in_file
from ptq.quantization.prepared import plan_from_file
from ptq.records.calibration import AmaxRecord
from ptq.records.data import PreparedImages
from ptq.records.evaluation import EvaluationRecord, IsaEvaluations
from ptq.records.graph import GraphRecord
from ptq.records.parity import ParityRecord
from ptq.records.plan import ModelRecord
from tasks.runtime.context import RunContext
from tasks.runtime.progress import progress_logger
from tasks.runtime.stage import stage


@stage(
    returns=ParityRecord,
    timeout_seconds=4 * 3600,
    uses=(
        "config.engine.evaluation_batch_size",
        "config.engine.float_remainder",
        "config.quantization.weight_method",
        "identity",
        "normalization",
        "selection_split",
        "threads",
    ),
    machine="shared",
)
def compare_with_file(
    graph: GraphRecord,
    model: ModelRecord,
    amax: AmaxRecord,
    evaluation: EvaluationRecord,
    baseline: EvaluationRecord,
    splits: Mapping[str, PreparedImages],
    *,
    run: RunContext,
) -> ParityRecord:
    """Hold the INT8 file against what was decided, and the engine against the file, on the selection split."""
    store, split = run.store, run.selection_split
    pixels = np.load(store.get_path(splits[split].pixels), mmap_mode="r", allow_pickle=False)
    # A split is in the order of the data: class after class.
    chosen = evenly_spaced(range(len(pixels)), count=IMAGES)
    fp32, int8 = (arrays_from_npz(store.get_path(each.logits))[split][chosen] for each in (baseline, evaluation))
    decided = Decisions(
        plan=plan_from_file(store.get_path(model.plan)),
        dialect=graph.dialect,
        amax=json.loads(store.get_bytes(amax.table)),
        biases=arrays_from_npz(store.get_path(amax.biases)) if amax.biases else {},
        weight_method="max" if amax.is_trained else run.config.quantization.weight_method,
        trained=amax.is_trained,
    )
    found = measure_parity(
        store.get_path(graph.onnx),
        network_input(pixels[chosen], mean=run.normalization.mean, std=run.normalization.std),
        fp32_logits=fp32,
        engine_logits=int8,
        engine=open_engine(run.identity.name, threads=run.threads),
        threads=run.threads,
        batch_size=min(run.config.engine.evaluation_batch_size, len(chosen)),
        float_remainder=run.config.engine.float_remainder,
        difference=difference_in_file(store.get_path(graph.onnx), store.get_path(model.fp32_onnx), decided),
    )
    log = get_run_logger().info if found.parting is None else get_run_logger().warning
    log("SQNR on the engine %.1f dB, of the file in float %.1f dB", found.engine.sqnr_db, found.file.sqnr_db)
    return found


@stage(
    returns=IsaEvaluations,
    timeout_seconds=24 * 3600,
    uses=(
        "config.data.test_split",
        "config.engine.evaluation_batch_size",
        "config.engine.float_remainder",
        "config.gate.isas",
        "identity",
        "normalization",
        "threads",
    ),
    machine="shared",
)
def evaluate_each_isa(
    graph: GraphRecord, baseline: EvaluationRecord, splits: Mapping[str, PreparedImages], *, run: RunContext
) -> IsaEvaluations:
    """Evaluate the INT8 graph under each instruction set of the gate, on the test split."""
    store, split = run.store, run.config.data.test_split
    images = split_images_from_files(
        split,
        pixels=store.get_path(splits[split].pixels),
        labels=store.get_path(splits[split].labels),
        files=store.get_path(splits[split].sha256_of_files),
    )
    found = evaluate_under_isas(
        store.get_path(graph.onnx),
        run.config.gate.isas,
        images,
        precision="int8",
        batch_size=run.config.engine.evaluation_batch_size,
        threads=run.threads,
        float_remainder=run.config.engine.float_remainder,
        mean=run.normalization.mean,
        std=run.normalization.std,
        reference_logits=arrays_from_npz(store.get_path(baseline.logits))[split],
        progress=progress_logger("instruction sets"),
    )
    for each in found:
        get_run_logger().info(
            "%s: top-1 %.2f %%, SQNR %.1f dB, median %.2f ms at batch 1",
            each.isa,
            each.metrics.top1_percent,
            each.metrics.sqnr_db,
            each.median_ms,
        )
    return IsaEvaluations(found)
