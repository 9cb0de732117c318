"""How does a checkpoint become what the later stages work on?

Loads the weights into the network, folds it, places quantizers and writes the FP32 graph, the observed graph
and the Q/DQ template. Which tensors are quantized is decided in `rules`.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import fx

from ptq.config import QuantizationConfig, WeightMethod
from ptq.dialect import observed_names
from ptq.errors import CheckpointError, ExportError
from ptq.graph.coverage import measure_coverage
from ptq.networks.checkpoint import checkpoint_digest, head_size, put_weights_, weights_for
from ptq.networks.export import HalfPrecision, export_onnx, export_qdq_template
from ptq.networks.fake_quant import fake_quant_from_folded, weight_amax
from ptq.networks.folding import check_runs
from ptq.networks.network import (
    Network,
    NetworkKind,
    keep_network,
    network_as_built,
    network_from_state,
    network_from_weights,
)
from ptq.networks.observed import observed_from_folded
from ptq.networks.unfolding import unfolded_state
from ptq.quantization.equalize import layer_factors
from ptq.quantization.placement import plan_of_graph
from ptq.quantization.prepared import PreparedModel, output_note
from ptq.quantization.rules import is_within
from ptq.quantization.same_function import random_images, require_same_export
from ptq.quantization.torch_view import scale_layers_, view_of
from ptq.records.base import to_jsonable
from ptq.records.plan import PlacementPlan

# What rounding to FP16 changes of logits, at most, as a share of the largest of them.
_FP16_TOLERANCE = 0.05


def prepare_torch_model(
    *,
    name: str,
    checkpoint: Path,
    class_count: int,
    has_named_classes: bool,
    input_shape: tuple[int, int, int],
    quantization: QuantizationConfig,
    directory: Path,
    whole_operators: bool = False,
) -> PreparedModel:
    """Writes weights, FP32 graph, observed graph and placement plan of a checkpoint into `directory`.

    Args:
        name: the network, see `factory.create_model`.
        checkpoint: the file with the weights.
        class_count: classes of the data; with numbered classes the model may have more.
        has_named_classes: whether the data names its classes, so that their number is the model's.
        input_shape: (c, h, w).
        quantization: where quantizers go.
        directory: an existing folder.
        whole_operators: place the quantizers of the onnxruntime dialect too.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit.
        ExportError: the model cannot run or be exported.
        UsageError: there is no such network or layer.
    """
    read = weights_for(checkpoint, name=name, channels=input_shape[0])
    state = read.state
    num_classes = class_count if has_named_classes else head_size(state, name=name, channels=input_shape[0])
    if num_classes < class_count:
        raise CheckpointError(
            f"Checkpoint {checkpoint} has {num_classes} outputs, and the data has labels up to {class_count - 1}. "
            "Expected one output per class; check the manifest's label column and the checkpoint."
        )
    kind = NetworkKind(name, num_classes, input_shape)
    network = network_from_state(state, kind, source=str(checkpoint))
    folded = network.folded
    check_runs(folded.module, input_shape=input_shape, num_classes=num_classes)
    files = {
        "weights": directory / "weights.safetensors",
        "fp32_onnx": directory / "model_fp32.onnx",
        "observed_onnx": directory / "model_observed.onnx",
        "plan": directory / "placement.json",
    }
    safetensors.torch.save_file(
        {key: value.contiguous().clone() for key, value in sorted(state.items())}, files["weights"]
    )
    keep_network(files["weights"], kind, network)
    sha256 = checkpoint_digest(checkpoint)
    export_onnx(folded.module, files["fp32_onnx"], input_shape=input_shape, metadata={"checkpoint_sha256": sha256})
    require_same_export(network.original, files["fp32_onnx"], input_shape=input_shape)
    # A layer that sees no image is gone, and so in float already.
    skipped = [
        name for name in quantization.skip_layers if not any(is_within(gone, name) for gone in folded.constant_layers)
    ]
    plan = plan_of_graph(
        view_of(folded.module, traced=folded.traced),
        files["fp32_onnx"],
        quantization=quantization.model_copy(update={"skip_layers": tuple(skipped)}),
        whole_operators=whole_operators,
    )
    _write_observed(folded.module, plan, files["observed_onnx"], input_shape=input_shape)
    files["plan"].write_text(json.dumps(to_jsonable(plan), indent=1))
    notes = tuple(
        note
        for note in (*read.notes, network.note, output_note(files["fp32_onnx"]), folded.warning, *plan.warnings)
        if note
    )
    coverage = measure_coverage(files["fp32_onnx"], plan)
    return PreparedModel(sha256, files, num_classes, plan, notes, coverage, source="torch")


def export_network(
    path: Path, *, name: str, checkpoint: Path, num_classes: int | None, input_shape: tuple[int, int, int]
) -> tuple[str, tuple[str, ...]]:
    """Writes a network as it is built, with its weights, as an ONNX file.

    The batch is free, or one image where the export would hold the number of images that it was made with.

    Args:
        path: file to write.
        name: the network, see `factory.create_model`.
        checkpoint: the file with the weights.
        num_classes: outputs of the model; None for as many as the checkpoint has.
        input_shape: (c, h, w).

    Returns:
        the checkpoint's SHA-256, and what a person should know of how it was read.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit.
        ExportError: the model cannot be exported.
    """
    read = weights_for(checkpoint, name=name, channels=input_shape[0])
    if num_classes is None:
        num_classes = head_size(read.state, name=name, channels=input_shape[0])
    network, note = network_as_built(read.state, NetworkKind(name, num_classes, input_shape), source=str(checkpoint))
    try:
        export_onnx(network, path, input_shape=input_shape)
        require_same_export(network, path, input_shape=input_shape)
    except ExportError:
        export_onnx(network, path, input_shape=input_shape, batch_size=1)
        require_same_export(network, path, input_shape=input_shape, batch_size=1)
    return checkpoint_digest(checkpoint), (*read.notes, *([note] if note else []))


def equalize_model(
    *,
    weights: Path,
    plan: PlacementPlan,
    ranges: Mapping[str, np.ndarray],
    name: str,
    num_classes: int,
    input_shape: tuple[int, int, int],
    directory: Path,
) -> tuple[dict[str, Path], int]:
    """Writes the equalized weights and observed graph of a prepared model; the FP32 graph stays what it was.

    Args:
        weights: the file of `prepare_torch_model`.
        plan: its placement plan.
        ranges: max |x| per channel of the observed tensors, by name.
        name: the network, see `factory.create_model`.
        num_classes: outputs of the model.
        input_shape: (c, h, w).
        directory: an existing folder.

    Returns:
        the files by the record's field names, and the number of channels that changed; no files for a model that
        could not be traced, or where nothing changed.
    """
    kind = NetworkKind(name, num_classes, input_shape)
    network = network_from_weights(weights, kind)
    if not isinstance(network.folded.module, fx.GraphModule):
        return {}, 0
    folded = dataclasses.replace(network.folded, module=copy.deepcopy(network.folded.module))
    factors, changed = layer_factors(view_of(folded.module, input_shape=input_shape), ranges)
    if changed == 0:
        return {}, 0
    scale_layers_(folded.module, factors)
    state = unfolded_state(network.original, folded, folded.module)
    files = {"weights": directory / "weights_equalized.safetensors", "observed_onnx": directory / "observed.onnx"}
    safetensors.torch.save_file({key: value.contiguous() for key, value in sorted(state.items())}, files["weights"])
    original = copy.deepcopy(network.original)
    put_weights_(original, state)
    keep_network(files["weights"], kind, Network(original, folded))
    _write_observed(folded.module, plan, files["observed_onnx"], input_shape=input_shape)
    return files, changed


def _write_observed(
    module: torch.nn.Module, plan: PlacementPlan, path: Path, *, input_shape: tuple[int, int, int]
) -> None:
    observed = observed_from_folded(module, plan)
    export_onnx(observed, path, input_shape=input_shape, batch_size=1, observed=observed_names(plan))


def observed_model(
    weights: Path, *, plan: PlacementPlan, name: str, num_classes: int, input_shape: tuple[int, int, int]
) -> torch.nn.Module:
    """Returns the model of the observed graph in PyTorch; see `observed.observed_from_folded`."""
    network = network_from_weights(weights, NetworkKind(name, num_classes, input_shape))
    return observed_from_folded(network.folded.module, plan)


def write_template(
    path: Path,
    *,
    weights: Path,
    plan: PlacementPlan,
    name: str,
    num_classes: int,
    input_shape: tuple[int, int, int],
    weight_method: WeightMethod = "max",
) -> None:
    """Writes the Q/DQ template of a prepared model: weight scales set, every activation's amax 1.

    Raises:
        ExportError: the fake-quantized model cannot be exported.
    """
    folded = network_from_weights(weights, NetworkKind(name, num_classes, input_shape)).folded
    model = fake_quant_from_folded(
        folded.module,
        plan,
        dialect="tensorrt",
        activation_amax={spec.name: 1.0 for spec in plan.activations},
        weight_amax=weight_amax(folded.module, plan, method=weight_method),
    )
    export_qdq_template(model, path, plan=plan, input_shape=input_shape)


def write_float_model(
    path: Path,
    *,
    name: str,
    checkpoint: Path,
    precision: str,
    input_shape: tuple[int, int, int],
    batch_size: int | None,
) -> None:
    """Writes a checkpoint as an FP32 or FP16 graph; the FP16 one keeps float32 input and output.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit.
        ExportError: the model cannot run or be exported.
    """
    state = weights_for(checkpoint, name=name, channels=input_shape[0]).state
    num_classes = head_size(state, name=name, channels=input_shape[0])
    kind = NetworkKind(name, num_classes, input_shape)
    folded = network_from_state(state, kind, source=str(checkpoint)).folded
    check_runs(folded.module, input_shape=input_shape, num_classes=num_classes)
    if precision == "fp16":
        _require_fp16(folded.module, input_shape=input_shape)
    model = HalfPrecision(folded.module) if precision == "fp16" else folded.module
    metadata = {"checkpoint_sha256": checkpoint_digest(checkpoint), "precision": precision}
    export_onnx(model, path, input_shape=input_shape, batch_size=batch_size, metadata=metadata)


def _require_fp16(module: torch.nn.Module, *, input_shape: tuple[int, int, int]) -> None:
    """Refuses a network that gives something else once everything in it is in FP16."""
    images = torch.from_numpy(random_images(input_shape))
    with torch.inference_mode():
        expected = torch.cat([module(image[None]) for image in images])
        found = torch.cat([copy.deepcopy(module).half()(image[None].half()) for image in images]).float()
    difference = float((found - expected).abs().max())
    if not torch.isfinite(found).all():
        problem = "gives NaN or infinity: weights or activations are beyond 65504, FP16's largest number"
    elif difference > _FP16_TOLERANCE * max(float(expected.abs().max()), 1e-6):
        problem = f"gives logits that differ by {difference:.3g} from FP32's, which go up to {expected.abs().max():.3g}"
    else:
        return
    raise ExportError(
        f"In FP16 the network {problem}, on random images, so nothing was written. Expected one that FP16 can hold. "
        "Export it with --precision fp32, or scale its layers."
    )
