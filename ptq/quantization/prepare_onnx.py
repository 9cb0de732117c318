"""How does an ONNX file become what the later stages work on?

The second way in, beside `prepare_torch`: the same files, from a classifier whose PyTorch source is not at hand. What
comes out is checked against what came in, on random images.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ptq.config import QuantizationConfig
from ptq.engines import open_engine
from ptq.engines.base import Engine
from ptq.engines.onnxruntime import without_transpositions
from ptq.errors import CheckpointError, EngineBuildError
from ptq.graph.canonical import canonical_graph, read_graph, save_graph, with_shapes
from ptq.graph.coverage import measure_coverage
from ptq.graph.insertion import write_observed
from ptq.graph.source import OnnxSource, read_source, source_digest
from ptq.quantization.equalize import layer_factors
from ptq.quantization.onnx_view import scale_layers_, view_of
from ptq.quantization.placement import plan_of_graph
from ptq.quantization.prepared import PreparedModel, output_note
from ptq.records.base import to_jsonable
from ptq.records.plan import PlacementPlan

# Two float executions of one network differ by rounding; folding BatchNorm moves that by a little.
_TOLERANCE = 1e-3


def prepare_onnx_model(
    *,
    checkpoint: Path,
    class_count: int,
    has_named_classes: bool,
    input_shape: tuple[int, int, int],
    quantization: QuantizationConfig,
    directory: Path,
    whole_operators: bool = False,
    checkpoint_sha256: str = "",
) -> PreparedModel:
    """Writes FP32 graph, observed graph and placement plan of an FP32 ONNX classifier into `directory`.

    Args:
        checkpoint: the ONNX file.
        class_count: classes of the data; with numbered classes the model may have more.
        has_named_classes: whether the data names its classes, so that their number is the model's.
        input_shape: (c, h, w).
        quantization: where quantizers go.
        directory: an existing folder.
        whole_operators: place the quantizers of the onnxruntime dialect too.
        checkpoint_sha256: of what the file was exported from; of the file itself where that is empty.

    Returns:
        the files by the record's field names. `weights` is the FP32 graph in canonical form, from which the Q/DQ
        template is written.

    Raises:
        CheckpointError: the file is no FP32 classifier, or does not fit the data.
        UsageError: there is no such layer.
    """
    engine = open_engine("onnxruntime", threads=1)
    source = read_source(checkpoint, input_shape=input_shape, class_count=class_count)
    graph = canonical_graph(_channels_first(source), origin=str(checkpoint))
    files = {
        "weights": directory / "model_canonical.onnx",
        "fp32_onnx": directory / "model_fp32.onnx",
        "observed_onnx": directory / "model_observed.onnx",
        "plan": directory / "placement.json",
    }
    save_graph(graph, files["weights"])
    num_classes = _checked_classes(engine, source, files["weights"], checkpoint, input_shape=input_shape)
    _check_class_count(checkpoint, num_classes, class_count, has_named_classes=has_named_classes)
    graph.outputs[0].shape = [graph.outputs[0].shape[0], num_classes]
    digest = checkpoint_sha256 or source_digest(checkpoint)
    save_graph(graph, files["weights"])
    save_graph(graph, files["fp32_onnx"], {"checkpoint_sha256": digest})
    view = view_of(with_shapes(graph))
    plan = plan_of_graph(view, files["fp32_onnx"], quantization=quantization, whole_operators=whole_operators)
    write_observed(files["weights"], files["observed_onnx"], plan=plan)
    files["plan"].write_text(json.dumps(to_jsonable(plan), indent=1))
    notes = tuple(note for note in (*source.notes, *plan.warnings, output_note(files["fp32_onnx"])) if note)
    coverage = measure_coverage(files["fp32_onnx"], plan)
    return PreparedModel(digest, files, num_classes, plan, notes, coverage, source="onnx")


def equalize_onnx_model(
    *, weights: Path, plan: PlacementPlan, ranges: Mapping[str, np.ndarray], directory: Path
) -> tuple[dict[str, Path], int]:
    """Writes the equalized canonical and observed graphs of a prepared model; the FP32 graph stays what it was.

    Args:
        weights: the canonical graph of `prepare_onnx_model`.
        plan: its placement plan.
        ranges: max |x| per channel of the observed tensors, by name.
        directory: an existing folder.

    Returns:
        the files by the record's field names, and the number of channels that changed; no files where nothing did.
    """
    graph = read_graph(weights)
    factors, changed = layer_factors(view_of(graph), ranges)
    if changed == 0:
        return {}, 0
    scale_layers_(graph, factors)
    files = {"weights": directory / "model_equalized.onnx", "observed_onnx": directory / "observed.onnx"}
    save_graph(graph, files["weights"])
    write_observed(files["weights"], files["observed_onnx"], plan=plan)
    return files, changed


def _check_class_count(path: Path, found: int, wanted: int, *, has_named_classes: bool) -> None:
    if found < wanted or (has_named_classes and found != wanted):
        what = f"{wanted} classes" if has_named_classes else f"labels up to {wanted - 1}"
        raise CheckpointError(
            f"{path} has {found} outputs, and the data has {what}. Expected one output per class; check the number "
            "of class folders, or the manifest's label column, and the model."
        )


def _channels_first(source: OnnxSource) -> OnnxSource:
    """The source without the transpositions around each layer of a network whose channels are last."""
    if not source.channels_last:
        return source
    try:
        return dataclasses.replace(source, model=without_transpositions(source.model))
    except EngineBuildError:  # `_checked_classes` says why it cannot run
        return source


def _checked_classes(
    engine: Engine, source: OnnxSource, canonical: Path, path: Path, *, input_shape: tuple[int, int, int]
) -> int:
    """Returns the number of outputs, once both graphs were seen to compute the same for every image of a batch.

    Raises:
        CheckpointError: the file cannot run, is no classifier, cannot take another batch size, or has changed.
    """
    batch = source.batch_size or 2
    images = np.random.default_rng(0).uniform(-1, 1, (max(2, batch), *input_shape)).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        original = Path(directory) / "original.onnx"
        original.write_bytes(source.model.SerializeToString())
        try:
            expected = _logits(engine, original, images, batch)
        except EngineBuildError as error:
            raise CheckpointError(
                f"{path} cannot run: {str(error)[:300]} Expected a model that ONNX Runtime runs; export it again."
            ) from error
        if expected.ndim > 2 and expected.size == expected.shape[0] * expected.shape[1]:
            expected = expected.reshape(len(expected), -1)
        if expected.ndim != 2:
            raise CheckpointError(
                f"{path} returns {expected.shape[1:]} numbers for an image; expected one per class. Give a classifier."
            )
        if not np.isfinite(expected).all():
            raise CheckpointError(
                f"{path} returns NaN or infinity for a random image. Expected finite weights. The training run that "
                "wrote it has probably diverged."
            )
        try:
            found = _logits(engine, canonical, images, 2)
        except EngineBuildError as error:
            raise CheckpointError(
                f"{path} runs batches of {batch} images alone: {str(error)[:300]} Expected a free batch dimension; "
                "export it with a dynamic one (dynamic_axes or dynamic_shapes in torch.onnx.export)."
            ) from error
    tolerance = _TOLERANCE * float(np.abs(expected).max())
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=_TOLERANCE, atol=tolerance):
        raise CheckpointError(
            f"{path} gives other results for single images than for batches of {batch}, or once BatchNorm is folded. "
            "Expected images that do not depend on each other; export it with a dynamic batch dimension."
        )
    return expected.shape[1]


def _logits(engine: Engine, path: Path, images: np.ndarray, batch_size: int) -> np.ndarray:
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    try:
        found = list(engine.logits(path, batches, precision="fp32", batch_size=batch_size, float_remainder="fp32"))
    except EngineBuildError:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise EngineBuildError(f"{' '.join(str(error).split())[:300]}.") from error
    return np.concatenate(found)
