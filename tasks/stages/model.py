"""The stage that loads a checkpoint and replaces modules by quantized ones."""

import dataclasses
import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger

from ptq.calibration.calibrate import RANGE_IMAGES, ranges_from_files
from ptq.config import DataConfig, ModelConfig
from ptq.data.remote_inputs import Inputs, checkpoint_file
from ptq.graph.coverage import describe, require_coverage
from ptq.graph.source import source_digest
from ptq.networks.checkpoint import model_sources
from ptq.networks.factory import factory_digest
from ptq.networks.preprocessing import own_preprocessing, with_own_preprocessing
from ptq.quantization import prepare
from ptq.quantization.prepare_onnx import equalize_onnx_model
from ptq.quantization.prepare_torch import equalize_model
from ptq.quantization.prepared import plan_from_file
from ptq.records.calibration import CalibrationDraws
from ptq.records.plan import ModelRecord
from ptq.storage.store import open_store
from ptq.uris import is_remote
from tasks.runtime.context import RunContext
from tasks.runtime.progress import say
from tasks.runtime.stage import stage


def _sources(run: RunContext) -> list[str]:
    """The name of a model and the digests of what it is made from, wherever that lies.

    A checkpoint in S3 that was read before is not read again for its digest.
    """
    model = run.config.model
    if is_remote(model.checkpoint):
        sha256 = Inputs(run.store).checkpoint_digest(model.checkpoint)
        return [model.name, sha256, *([] if model.is_onnx else [factory_digest(model.name)])]
    checkpoint = Path(model.checkpoint)
    return [model.name, *([source_digest(checkpoint)] if model.is_onnx else model_sources(model.name, checkpoint))]


@stage(
    returns=ModelRecord,
    timeout_seconds=1800,
    uses=("config.quantization.placement", "input_shape", "whole_operators"),
    ignores=("config.model",),
    reads=_sources,
)
def prepare_model(class_names: tuple[str, ...], has_named_classes: bool, *, run: RunContext) -> ModelRecord:
    """Load the checkpoint or the ONNX file, fold BatchNorm and decide where quantizers go."""
    store, model = run.store, run.config.model
    with checkpoint_file(model.checkpoint, store) as checkpoint, tempfile.TemporaryDirectory() as directory:
        prepared = prepare.prepare_model(
            name=model.name,
            checkpoint=checkpoint,
            is_onnx=model.is_onnx,
            class_count=len(class_names),
            has_named_classes=has_named_classes,
            input_shape=run.input_shape,
            quantization=run.config.quantization.placement,
            whole_operators=run.whole_operators,
            directory=Path(directory),
        )
        files: dict[str, Any] = {name: store.put_file(path) for name, path in prepared.files.items()}
    plan = prepared.plan
    get_run_logger().info(
        "Placed %d activation and %d weight quantizers; %d of %d residual adds have one quantized operand",
        len(plan.activations),
        len(plan.weights),
        plan.quantized_residual_adds,
        plan.residual_adds,
    )
    return ModelRecord(
        name=model.name,
        checkpoint_sha256=prepared.checkpoint_sha256,
        input_shape=run.input_shape,
        num_classes=prepared.num_classes,
        class_names=class_names,
        warnings=prepared.warnings,
        coverage=prepared.coverage,
        source=prepared.source,
        **files,
    )


def take_own_preprocessing(model: ModelConfig, data: DataConfig, store_uri: str) -> tuple[DataConfig, float | None]:
    """Finds how the images of a network were prepared, and says what images go through.

    Returns:
        the data with the network's own preprocessing wherever nobody set it, and the top-1 that is stated for the
        weights, in percent; None where none is.

    Raises:
        UsageError: what states it cannot be read or done here.
    """
    if model.is_onnx and is_remote(model.checkpoint):
        with checkpoint_file(model.checkpoint, open_store(store_uri)) as file:
            own = own_preprocessing(model.model_copy(update={"checkpoint": str(file)}))
    else:
        own = own_preprocessing(model)
    data = with_own_preprocessing(data, own)
    used = data.preprocessing
    mean, std = ("/".join(f"{value:g}" for value in values) for values in (used.mean, used.std))
    own_share = f": what nobody set is that of {own.source}" if own else ""
    say(
        f"Images are resized to {used.resize} and cropped to {used.crop} ({used.interpolation}), then mean {mean} and "
        f"std {std}{own_share}."
    )
    return data, own.top1_percent if own else None


def check_coverage(model: ModelRecord, run: RunContext) -> None:
    """Says what will be in INT8; raises before anything is calibrated where it is too little."""
    for warning in model.warnings:
        say(warning, level=logging.WARNING)
    say(describe(model.coverage))
    require_coverage(model.coverage, run.config.gate.min_int8_macs_percent)


@stage(returns=ModelRecord, timeout_seconds=3600, uses=("dialect", "normalization"), ignores=("threads",))
def equalize_channels(
    model: ModelRecord, reference: ModelRecord, draws: CalibrationDraws, *, run: RunContext
) -> ModelRecord:
    """Scale channels against the layers around them, by the ranges that `reference` shows on drawn images.

    A PyTorch network that cannot be traced comes back as it is.
    """
    store = run.store
    plan = plan_from_file(store.get_path(reference.plan))
    if not plan.traced:
        return model
    ranges = ranges_from_files(
        observed_onnx=store.get_path(reference.observed_onnx),
        plan=plan,
        pixels=store.get_path(draws.prepared.pixels),
        images=RANGE_IMAGES,
        mean=run.normalization.mean,
        std=run.normalization.std,
        threads=run.threads,
    )
    # What graphs of other dialects alone have has no say, so that this dialect's graph is the same without them.
    known = {spec.name for spec in plan.of_dialect(run.dialect).activations}
    ranges = {name: found for name, found in ranges.items() if name in known}
    equalize = partial(equalize_model, name=model.name, num_classes=model.num_classes, input_shape=model.input_shape)
    with tempfile.TemporaryDirectory() as directory:
        files, changed = (equalize_onnx_model if model.source == "onnx" else equalize)(
            weights=store.get_path(model.weights),
            plan=plan_from_file(store.get_path(model.plan)),
            ranges=ranges,
            directory=Path(directory),
        )
        stored = {name: store.put_file(path) for name, path in files.items()}
    get_run_logger().info("Scaled %d channels so that the ranges within a tensor come closer", changed)
    if not stored:
        return model
    return dataclasses.replace(model, weights=stored["weights"], observed_onnx=stored["observed_onnx"])
