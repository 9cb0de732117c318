"""Which of the two ways in does a checkpoint take?

A PyTorch network is traced and quantized module by module (`prepare_torch`). Where that would leave layers in float
that the settings do not, or BatchNorm unfolded, its ONNX export is prepared as an ONNX file is (`prepare_onnx`), whose
graph has what was called, and the way that leaves less in float is taken.
"""

import dataclasses
from functools import partial
from pathlib import Path

from ptq.config import QuantizationConfig
from ptq.errors import ExportError, PtqError, UsageError
from ptq.quantization.prepare_onnx import prepare_onnx_model
from ptq.quantization.prepare_torch import export_network, prepare_torch_model
from ptq.quantization.prepared import PreparedModel
from ptq.records.plan import Coverage
from ptq.wording import first_names


def prepare_model(
    *,
    name: str,
    checkpoint: Path,
    is_onnx: bool,
    class_count: int,
    has_named_classes: bool,
    input_shape: tuple[int, int, int],
    quantization: QuantizationConfig,
    directory: Path,
    whole_operators: bool = False,
) -> PreparedModel:
    """Writes what later stages need of a checkpoint or an ONNX file, by the way that leaves less in float.

    Args:
        name: the network, see `factory.create_model`; of an ONNX file it is not asked.
        checkpoint: the file with the weights, or the ONNX file.
        is_onnx: which of the two it is.
        class_count: classes of the data; with numbered classes the model may have more.
        has_named_classes: whether the data names its classes, so that their number is the model's.
        input_shape: (c, h, w).
        quantization: where quantizers go.
        directory: an existing folder.
        whole_operators: place the quantizers of the onnxruntime dialect too.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        ExportError: the model cannot run or be exported.
        UsageError: there is no such network or layer, or the data has one class.
    """
    if has_named_classes and class_count < 2:
        raise UsageError(
            "The data has one class, of which nothing can be told apart. Expected at least two classes; add images of "
            "another."
        )
    prepare: partial[PreparedModel] = partial(
        prepare_onnx_model,
        class_count=class_count,
        has_named_classes=has_named_classes,
        input_shape=input_shape,
        quantization=quantization,
        whole_operators=whole_operators,
    )
    if is_onnx:
        return prepare(checkpoint=checkpoint, directory=directory)
    traced: PreparedModel | PtqError
    try:
        traced = prepare_torch_model(name=name, checkpoint=checkpoint, directory=directory, **prepare.keywords)
    except (ExportError, UsageError) as error:
        traced = error
    if isinstance(traced, PreparedModel) and traced.plan.traced and _is_whole(traced.coverage):
        return traced
    folder = directory / "exported"
    folder.mkdir()
    try:
        sha256, notes = export_network(
            folder / "network.onnx",
            name=name,
            checkpoint=checkpoint,
            num_classes=class_count if has_named_classes else None,
            input_shape=input_shape,
        )
        exported = prepare(checkpoint=folder / "network.onnx", directory=folder, checkpoint_sha256=sha256)
    except PtqError:
        if isinstance(traced, PtqError):
            raise traced from None
        return traced
    if isinstance(traced, PreparedModel) and _in_int8(exported) <= _in_int8(traced):
        return traced
    return dataclasses.replace(exported, warnings=(*notes, *exported.warnings, _why(traced)))


def _is_whole(coverage: Coverage) -> bool:
    return coverage.int8_macs == coverage.macs - coverage.chosen_macs and not coverage.batchnorms


def _in_int8(prepared: PreparedModel) -> tuple[float, int, bool]:
    """What counts of a prepared model, the most important first."""
    return prepared.coverage.int8_macs_percent, -prepared.coverage.batchnorms, prepared.plan.traced


def _why(traced: PreparedModel | PtqError) -> str:
    """Why the export was taken."""
    taken = "The network is quantized by way of its ONNX export:"
    if isinstance(traced, PtqError):
        return f"{taken} as a PyTorch network it cannot be. {traced}"
    coverage = traced.coverage
    left = [layer.name for layer in coverage.in_float if layer.name not in traced.plan.chosen_float_layers]
    if left:
        return (
            f"{taken} as a PyTorch network {len(left)} of {coverage.layers} layers ({first_names(left, 3)}) would "
            "stay in float."
        )
    if coverage.batchnorms:
        return f"{taken} as a PyTorch network {coverage.batchnorms} BatchNorms would stay unfolded."
    return f"{taken} torch.fx cannot trace it, so that residual adds and pools would stay in float."
