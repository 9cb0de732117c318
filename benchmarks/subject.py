"""What do the benchmarks measure?

Prepares a checkpoint and images once, through the core's own functions, and turns amax tables into graphs. Results
are written with machine and versions.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptq.calibration.amax_tables import amax_table
from ptq.calibration.calibrate import (
    RANGE_IMAGES,
    corrected_biases,
    means_by_name,
    ranges_from_files,
    statistics_from_files,
)
from ptq.config import Dialect, Method, PreprocessingConfig, QuantizationConfig
from ptq.data import decoding, index, sampling
from ptq.data.images import network_input
from ptq.evaluation.benchmark import machine_description
from ptq.files import npy_from_array
from ptq.graph.candidate import write_candidate
from ptq.graph.insertion import write_qdq_template
from ptq.numerics.histogram import Histograms
from ptq.provenance import library_versions
from ptq.quantization.prepare_onnx import equalize_onnx_model, prepare_onnx_model
from ptq.quantization.prepare_torch import equalize_model, prepare_torch_model, write_template
from ptq.quantization.prepared import PreparedModel


def arguments(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that name a model and its images."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="torchvision classifier or package.module:factory")
    parser.add_argument("--checkpoint", required=True, type=Path, help="weights, or an ONNX file for itself")
    parser.add_argument("--data", required=True, help="image folder or manifest")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--mean", type=float, nargs="+", default=[0.485, 0.456, 0.406])
    parser.add_argument("--std", type=float, nargs="+", default=[0.229, 0.224, 0.225])
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--name", default="", help="name in the results; default: the model's")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser


@dataclass
class Subject:
    """A prepared model with its placement, calibration histograms and test images."""

    options: argparse.Namespace
    quantization: QuantizationConfig
    directory: Path
    whole_operators: bool = False

    def __post_init__(self) -> None:
        """Loads the model and the index of the images."""
        options = self.options
        self.preprocessing = PreprocessingConfig(
            channels=options.channels, resize=options.resize, crop=options.crop, mean=tuple(options.mean),
            std=tuple(options.std),
        )  # fmt: skip
        self.index = index.index_images(
            options.data, calibration_split="train", selection_split="val", test_split="test"
        )
        self.shape = (options.channels, options.crop, options.crop)
        self.is_onnx = options.checkpoint.suffix == ".onnx"
        prepare = prepare_onnx_model if self.is_onnx else partial(prepare_torch_model, name=options.model)
        self.prepared: PreparedModel = prepare(
            checkpoint=options.checkpoint,
            class_count=len(self.index.class_names),
            has_named_classes=self.index.has_named_classes,
            input_shape=self.shape,
            quantization=self.quantization,
            directory=self.directory,
            whole_operators=self.whole_operators,
        )
        self.files: dict[str, Path] = dict(self.prepared.files)
        if self.quantization.equalization:
            self._equalize()
        self.template = self.directory / "template.onnx"
        method = self.quantization.weight_method
        if self.is_onnx:
            write_qdq_template(self.files["weights"], self.template, plan=self.prepared.plan, weight_method=method)
            return
        write_template(
            self.template, weights=self.files["weights"], plan=self.prepared.plan, name=options.model,
            num_classes=self.prepared.num_classes, input_shape=self.shape, weight_method=method,
        )  # fmt: skip

    def _equalize(self) -> None:
        pixels = self.directory / "ranges.npy"
        pixels.write_bytes(npy_from_array(self._drawn(RANGE_IMAGES, seed=0)[0]))
        ranges = ranges_from_files(
            observed_onnx=self.files["observed_onnx"], plan=self.prepared.plan, pixels=pixels, images=RANGE_IMAGES,
            mean=self.preprocessing.mean, std=self.preprocessing.std, threads=0,
        )  # fmt: skip
        kind = {
            "name": self.options.model, "num_classes": self.prepared.num_classes, "input_shape": self.shape,
        }  # fmt: skip
        equalize = equalize_onnx_model if self.is_onnx else partial(equalize_model, **kind)
        files, _ = equalize(
            weights=self.files["weights"], plan=self.prepared.plan, ranges=ranges, directory=self.directory
        )
        self.files.update(files)

    def _drawn(self, images: int, *, seed: int) -> tuple[np.ndarray, list[list[str]]]:
        """Pixels, and path and digest, of a stratified draw of calibration images."""
        rows = index.rows_of_split_table(self.index.table, "train")
        labels = np.array([row.label for row in rows])
        chosen = [rows[i] for i in sampling.draw_stratified(labels, images=min(images, len(rows)), seed=seed)]
        pixels = decoding.decode_rows(chosen, root=str(self.index.root), preprocessing=self.preprocessing)
        return pixels, [[row.path, row.sha256] for row in chosen]

    def calibration_inputs(self, *, seed: int = 0) -> np.ndarray:
        """Returns the images that `histograms` reads as the network reads them."""
        pixels, _ = self._drawn(self.options.calibration_images, seed=seed)
        return network_input(pixels, mean=self.preprocessing.mean, std=self.preprocessing.std)

    def images(self, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first images of a stratified draw of a split as the network reads them, and their labels."""
        rows = index.rows_of_split_table(self.index.table, split)
        labels = np.array([row.label for row in rows])
        if count < len(rows):
            rows = [rows[i] for i in sampling.draw_stratified(labels, images=count, seed=0)]
        pixels = decoding.decode_rows(rows, root=str(self.index.root), preprocessing=self.preprocessing)
        inputs = network_input(pixels, mean=self.preprocessing.mean, std=self.preprocessing.std)
        return inputs, np.array([row.label for row in rows])

    def histograms(self, seed: int = 0) -> Histograms:
        """Returns the activation histograms of one draw of calibration images."""
        pixels, files = self._drawn(self.options.calibration_images, seed=seed)
        (self.directory / "pixels.npy").write_bytes(npy_from_array(pixels))
        (self.directory / "files.json").write_text(json.dumps(files))
        (trial,) = statistics_from_files(
            observed_onnx=self.files["observed_onnx"],
            plan=self.prepared.plan,
            pixels=self.directory / "pixels.npy",
            files=self.directory / "files.json",
            draws=[range(len(pixels))],
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            bins=4096,
            threads=0,
        )
        self.means = means_by_name([trial], plan=self.prepared.plan)
        return trial.histograms

    def amax(
        self, histograms: Histograms, dialect: Dialect, method: Method, percentile: float = 99.99
    ) -> dict[str, float]:
        """Returns the amax table of one method."""
        return amax_table(histograms, plan=self.prepared.plan, dialect=dialect, method=method, percentile=percentile)

    def biases(self) -> dict[str, np.ndarray]:
        """Returns the corrected biases from the images that `histograms` read."""
        return corrected_biases(self.template, plan=self.prepared.plan, means=self.means, trial=0)

    def graph(
        self, amax: dict[str, float], dialect: Dialect, name: str, biases: dict[str, np.ndarray] | None = None
    ) -> Path:
        """Writes the Q/DQ graph of an amax table and returns its path."""
        path = self.directory / f"{name}.onnx"
        write_candidate(
            self.template, path, plan=self.prepared.plan, dialect=dialect, activation_amax=amax, metadata={},
            biases=biases,
        )  # fmt: skip
        return path


def temporary_subject(
    options: argparse.Namespace, quantization: QuantizationConfig | None = None, *, whole_operators: bool = False
) -> Subject:
    """Returns a subject in a new temporary folder."""
    directory = Path(tempfile.mkdtemp(prefix="ptq-benchmark-"))
    return Subject(options, quantization or QuantizationConfig(), directory, whole_operators)


def write_result(options: argparse.Namespace, benchmark: str, found: Any) -> Path:
    """Writes a result with machine, versions and date, and returns its path."""
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{'_'.join(filter(None, (benchmark, options.name or options.model)))}.json"
    document = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine_description(),
        "versions": {"python": platform.python_version(), **library_versions()},
        "options": {
            key: value if isinstance(value, int | float | list) else Path(value).name if key != "model" else value
            for key, value in vars(options).items()
            if key != "results"
        },
        "found": found,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}")
    return path
