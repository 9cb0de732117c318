"""Stages that turn files into indexed, drawn and decoded images."""

import json
from collections.abc import Sequence

import numpy as np
from prefect.logging import get_run_logger

from ptq.config import Decoding, SplitNames
from ptq.data import decoding as decoding_module
from ptq.data import index as index_module
from ptq.data import sampling
from ptq.data.remote_inputs import Inputs
from ptq.files import npy_from_array
from ptq.records.base import digest
from ptq.records.calibration import CalibrationDraws
from ptq.records.data import DataRecord, PreparedImages
from ptq.storage.store import Store
from ptq.uris import is_remote
from tasks.runtime.context import RunContext, StageContext
from tasks.runtime.progress import progress_logger
from tasks.runtime.stage import stage


def _fingerprint(path: str, splits: SplitNames, run: StageContext) -> str:
    """What tells whether the images changed: their listing where they are local, their digests in S3."""
    if not is_remote(path):
        return index_module.listing_fingerprint(path)
    index = index_module.index_images(
        path, **splits.model_dump(), progress=progress_logger("Read new images"), inputs=Inputs(run.store)
    )
    return index_module.index_fingerprint(index)


@stage(returns=DataRecord, timeout_seconds=3600, reads=_fingerprint)
def index_images(path: str, splits: SplitNames, *, run: StageContext) -> DataRecord:
    """Index the images at `path`: label, split and SHA-256 of every file."""
    index = index_module.index_images(
        path,
        **splits.model_dump(),
        progress=progress_logger("Indexed images"),
        inputs=Inputs(run.store) if is_remote(path) else None,
    )
    for warning in index.warnings:
        get_run_logger().warning(warning)
    return DataRecord(
        table=run.store.put_bytes(index_module.parquet_from_index(index), "images.parquet"),
        root=str(index.root),
        class_names=index.class_names,
        has_named_classes=index.has_named_classes,
        splits=index.splits,
        duplicates_across_splits=index.duplicates_across_splits,
        warnings=index.warnings,
    )


def _split_digest(data: DataRecord, split: str, run: StageContext) -> str:
    """The digest of the images of one split; those of another may change without any effect here."""
    rows = index_module.rows_of_split(run.store.get_path(data.table), split)
    return digest([[row.path, row.label, row.sha256] for row in rows])


@stage(
    returns=PreparedImages,
    timeout_seconds=7200,
    ignores=("data",),
    reads=_split_digest,
    run_name="prepare_split-{split}",
)
def prepare_split(data: DataRecord, split: str, decoding: Decoding, *, run: StageContext) -> PreparedImages:
    """Decode, resize and crop every image of a split."""
    store = run.store
    rows = index_module.rows_of_split(store.get_path(data.table), split)
    return _prepare(store, data, rows, decoding, what=f"Decoded {split} images")


@stage(
    returns=CalibrationDraws,
    timeout_seconds=7200,
    uses=(
        "config.calibration.images",
        "config.calibration.is_adaptive",
        "config.calibration.seed",
        "config.calibration.trials",
        "config.data.calibration_split",
        "decoding",
        "evaluated_splits",
    ),
)
def draw_calibration_images(data: DataRecord, *, run: RunContext) -> CalibrationDraws:
    """Draw the calibration images of every trial and decode each of them once."""
    store = run.store
    table = store.get_path(data.table)
    settings = run.config.calibration
    drawn = sampling.draw_trials(
        table,
        split=run.config.data.calibration_split,
        evaluated_splits=run.evaluated_splits,
        images=settings.images,
        trials=settings.trials,
        seed=settings.seed,
        class_names=data.class_names,
        is_ordered=settings.is_adaptive,
    )
    for warning in drawn.warnings:
        get_run_logger().warning(warning)
    prepared = _prepare(store, data, drawn.rows, run.decoding, what="Decoded calibration images")
    return CalibrationDraws(prepared=prepared, indices=drawn.indices, warnings=drawn.warnings)


def _prepare(
    store: Store, data: DataRecord, rows: Sequence[index_module.ImageRow], decoding: Decoding, *, what: str
) -> PreparedImages:
    pixels = decoding_module.decode_rows(
        rows,
        root=data.root,
        preprocessing=decoding,
        progress=progress_logger(what),
        inputs=Inputs(store) if is_remote(data.root) else None,
    )
    labels = np.array([row.label for row in rows], dtype=np.int64)
    files = json.dumps([[row.path, row.sha256] for row in rows])
    return PreparedImages(
        pixels=store.put_bytes(npy_from_array(pixels), "pixels.npy"),
        labels=store.put_bytes(npy_from_array(labels), "labels.npy"),
        images=len(rows),
        sha256_of_files=store.put_bytes(files.encode(), "files.json"),
    )
