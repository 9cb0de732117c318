"""The stage that collects calibration statistics."""

from prefect.logging import get_run_logger

from ptq.arrays import arrays_from_npz, npz_from_arrays
from ptq.calibration import corrected_biases, means_by_name, statistics_from_files
from ptq.config import PreprocessingConfig
from ptq.histogram import bytes_from_trials
from ptq.preparation import plan_from_file
from ptq.records import ArtifactRef, CalibrationDraws, ModelRecord, StatisticsRecord
from ptq.store import open_store
from tasks.progress import progress_logger
from tasks.stage import RunContext, stage


@stage(returns=StatisticsRecord, timeout_seconds=24 * 3600, ignore=("threads",))
def collect_statistics(
    model: ModelRecord,
    draws: CalibrationDraws,
    preprocessing: PreprocessingConfig,
    *,
    bins: int,
    threads: int,
    run: RunContext,
) -> StatisticsRecord:
    """Collect the activation histograms of every trial in one pass over the drawn images."""
    store = open_store(run.store_uri)
    plan = plan_from_file(store.get_path(model.plan))
    trials = statistics_from_files(
        observed_onnx=store.get_path(model.observed_onnx),
        plan=plan,
        pixels=store.get_path(draws.prepared.pixels),
        files=store.get_path(draws.prepared.sha256_of_files),
        draws=draws.indices,
        mean=preprocessing.mean,
        std=preprocessing.std,
        bins=bins,
        threads=threads,
        progress=progress_logger("Calibration images"),
    )
    get_run_logger().info(
        "Collected %d histograms for %d trials from %d images",
        len(plan.activations),
        len(trials),
        draws.prepared.images,
    )
    return StatisticsRecord(
        histograms=store.put_bytes(bytes_from_trials([trial.histograms for trial in trials]), "histograms.npz"),
        channel_means=store.put_bytes(npz_from_arrays(means_by_name(trials, plan=plan)), "channel_means.npz"),
        tensors=tuple(spec.name for spec in plan.activations),
        trials=len(trials),
        images=draws.prepared.images,
        images_per_trial=len(draws.indices[0]),
    )


@stage(returns=ArtifactRef, timeout_seconds=600)
def correct_biases(
    statistics: StatisticsRecord, model: ModelRecord, template: ArtifactRef, trial: int, *, run: RunContext
) -> ArtifactRef:
    """Compute the biases that undo the mean error of rounded weights, from one trial's images."""
    store = open_store(run.store_uri)
    biases = corrected_biases(
        store.get_path(template),
        plan=plan_from_file(store.get_path(model.plan)),
        means=arrays_from_npz(store.get_path(statistics.channel_means)),
        trial=trial,
    )
    return store.put_bytes(npz_from_arrays(biases), "biases.npz")
