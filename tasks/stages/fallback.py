"""Stages that try something else with a model that was rejected for its accuracy."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from prefect.logging import get_run_logger

from ptq.calibration.amax_tables import amax_table
from ptq.calibration.calibrate import statistics_from_files
from ptq.config import LabelledMethod
from ptq.evaluation import fallback
from ptq.quantization.prepared import plan_from_file
from ptq.records.base import ArtifactRef
from ptq.records.calibration import AmaxRecord, CalibrationDraws
from ptq.records.decision import Attempt, FineTuning, GateDecision, LayerRanking, MethodChoice, RunFindings
from ptq.records.plan import ModelRecord
from ptq.storage.store import Store
from tasks.runtime.context import RunContext, StageContext
from tasks.runtime.progress import progress_logger
from tasks.runtime.stage import stage

# What measures how sensitive a network is.
_MEASURED = ("config.fallback.images", "config.quantization.weight_method", "dialect", "normalization")


def is_worth_trying(findings: RunFindings, model: ModelRecord, run: RunContext) -> bool:
    """Whether anything is configured, and accuracy is all that the gate found fault with."""
    config = run.config.fallback
    is_configured = config.per_layer_method or config.float_layers or config.qat_epochs
    is_worth = bool(is_configured) and fallback.only_accuracy_failed(
        comparison=findings.selection.comparison,
        benchmark=findings.benchmark,
        graph_errors=sum(check.errors for check in findings.checks),
        parity=findings.parity,
        limits=run.config.gate,
    )
    if is_worth and model.source == "onnx":
        get_run_logger().warning(
            "What the section fallback asks for was not tried: it works on a PyTorch network, and this one is "
            "quantized by way of its ONNX export. quantization.skip_layers leaves layers in float."
        )
        return False
    return is_worth


@stage(returns=MethodChoice, timeout_seconds=24 * 3600, uses=_MEASURED, ignores=("threads",))
def choose_methods(
    model: ModelRecord, tables: Sequence[AmaxRecord], draws: CalibrationDraws, *, run: RunContext
) -> MethodChoice:
    """Choose for every quantizer, of one trial's amax tables, the method that keeps the logits closest to FP32's."""
    store = run.store
    trial = tables[0].trial
    table, choices = fallback.choose_methods(
        _files(store, model),
        tables={record.method: json.loads(store.get_bytes(record.table)) for record in tables},
        images=_images(draws, trial, run),
        dialect=run.dialect,
        weight_method=run.config.quantization.weight_method,
        threads=run.threads,
    )
    what = fallback.describe_choices(choices)
    get_run_logger().info("Trying %s", what)
    return MethodChoice(
        _amax_record(store, table, method="per_layer", trial=trial, biases=tables[0].biases), choices, what
    )


@stage(
    returns=LayerRanking,
    timeout_seconds=24 * 3600,
    uses=(*_MEASURED, "config.fallback.float_layers"),
    ignores=("threads",),
)
def rank_layers(model: ModelRecord, amax: AmaxRecord, draws: CalibrationDraws, *, run: RunContext) -> LayerRanking:
    """Rank the quantized layers by what quantizing each of them alone does to the logits."""
    store = run.store
    layers = fallback.rank_layers(
        _files(store, model),
        table=json.loads(store.get_bytes(amax.table)),
        images=_images(draws, amax.trial, run),
        dialect=run.dialect,
        weight_method=run.config.quantization.weight_method,
        threads=run.threads,
    )
    get_run_logger().info("Most sensitive of %d layers: %s, %.1f dB", len(layers), layers[0].layer, layers[0].sqnr_db)
    return LayerRanking(
        layers=layers, groups=fallback.groups_of_ranking(layers, limit=run.config.fallback.float_layers)
    )


@stage(
    returns=AmaxRecord,
    timeout_seconds=24 * 3600,
    uses=("config.calibration.bins", "dialect", "normalization"),
    ignores=("threads",),
)
def carry_amax(
    source: ModelRecord,
    target: ModelRecord,
    amax: AmaxRecord,
    draws: CalibrationDraws,
    method: LabelledMethod,
    *,
    run: RunContext,
) -> AmaxRecord:
    """Carry an amax table over to the same model with other quantizers; collect its trial again where that fails.

    `method` is the one that made the table, under the name that the carried table gets.
    """
    store = run.store
    plan = plan_from_file(store.get_path(target.plan))
    table = fallback.carried_table(
        json.loads(store.get_bytes(amax.table)), source=plan_from_file(store.get_path(source.plan)), target=plan
    )
    if table is None:
        (trial,) = statistics_from_files(
            observed_onnx=store.get_path(target.observed_onnx),
            plan=plan,
            pixels=store.get_path(draws.prepared.pixels),
            files=store.get_path(draws.prepared.sha256_of_files),
            draws=[draws.indices[amax.trial]],
            mean=run.normalization.mean,
            std=run.normalization.std,
            bins=run.config.calibration.bins,
            threads=run.threads,
            progress=progress_logger("Calibration images"),
        )
        table = amax_table(
            trial.histograms, plan=plan, dialect=run.dialect, method=method.method, percentile=method.percentile
        )
    # Corrected biases belong to the weights they were computed from.
    biases = amax.biases if source.weights == target.weights else None
    return _amax_record(store, table, method=method.label, trial=amax.trial, biases=biases)


@stage(
    returns=FineTuning,
    timeout_seconds=7 * 24 * 3600,
    uses=(
        "config.calibration.seed",
        "config.fallback.qat_epochs",
        "config.fallback.qat_learning_rate",
        "dialect",
        "normalization",
    ),
    ignores=("threads",),
)
def fine_tune(model: ModelRecord, amax: AmaxRecord, draws: CalibrationDraws, *, run: RunContext) -> FineTuning:
    """Fine-tune the fake-quantized model on the drawn images and their labels."""
    epochs, learning_rate = run.config.fallback.qat_epochs, run.config.fallback.qat_learning_rate
    store = run.store
    advance = progress_logger("QAT epochs")
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "weights_qat.safetensors"
        found = fallback.fine_tune_from_files(
            _files(store, model),
            table=json.loads(store.get_bytes(amax.table)),
            pixels=store.get_path(draws.prepared.pixels),
            labels=store.get_path(draws.prepared.labels),
            mean=run.normalization.mean,
            std=run.normalization.std,
            dialect=run.dialect,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=run.config.calibration.seed,
            threads=run.threads,
            output=output,
            progress=lambda epoch: advance(epoch, epochs),
        )
        weights = store.put_file(output)
    what = fallback.describe_fine_tuning(found, images=draws.prepared.images, learning_rate=learning_rate)
    get_run_logger().info("Trying %s", what)
    # The FP32 graph stays: the baseline is what came in, not what QAT made of it.
    tuned = dataclasses.replace(model, weights=weights, warnings=(*model.warnings, f"{what}."), is_trained=True)
    return FineTuning(model=tuned, losses=found.losses, kept_epoch=found.kept_epoch, what=what)


@stage(returns=GateDecision, timeout_seconds=60)
def summarize_attempts(
    first: GateDecision, candidate: str, attempts: Sequence[Attempt], *, run: StageContext
) -> GateDecision:
    """Say in the decision what was tried and what each attempt reached."""
    decision = fallback.summarize_attempts(first, candidate, attempts)
    log = get_run_logger().info if decision.accepted else get_run_logger().warning
    log("%s after %d attempts", "Accepted" if decision.accepted else "Rejected", len(attempts))
    return decision


def _files(store: Store, model: ModelRecord) -> fallback.ModelFiles:
    return fallback.ModelFiles(
        name=model.name,
        weights=store.get_path(model.weights),
        plan=store.get_path(model.plan),
        num_classes=model.num_classes,
        input_shape=model.input_shape,
    )


def _images(draws: CalibrationDraws, trial: int, run: RunContext) -> np.ndarray:
    return fallback.sensitivity_images(
        run.store.get_path(draws.prepared.pixels),
        draws.indices[trial],
        images=run.config.fallback.images,
        mean=run.normalization.mean,
        std=run.normalization.std,
    )


def _amax_record(
    store: Store, table: dict[str, float], *, method: str, trial: int, biases: ArtifactRef | None
) -> AmaxRecord:
    data = json.dumps(table, indent=1, sort_keys=True).encode()
    return AmaxRecord(trial=trial, method=method, table=store.put_bytes(data, "amax.json"), biases=biases)
