"""What do `ptq evaluate`, `export`, `validate` and `benchmark` do?

Single core calls on files, without a store and without a flow.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ptq.checks.run import check_graph
from ptq.config import DataConfig, Dialect, ModelConfig, Precision
from ptq.data import decoding
from ptq.data import index as index_module
from ptq.data.remote_inputs import checkpoint_file
from ptq.engines import open_engine
from ptq.engines.isa import require_isa
from ptq.errors import ManifestError, UsageError
from ptq.evaluation.benchmark import FileMeasurement, measure_files
from ptq.evaluation.evaluate import SplitImages, evaluate_graph
from ptq.evaluation.instruction_sets import evaluate_under_isas
from ptq.evaluation.predictions import ClassMetrics, class_metrics, tables_from_parquet
from ptq.graph.summary import summarize_onnx
from ptq.networks.preprocessing import own_preprocessing, with_own_preprocessing
from ptq.quantization.prepare_torch import write_float_model
from ptq.records.base import to_jsonable
from ptq.records.evaluation import IsaEvaluation, SplitMetrics
from ptq.records.graph import GraphChecks
from ptq.report.deliver import check_output_directory


@dataclass(frozen=True, slots=True)
class FileEvaluation:
    """A model file measured on one split: as a whole, by class, and the names of the classes as far as known.

    `by_isa` refers to the same file in float (ONNX Runtime): its SQNR and agreement.
    """

    metrics: SplitMetrics
    by_class: ClassMetrics
    class_names: tuple[str, ...]
    by_isa: tuple[IsaEvaluation, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns every metric in one JSON object; the confusion matrix has labels in rows."""
        isas = {"by_isa": to_jsonable(self.by_isa)} if self.by_isa else {}
        return {**to_jsonable(self.metrics), **to_jsonable(self.by_class), **isas}


def evaluate_file(
    model: str,
    *,
    name: str,
    data: DataConfig,
    split: str,
    engine: str,
    threads: int,
    isas: Sequence[str] = (),
) -> FileEvaluation:
    """Returns the metrics of a checkpoint or an ONNX file on one split, and under each instruction set asked for.

    Args:
        model: an ONNX file (`.onnx`), else a checkpoint; a path or s3://...
        name: the network of a checkpoint.
        data: the images and how they are read.
        split: the split to evaluate.
        engine: name of an engine, or auto.
        threads: CPU threads; 0 for all cores.
        isas: instruction sets of OpenVINO's kernels, or `native`.

    Raises:
        PtqError: model or data cannot be used.
    """
    opened = open_engine(engine, threads=threads)
    if isas and opened.identity().name != "openvino":
        raise UsageError(
            f"engine is {opened.identity().name}, which knows no instruction sets to choose from. Leave out --isa, or "
            "evaluate with --engine openvino."
        )
    for isa in isas:
        if isa != "native":
            require_isa(isa)
    index = index_module.index_images(data.path, calibration_split=split, selection_split=split, test_split=split)
    with checkpoint_file(model) as file, tempfile.TemporaryDirectory() as directory:
        named = ModelConfig(checkpoint=str(file), **({} if file.suffix == ".onnx" else {"name": name}))
        data = with_own_preprocessing(data, own_preprocessing(named))
        preprocessing, graph = data.preprocessing, file
        if file.suffix != ".onnx":
            graph = Path(directory) / "model.onnx"
            shape = (preprocessing.channels, preprocessing.crop, preprocessing.crop)
            write_float_model(graph, name=name, checkpoint=file, precision="fp32", input_shape=shape, batch_size=None)
        summary = summarize_onnx(graph)
        expected = (preprocessing.channels, preprocessing.crop, preprocessing.crop)
        if any(found not in (None, wanted) for found, wanted in zip(summary.input_shape[1:], expected, strict=True)):
            raise UsageError(
                f"{model} reads images of shape {summary.input_shape[1:]}, and the preprocessing gives {expected}. "
                "Set --channels, --resize and --crop to match."
            )
        rows = index_module.rows_of_split_table(index.table, split)
        pixels = decoding.decode_rows(rows, root=str(index.root), preprocessing=preprocessing)
        images = SplitImages(
            split=split,
            pixels=pixels,
            labels=np.array([row.label for row in rows], dtype=np.int64),
            files=[(row.path, row.sha256) for row in rows],
        )
        outputs, largest_label = summary.outputs, max(row.label for row in rows)
        if outputs is not None and outputs <= largest_label:
            raise ManifestError(
                f"{model} has {outputs} outputs, and the data has labels up to {largest_label}. "
                "Give the data it was trained on."
            )
        found = evaluate_graph(
            graph,
            engine=opened,
            precision="int8" if summary.quantize_nodes else "fp32",
            batch_size=summary.input_shape[0] or 32,
            float_remainder="fp32",
            splits=[images],
            mean=preprocessing.mean,
            std=preprocessing.std,
            reference_logits=None,
        )
        by_isa = evaluate_under_isas(
            graph,
            isas,
            images,
            precision="int8" if summary.quantize_nodes else "fp32",
            batch_size=summary.input_shape[0] or 32,
            threads=threads,
            float_remainder="fp32",
            mean=preprocessing.mean,
            std=preprocessing.std,
            reference_logits=None,
        )
    predictions = tables_from_parquet(found.predictions)[split]
    by_class = class_metrics(predictions, num_classes=found.num_classes)
    return FileEvaluation(found.splits[0], by_class, index.class_names, by_isa)


def benchmark_files(
    models: Sequence[Path],
    *,
    batch_sizes: Sequence[int],
    precisions: Sequence[str],
    engine: str,
    threads: int,
    duration_s: float,
) -> list[FileMeasurement]:
    """Returns latency and throughput of ONNX files, measured interleaved.

    A Q/DQ graph runs as INT8; a float graph runs in every asked float precision the engine has, FP32 if none is
    asked. A graph with a static batch is measured at that batch size alone.

    Raises:
        UsageError: a precision is asked for that the engine does not have.
        ExportError: a file is not an ONNX model.
    """
    opened = open_engine(engine, threads=threads)
    known = [precision for precision in opened.precisions() if precision != "int8"]
    unknown = [precision for precision in precisions if precision not in known]
    if unknown:
        identity = opened.identity()
        raise UsageError(f"--precision is {unknown[0]!r}; {identity.name} on {identity.device} has {', '.join(known)}.")
    plan: list[tuple[Path, Precision, int]] = []
    for path in models:
        summary = summarize_onnx(path)
        wanted: Sequence[str] = ["int8"] if summary.quantize_nodes else list(precisions) or ["fp32"]
        sizes = [summary.input_shape[0]] if summary.input_shape[0] else list(batch_sizes)
        plan += [(path, cast(Precision, precision), size) for size in sizes for precision in wanted]
    return measure_files(plan, engine=opened, duration_s=duration_s)


def export_files(
    checkpoint: str,
    *,
    name: str,
    precision: str,
    batch_sizes: Sequence[int],
    input_shape: tuple[int, int, int],
    directory: Path,
) -> list[str]:
    """Writes a checkpoint, local or in S3, as ONNX, one file per batch size, one with a dynamic batch if none is given.

    Returns:
        The paths of the files.

    Raises:
        PtqError: the checkpoint cannot be used or the folder cannot be written.
    """
    check_output_directory(directory)
    called = ModelConfig.model_construct(name=name, checkpoint=checkpoint, publish_as="").published_name
    written = []
    sizes: Sequence[int | None] = batch_sizes or [None]
    with checkpoint_file(checkpoint) as file:
        for size in sizes:
            batch = "dynamic" if size is None else f"batch{size}"
            path = directory / f"{called}_{precision}_{batch}.onnx"
            write_float_model(
                path, name=name, checkpoint=file, precision=precision, input_shape=input_shape, batch_size=size
            )
            written.append(str(path))
    return written


def check_file(model: Path, *, dialect: str | None, float_layers: Sequence[str]) -> GraphChecks:
    """Returns the findings of the graph checks in one ONNX file; ExportError if it is none."""
    return check_graph(model, dialect=cast(Dialect | None, dialect), allowed_float_layers=float_layers)
