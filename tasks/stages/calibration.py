"""Stages that collect calibration statistics, in one piece or in shards, and what is computed from their means."""

from collections.abc import Sequence
from dataclasses import replace

from prefect.logging import get_run_logger

from ptq.calibration.calibrate import (
    CollectedTrials,
    ObservedOnDevice,
    corrected_biases,
    means_by_name,
    trials_from_files,
)
from ptq.calibration.shards import bytes_from_shard, draws_of_shard, merge_shards
from ptq.calibration.statistics import TrialStatistics
from ptq.config import StoppingRule
from ptq.files import arrays_from_npz, npz_from_arrays
from ptq.numerics.histogram import bytes_from_trials
from ptq.quantization.prepare_torch import observed_model
from ptq.quantization.prepared import plan_from_file
from ptq.records.base import ArtifactRef
from ptq.records.calibration import CalibrationDraws, StatisticsRecord
from ptq.records.plan import ModelRecord, PlacementPlan
from ptq.storage.store import Store
from tasks.runtime.context import RunContext
from tasks.runtime.progress import progress_logger
from tasks.runtime.stage import stage

# What observes activations, on the machine that a stage runs on.
_OBSERVED = ("config.calibration.bins", "device", "normalization")


@stage(
    returns=StatisticsRecord,
    timeout_seconds=24 * 3600,
    uses=(*_OBSERVED, "stopping_rule"),
    ignores=("threads",),
    machine="shared",
)
def collect_statistics(model: ModelRecord, draws: CalibrationDraws, *, run: RunContext) -> StatisticsRecord:
    """Collect the activation histograms of every trial over the drawn images, or until there are enough of them."""
    store = run.store
    plan = plan_from_file(store.get_path(model.plan))
    found = _observed(model, plan, draws, run, stopping=run.stopping_rule, what="Calibration images")
    get_run_logger().info(found.summary)
    for warning in found.draws.warnings[len(draws.warnings) :]:
        get_run_logger().warning(warning)
    return _record(store, found.trials, plan, found.draws)


@stage(
    returns=ArtifactRef,
    timeout_seconds=None,
    uses=_OBSERVED,
    ignores=("threads",),
    run_name="collect_shard-{shard}",
    machine="shared",
)
def collect_shard(
    model: ModelRecord, draws: CalibrationDraws, shard: int, shards: int, *, run: RunContext
) -> ArtifactRef:
    """Collect the statistics of every trial over one of `shards` parts of the drawn images; see `collect_statistics`.

    Reads the store alone, so that it can run on any machine that sees it.
    """
    store = run.store
    plan = plan_from_file(store.get_path(model.plan))
    part = replace(draws, indices=draws_of_shard(draws.indices, shard=shard, shards=shards))
    found = _observed(model, plan, part, run, stopping=None, what=f"Images of shard {shard}")
    get_run_logger().info("Collected shard %d of %d: %d histograms", shard, shards, len(plan.activations))
    return store.put_bytes(bytes_from_shard(found.trials), f"shard-{shard}.npz")


@stage(returns=StatisticsRecord, timeout_seconds=3600)
def merge_statistics(
    shards: Sequence[ArtifactRef], model: ModelRecord, draws: CalibrationDraws, *, run: RunContext
) -> StatisticsRecord:
    """Put the shards together; the record and its objects have the bytes that `collect_statistics` gives them."""
    store = run.store
    plan = plan_from_file(store.get_path(model.plan))
    trials = merge_shards(store.get_bytes(shard) for shard in shards)
    get_run_logger().info(
        "Merged %d shards: %d histograms for %d trials from %d images",
        len(shards),
        len(plan.activations),
        len(trials),
        draws.prepared.images,
    )
    return _record(store, trials, plan, draws)


def _observed(
    model: ModelRecord,
    plan: PlacementPlan,
    draws: CalibrationDraws,
    run: RunContext,
    *,
    stopping: StoppingRule | None,
    what: str,
) -> CollectedTrials:
    """The statistics of every trial over its drawn images, on the engine, or on a torch device but for ONNX files."""
    store = run.store
    on_device = None
    if run.device and model.source == "torch":
        observed = observed_model(
            store.get_path(model.weights),
            plan=plan,
            name=model.name,
            num_classes=model.num_classes,
            input_shape=model.input_shape,
        )
        on_device = ObservedOnDevice(observed, run.device)
    return trials_from_files(
        observed_onnx=store.get_path(model.observed_onnx),
        plan=plan,
        pixels=store.get_path(draws.prepared.pixels),
        labels=store.get_path(draws.prepared.labels),
        files=store.get_path(draws.prepared.sha256_of_files),
        draws=draws,
        class_names=model.class_names,
        stopping=stopping,
        **run.normalization.model_dump(),
        bins=run.config.calibration.bins,
        threads=run.threads,
        on_device=on_device,
        progress=progress_logger(what),
    )


def _record(
    store: Store, trials: Sequence[TrialStatistics], plan: PlacementPlan, draws: CalibrationDraws
) -> StatisticsRecord:
    return StatisticsRecord(
        histograms=store.put_bytes(bytes_from_trials([trial.histograms for trial in trials]), "histograms.npz"),
        channel_means=store.put_bytes(npz_from_arrays(means_by_name(trials, plan=plan)), "channel_means.npz"),
        tensors=tuple(spec.name for spec in plan.activations),
        draws=draws,
    )


@stage(returns=ArtifactRef, timeout_seconds=600)
def correct_biases(
    channel_means: ArtifactRef, model: ModelRecord, template: ArtifactRef, trial: int, *, run: RunContext
) -> ArtifactRef:
    """Compute the biases that undo the mean error of rounded weights, from one trial's images."""
    store = run.store
    biases = corrected_biases(
        store.get_path(template),
        plan=plan_from_file(store.get_path(model.plan)),
        means=arrays_from_npz(store.get_path(channel_means)),
        trial=trial,
    )
    return store.put_bytes(npz_from_arrays(biases), "biases.npz")
