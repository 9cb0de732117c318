"""The stage that collects calibration statistics."""

from prefect.logging import get_run_logger

from ptq.arrays import arrays_from_npz, npz_from_arrays
from ptq.calibration import ObservedOnDevice, corrected_biases, means_by_name, trials_from_files
from ptq.config import Normalization, StoppingRule
from ptq.histogram import bytes_from_trials
from ptq.preparation import observed_model, plan_from_file
from ptq.records import ArtifactRef, CalibrationDraws, ModelRecord, StatisticsRecord
from ptq.store import open_store
from tasks.progress import progress_logger
from tasks.stage import RunContext, stage


@stage(returns=StatisticsRecord, timeout_seconds=24 * 3600, ignore=("threads",), machine="shared")
def collect_statistics(
    model: ModelRecord,
    draws: CalibrationDraws,
    normalization: Normalization,
    *,
    bins: int,
    threads: int,
    device: str = "",
    stopping: StoppingRule | None = None,
    run: RunContext,
) -> StatisticsRecord:
    """Collect the activation histograms of every trial over the drawn images, or until there are enough of them.

    `device` is the torch device that runs the model, empty for OpenVINO on the CPU, which runs ONNX files anyway.
    """
    store = open_store(run.store_uri)
    plan = plan_from_file(store.get_path(model.plan))
    on_device = None
    if device and model.source == "torch":
        observed = observed_model(
            store.get_path(model.weights), plan=plan, name=model.name, num_classes=model.num_classes,
            input_shape=model.input_shape,
        )  # fmt: skip
        on_device = ObservedOnDevice(observed, device)
    found = trials_from_files(
        observed_onnx=store.get_path(model.observed_onnx),
        plan=plan,
        pixels=store.get_path(draws.prepared.pixels),
        labels=store.get_path(draws.prepared.labels),
        files=store.get_path(draws.prepared.sha256_of_files),
        draws=draws,
        class_names=model.class_names,
        stopping=stopping,
        mean=normalization.mean,
        std=normalization.std,
        bins=bins,
        threads=threads,
        on_device=on_device,
        progress=progress_logger("Calibration images"),
    )
    get_run_logger().info(found.summary)
    for warning in found.draws.warnings[len(draws.warnings) :]:
        get_run_logger().warning(warning)
    return StatisticsRecord(
        histograms=store.put_bytes(bytes_from_trials([trial.histograms for trial in found.trials]), "histograms.npz"),
        channel_means=store.put_bytes(npz_from_arrays(means_by_name(found.trials, plan=plan)), "channel_means.npz"),
        tensors=tuple(spec.name for spec in plan.activations),
        draws=found.draws,
    )


@stage(returns=ArtifactRef, timeout_seconds=600)
def correct_biases(
    channel_means: ArtifactRef, model: ModelRecord, template: ArtifactRef, trial: int, *, run: RunContext
) -> ArtifactRef:
    """Compute the biases that undo the mean error of rounded weights, from one trial's images."""
    store = open_store(run.store_uri)
    biases = corrected_biases(
        store.get_path(template),
        plan=plan_from_file(store.get_path(model.plan)),
        means=arrays_from_npz(store.get_path(channel_means)),
        trial=trial,
    )
    return store.put_bytes(npz_from_arrays(biases), "biases.npz")
