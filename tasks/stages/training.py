"""The stage that trains an FP32 classifier."""

import tempfile
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ptq.config import TrainingConfig
from ptq.files import write_file
from ptq.networks.training import train_from_files, training_sources
from ptq.records.data import DataRecord, PreparedImages, TrainingRecord
from tasks.runtime.context import StageContext
from tasks.runtime.progress import progress_logger
from tasks.runtime.stage import stage


def _settings(config: TrainingConfig, data: DataRecord) -> dict[str, Any]:
    """What training depends on beside the images: neither where files lie nor what they are called."""
    preprocessing = config.data.preprocessing
    return {
        "config": config.model_dump(exclude={"data", "checkpoint", "output"}),
        "sources": training_sources(config.model, config.checkpoint),
        "normalization": preprocessing.normalization,
        "channels": preprocessing.channels,
        "format": Path(config.output).suffix,
        "classes": len(data.class_names),
    }


@stage(
    returns=TrainingRecord,
    timeout_seconds=7 * 24 * 3600,
    ignores=("config", "data", "threads"),
    reads=_settings,
    reads_until="begun",
)
def train_classifier(
    config: TrainingConfig,
    data: DataRecord,
    train: PreparedImages,
    held_out: PreparedImages | None,
    *,
    threads: int,
    run: StageContext,
) -> TrainingRecord:
    """Train an FP32 classifier on the calibration split, watching the selection split."""
    store = run.store
    advance = progress_logger("Epochs")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / Path(config.output).name
        result = train_from_files(
            config,
            class_count=len(data.class_names),
            train=(store.get_path(train.pixels), store.get_path(train.labels)),
            held_out=(store.get_path(held_out.pixels), store.get_path(held_out.labels)) if held_out else None,
            threads=threads,
            output=path,
            progress=lambda epoch: advance(epoch, config.epochs),
        )
        checkpoint = store.put_file(path)
    get_run_logger().info("Trained %s: top-1 %s on the held-out images", config.model, result)
    return TrainingRecord(checkpoint=checkpoint, held_out_top1_percent=result)


@task(timeout_seconds=600, cache_policy=NO_CACHE)
def deliver_checkpoint(record: TrainingRecord, output: str, *, run: StageContext) -> None:
    """Write the trained checkpoint to its output file, complete or not at all."""
    write_file(Path(output), run.store.get_bytes(record.checkpoint))
    get_run_logger().info("Wrote %s, %d bytes", output, record.checkpoint.size_bytes)
