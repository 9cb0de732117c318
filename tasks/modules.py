"""The stage that loads a checkpoint and replaces modules by quantized ones."""

import tempfile
from pathlib import Path

from prefect.logging import get_run_logger

from ptq.config import ModelConfig, QuantizationConfig
from ptq.preparation import model_sources, prepare_model
from ptq.records import DataRecord, ModelRecord
from ptq.store import open_store
from tasks.stage import RunContext, stage


@stage(returns=ModelRecord, timeout_seconds=1800, reads=lambda model: model_sources(model.name, Path(model.checkpoint)))
def replace_modules(
    model: ModelConfig,
    data: DataRecord,
    quantization: QuantizationConfig,
    *,
    input_shape: tuple[int, int, int],
    run: RunContext,
) -> ModelRecord:
    """Load the checkpoint, fold BatchNorm and decide where quantizers go."""
    store = open_store(run.store_uri)
    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare_model(
            name=model.name,
            checkpoint=Path(model.checkpoint),
            class_count=len(data.class_names),
            has_named_classes=data.has_named_classes,
            input_shape=input_shape,
            quantization=quantization,
            directory=Path(directory),
        )
        files = {name: store.put_file(path) for name, path in prepared.files.items()}
    plan = prepared.plan
    for warning in prepared.warnings:
        get_run_logger().warning(warning)
    get_run_logger().info(
        "Placed %d activation and %d weight quantizers; %d of %d residual adds have one quantized operand",
        len(plan.activations), len(plan.weights), plan.quantized_residual_adds, plan.residual_adds,
    )  # fmt: skip
    return ModelRecord(
        name=model.name,
        checkpoint_sha256=prepared.checkpoint_sha256,
        input_shape=input_shape,
        num_classes=prepared.num_classes,
        class_names=data.class_names,
        warnings=prepared.warnings,
        **files,
    )
