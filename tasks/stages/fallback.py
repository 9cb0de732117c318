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
from ptq.config import Dialect, FallbackConfig, GateConfig, LabelledMethod, Normalization, WeightMethod
from ptq.evaluation import fallback
from ptq.quantization.prepared import plan_from_file
from ptq.records.base import ArtifactRef
from ptq.records.calibration import AmaxRecord, CalibrationDraws
from ptq.records.decision import Attempt, FineTuning, GateDecision, LayerRanking, MethodChoice, RunFindings
from ptq.records.plan import ModelRecord
from ptq.storage.store import Store, open_store
from tasks.runtime.progress import progress_logger
from tasks.runtime.stage import RunContext, stage


def is_worth_trying(findings: RunFindings, config: FallbackConfig, limits: GateConfig) -> bool:
    """Whether anything is configured, and accuracy is all that the gate found fault with."""
    is_configured = config.per_layer_method or config.float_layers or config.qat_epochs
    return bool(is_configured) and fallback.only_accuracy_failed(
        comparison=findings.selection.comparison,
        benchmark=findings.benchmark,
        graph_errors=sum(check.errors for check in findings.checks),
        limits=limits,
    )


@stage(returns=MethodChoice, timeout_seconds=24 * 3600, ignore=("threads",))
def choose_methods(
    model: ModelRecord,
    tables: Sequence[AmaxRecord],
    draws: CalibrationDraws,
    normalization: Normalization,
    *,
    images: int,
    dialect: Dialect,
    weight_method: WeightMethod,
    threads: int,
    run: RunContext,
) -> MethodChoice:
    """Choose for every quantizer, of one trial's amax tables, the method that keeps the logits closest to FP32's."""
    store = open_store(run.store_uri)
    trial = tables[0].trial
    table, choices = fallback.choose_methods(
        _files(store, model),
        tables={record.method: json.loads(store.get_bytes(record.table)) for record in tables},
        images=_images(store, draws, trial, normalization, images),
        dialect=dialect,
        weight_method=weight_method,
        threads=threads,
    )
    what = fallback.describe_choices(choices)
    get_run_logger().info("Trying %s", what)
    return MethodChoice(
        _amax_record(store, table, method="per_layer", trial=trial, biases=tables[0].biases), choices, what
    )


@stage(returns=LayerRanking, timeout_seconds=24 * 3600, ignore=("threads",))
def rank_layers(
    model: ModelRecord,
    amax: AmaxRecord,
    draws: CalibrationDraws,
    normalization: Normalization,
    *,
    images: int,
    limit: int,
    dialect: Dialect,
    weight_method: WeightMethod,
    threads: int,
    run: RunContext,
) -> LayerRanking:
    """Rank the quantized layers by what quantizing each of them alone does to the logits."""
    store = open_store(run.store_uri)
    layers = fallback.rank_layers(
        _files(store, model),
        table=json.loads(store.get_bytes(amax.table)),
        images=_images(store, draws, amax.trial, normalization, images),
        dialect=dialect,
        weight_method=weight_method,
        threads=threads,
    )
    get_run_logger().info("Most sensitive of %d layers: %s, %.1f dB", len(layers), layers[0].layer, layers[0].sqnr_db)
    return LayerRanking(layers=layers, groups=fallback.groups_of_ranking(layers, limit=limit))


@stage(returns=AmaxRecord, timeout_seconds=24 * 3600, ignore=("threads",))
def carry_amax(
    source: ModelRecord,
    target: ModelRecord,
    amax: AmaxRecord,
    draws: CalibrationDraws,
    normalization: Normalization,
    *,
    method: LabelledMethod,
    bins: int,
    label: str,
    dialect: Dialect,
    threads: int,
    run: RunContext,
) -> AmaxRecord:
    """Carry an amax table over to the same model with other quantizers; collect its trial again where that fails."""
    store = open_store(run.store_uri)
    plan = plan_from_file(store.get_path(target.plan))
    table = fallback.carried_table(
        json.loads(store.get_bytes(amax.table)), source=plan_from_file(store.get_path(source.plan)), target=plan
    )
    if table is None:
        (trial,) = statistics_from_files(
            observed_onnx=store.get_path(target.observed_onnx), plan=plan, pixels=store.get_path(draws.prepared.pixels),
            files=store.get_path(draws.prepared.sha256_of_files), draws=[draws.indices[amax.trial]],
            mean=normalization.mean, std=normalization.std, bins=bins, threads=threads,
            progress=progress_logger("Calibration images"),
        )  # fmt: skip
        table = amax_table(
            trial.histograms, plan=plan, dialect=dialect, method=method.method, percentile=method.percentile
        )
    # Corrected biases belong to the weights they were computed from.
    biases = amax.biases if source.weights == target.weights else None
    return _amax_record(store, table, method=f"{amax.method}_{label}", trial=amax.trial, biases=biases)


@stage(returns=FineTuning, timeout_seconds=7 * 24 * 3600, ignore=("threads",))
def fine_tune(
    model: ModelRecord,
    amax: AmaxRecord,
    draws: CalibrationDraws,
    normalization: Normalization,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    dialect: Dialect,
    threads: int,
    run: RunContext,
) -> FineTuning:
    """Fine-tune the fake-quantized model on the drawn images and their labels."""
    store = open_store(run.store_uri)
    advance = progress_logger("QAT epochs")
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "weights_qat.safetensors"
        found = fallback.fine_tune_from_files(
            _files(store, model), table=json.loads(store.get_bytes(amax.table)),
            pixels=store.get_path(draws.prepared.pixels), labels=store.get_path(draws.prepared.labels),
            mean=normalization.mean, std=normalization.std, dialect=dialect, epochs=epochs,
            learning_rate=learning_rate, seed=seed, threads=threads, output=output,
            progress=lambda epoch: advance(epoch, epochs),
        )  # fmt: skip
        weights = store.put_file(output)
    what = fallback.describe_fine_tuning(found, images=draws.prepared.images, learning_rate=learning_rate)
    get_run_logger().info("Trying %s", what)
    # The FP32 graph stays: the baseline is what came in, not what QAT made of it.
    tuned = dataclasses.replace(model, weights=weights, warnings=(*model.warnings, f"{what}."))
    return FineTuning(model=tuned, losses=found.losses, kept_epoch=found.kept_epoch, what=what)


@stage(returns=GateDecision, timeout_seconds=60)
def summarize_attempts(
    first: GateDecision, candidate: str, attempts: Sequence[Attempt], *, run: RunContext
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
        channels=model.input_shape[0],
    )


def _images(store: Store, draws: CalibrationDraws, trial: int, normalization: Normalization, images: int) -> np.ndarray:
    return fallback.sensitivity_images(
        store.get_path(draws.prepared.pixels),
        draws.indices[trial],
        images=images,
        mean=normalization.mean,
        std=normalization.std,
    )


def _amax_record(
    store: Store, table: dict[str, float], *, method: str, trial: int, biases: ArtifactRef | None
) -> AmaxRecord:
    data = json.dumps(table, indent=1, sort_keys=True).encode()
    return AmaxRecord(trial=trial, method=method, table=store.put_bytes(data, "amax.json"), biases=biases)
