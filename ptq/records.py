"""What did the pipeline find?

Small frozen values that stages hand to each other: numbers, names and references to stored objects. Tensors,
tables and models never travel in them, nor do counts per class: each element of a record costs microseconds at every
stage that takes it. Every record is JSON after `to_jsonable`, and comes back with
`record_from_json`.
"""

import hashlib
import json
import statistics
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from ptq.config import Dialect, Precision

Record = TypeVar("Record")


def to_jsonable(value: Any) -> Any:
    """Returns `value` (a record, a config section, or a collection of them) as plain JSON types."""
    return to_jsonable_python(value)


def record_from_json(kind: type[Record], value: Any) -> Record:
    """Returns the record of type `kind` whose `to_jsonable` form is `value`; pydantic's error if it does not fit."""
    return TypeAdapter(kind).validate_python(value)


def digest(value: Any) -> str:
    """Returns the SHA-256, in hexadecimal, of the canonical JSON form of `value`.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(to_jsonable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """A stored object: the name a person would give the file, the SHA-256 of its bytes, and its size."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SplitCount:
    """How many images of each class a split holds; `images_per_class` is in the order of the data's classes."""

    split: str
    images: int
    images_per_class: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DataRecord:
    """The indexed images. `table` is Parquet: path, label (class index), split, sha256 of the file."""

    table: ArtifactRef
    root: str
    class_names: tuple[str, ...]
    has_named_classes: bool
    splits: tuple[SplitCount, ...]
    duplicates_across_splits: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedImages:
    """Decoded, resized and cropped images of one purpose: `pixels` is uint8 (n, h, w, c), `labels` int64 (n,)."""

    pixels: ArtifactRef
    labels: ArtifactRef
    images: int
    sha256_of_files: ArtifactRef


@dataclass(frozen=True, slots=True)
class LayerLength:
    """How many images a layer's amax needed to come within the tolerance and stay there; None if it did not.

    `interval_percent` is half the width of its 95 % interval at the last look, in percent of amax; None where the
    layer had only zeros. See `adaptive.widest_intervals`.
    """

    name: str
    images_needed: int | None
    interval_percent: float | None


@dataclass(frozen=True, slots=True)
class TrialLength:
    """How many images a trial of adaptive length used, and what each of its layers needed."""

    images: int
    layers: tuple[LayerLength, ...]

    @property
    def is_tight(self) -> bool:
        """Whether every layer was within the tolerance at the end."""
        return all(layer.images_needed is not None for layer in self.layers)


@dataclass(frozen=True, slots=True)
class CalibrationDraws:
    """`indices[t]` are the positions, among the prepared calibration images, of trial `t`'s draw.

    `warnings` names what a reader should know of the draws (classes never drawn, for example). `lengths` has an entry
    per trial once images were used adaptively; `indices` then are those really used. Before, where the length is to
    be adaptive, `indices` are in the order in which they will be used.
    """

    prepared: PreparedImages
    indices: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...]
    lengths: tuple[TrialLength, ...] = ()


@dataclass(frozen=True, slots=True)
class QuantizerSpec:
    """One quantizer of the model.

    `name` is unique; for an activation it is the tensor it quantizes, for a weight its layer. `observed` is
    the tensor whose distribution decides amax: behind a pool that commutes with the quantizer, else the
    quantized tensor itself. `axis` is the axis kept, None for per tensor. `never_negative` is proved from
    the graph. `readers` are the nodes that read the quantized value; `tensors` the tensors it is put on, more
    than one where the operands of a concat share one scale.
    """

    name: str
    kind: Literal["activation", "weight"]
    observed: str
    axis: int | None
    never_negative: bool
    readers: tuple[str, ...]
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerInput:
    """Which activation quantizer's tensor a quantized layer reads, and the tensor's channel axis."""

    layer: str
    quantizer: str
    channel_axis: int


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """Where quantizers go, and what stays in float and why.

    `float_operators` are the ONNX operators that were left in float by choice wherever they would be quantized.
    """

    quantizers: tuple[QuantizerSpec, ...]
    quantized_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    residual_adds: int
    quantized_residual_adds: int
    traced: bool
    warnings: tuple[str, ...]
    layer_inputs: tuple[LayerInput, ...] = ()
    float_operators: tuple[str, ...] = ()

    @property
    def activations(self) -> tuple[QuantizerSpec, ...]:
        """The activation quantizers, in the order of the graph."""
        return tuple(spec for spec in self.quantizers if spec.kind == "activation")

    @property
    def weights(self) -> tuple[QuantizerSpec, ...]:
        """The weight quantizers, in the order of the graph."""
        return tuple(spec for spec in self.quantizers if spec.kind == "weight")


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A loaded checkpoint: the BatchNorm-folded network as FP32 ONNX and as weights, and its placement plan.

    `observed_onnx` is the FP32 graph with every observed tensor as an output. `source` is what was given: weights of a
    PyTorch network, or an ONNX file, whose `weights` are the FP32 graph in canonical form.
    """

    name: str
    checkpoint_sha256: str
    weights: ArtifactRef
    fp32_onnx: ArtifactRef
    observed_onnx: ArtifactRef
    plan: ArtifactRef
    input_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    warnings: tuple[str, ...]
    source: Literal["torch", "onnx"] = "torch"


@dataclass(frozen=True, slots=True)
class StatisticsRecord:
    """Histograms of every trial: npz with counts (trials, tensors, bins), exponents, maxima, zeros.

    `channel_means` is npz with a float64 array per trial and tensor, named `<trial>.<tensor>`. `draws` are the images
    really used.
    """

    histograms: ArtifactRef
    channel_means: ArtifactRef
    tensors: tuple[str, ...]
    draws: CalibrationDraws


@dataclass(frozen=True, slots=True)
class AmaxRecord:
    """The amax of every activation quantizer for one trial and method, and the corrected biases that go with them.

    `biases` is npz by layer name, None where biases are left alone. `method` is the
    label of one a person may choose (`config.LabelledMethod`), or names a fallback: `per_layer`, or a label followed
    by `_float` and a number of layers, or by `_qat`.
    """

    trial: int
    method: str
    table: ArtifactRef
    biases: ArtifactRef | None = None

    @property
    def identity(self) -> str:
        """What makes two candidates one: the digests of the table and of the biases."""
        return f"{self.table.sha256}{self.biases.sha256 if self.biases else ''}"


@dataclass(frozen=True, slots=True)
class GraphRecord:
    """A Q/DQ graph in one dialect."""

    onnx: ArtifactRef
    dialect: Dialect
    quantizers: int


@dataclass(frozen=True, slots=True)
class GraphFinding:
    """One finding of a graph check; `node` is empty where it concerns the whole graph."""

    check: str
    severity: Literal["error", "warning", "info"]
    node: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class GraphChecks:
    """What the graph checks found in one file."""

    graph: str
    checks_run: tuple[str, ...]
    findings: tuple[GraphFinding, ...]

    @property
    def errors(self) -> int:
        """Number of findings that make the graph unfit."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        """Number of findings that cost speed or accuracy."""
        return sum(finding.severity == "warning" for finding in self.findings)


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Which engine, at which version, on which device, with how many threads (0 for a GPU)."""

    name: str
    version: str
    device: str
    threads: int


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer as the engine runs it. Types are "int8", "uint8", "fp32", "fp16", "bf16" or the engine's word."""

    name: str
    kind: str
    input_type: str
    output_type: str
    kernel: str


@dataclass(frozen=True, slots=True)
class Int8Share:
    """What ran in INT8: convolutions and linear layers, in percent of their number, and conversions between types."""

    layers: int
    int8_input_percent: float
    int8_output_percent: float
    reformats: int
    float_layers: tuple[str, ...]
    reformat_layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """A graph built for one engine, precision and batch size; `build_settings` are texts "name: value"."""

    engine: EngineIdentity
    precision: Precision
    batch_size: int
    onnx_sha256: str
    blob: ArtifactRef
    int8: Int8Share
    build_s: float
    build_settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SplitMetrics:
    """Metrics of one model on one split, a fixed number of them: what grows with the classes is `metrics.ClassMetrics`.

    `sqnr_db` is the signal-to-quantization-noise ratio of the logits against FP32's, and `agreement_percent`
    the share of images with FP32's top-1; both are None for FP32 itself.
    """

    split: str
    images: int
    top1_percent: float
    top5_percent: float
    loss: float
    sqnr_db: float | None
    agreement_percent: float | None


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One model measured on the engine. `candidate` is "fp32" for the baseline.

    `predictions` is Parquet: split, index, sha256, label, prediction, loss; `logits` is npz, one array a split.
    """

    candidate: str
    trial: int | None
    method: str | None
    splits: tuple[SplitMetrics, ...]
    predictions: ArtifactRef
    logits: ArtifactRef

    def on(self, split: str) -> SplitMetrics:
        """Returns the metrics on `split`; KeyError, naming the splits there are, if it was not measured."""
        for metrics in self.splits:
            if metrics.split == split:
                return metrics
        raise KeyError(f"{self.candidate} was not measured on {split!r}, only on {[m.split for m in self.splits]}")


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """INT8 against FP32 on the same images.

    `drop_pp` is FP32 top-1 minus INT8 top-1; the interval is 95 %; `mcnemar_p` is exact and two-sided.
    `flipped` counts images whose prediction changed at all.
    """

    images: int
    drop_pp: float
    drop_interval_pp: tuple[float, float]
    mcnemar_p: float
    fp32_only_correct: int
    int8_only_correct: int
    flipped: int


@dataclass(frozen=True, slots=True)
class FlippedImage:
    """An image whose prediction changed: its file, label, and both predictions, as class indices."""

    path: str
    label: int
    fp32_prediction: int
    int8_prediction: int


@dataclass(frozen=True, slots=True)
class MethodSpread:
    """Top-1 of one method over the trials, in percent; `std_pp` is the sample standard deviation (0 for one trial)."""

    method: str
    mean_top1_percent: float
    min_top1_percent: float
    max_top1_percent: float
    std_pp: float


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen candidate and why.

    `sampling_std_pp` is the standard deviation of the drop expected from the finite test set alone.
    """

    candidate: str
    trial: int
    method: str
    table: ArtifactRef
    selection_split: str
    test_split: str
    reason: str
    comparison: PairedComparison
    flipped_images: tuple[FlippedImage, ...]
    spreads: tuple[MethodSpread, ...]
    sampling_std_pp: float
    spread_sentence: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """Latency of one precision at one batch size. `samples_ms` are the raw measurements of every round, in order."""

    precision: Precision
    batch_size: int
    samples_ms: tuple[float, ...]
    median_ms: float
    mean_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    throughput_images_per_s: float
    rounds_median_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Latency of one precision at one batch size with its transfers, where the engine measures compute apart.

    `samples_ms` are upload + compute + download of one inference at a time; throughput is over the clock of the host.
    """

    precision: Precision
    batch_size: int
    samples_ms: tuple[float, ...]
    median_ms: float
    p99_ms: float
    throughput_images_per_s: float
    upload_median_ms: float
    compute_median_ms: float
    download_median_ms: float
    enqueue_median_ms: float


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """The same engine measured by trtexec: its median GPU compute time and what this project measured, in ms."""

    precision: Precision
    batch_size: int
    trtexec_median_ms: float
    own_median_ms: float
    command: str


@dataclass(frozen=True, slots=True)
class BenchmarkRecord:
    """Latency and throughput of every precision and batch size, measured interleaved on one machine.

    `red_flags` are sentences about batch sizes at which INT8 does not pay. `mode` says what a latency covers.
    `end_to_end` is empty where the engine measures only one thing.
    """

    engine: EngineIdentity
    machine: str
    clock_mhz: float | None
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]
    red_flags: tuple[str, ...] = ()
    mode: str = ""
    end_to_end: tuple[EndToEnd, ...] = ()
    cross_checks: tuple[CrossCheck, ...] = ()

    def of(self, precision: str, batch_size: int) -> Measurement | None:
        """Returns the measurement of `precision` at `batch_size` images, None if there is none."""
        for measurement in self.measurements:
            if measurement.precision == precision and measurement.batch_size == batch_size:
                return measurement
        return None


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Accepted or not, with one reason in words per condition."""

    accepted: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantizerChoice:
    """The method whose amax keeps the logits closest to FP32's when this quantizer alone is active."""

    name: str
    method: str
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """A method for every activation quantizer, and the amax table they make."""

    amax: AmaxRecord
    choices: tuple[QuantizerChoice, ...]
    what: str


@dataclass(frozen=True, slots=True)
class FloatGroup:
    """Layers that one attempt leaves in float; `what` names them with their SQNR."""

    layers: tuple[str, ...]
    what: str


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """SQNR of the logits against FP32's, in dB, when this layer's quantizers alone are active."""

    layer: str
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class LayerRanking:
    """The quantized layers, the most sensitive first, and the groups of them to leave in float, in order."""

    layers: tuple[LayerSensitivity, ...]
    groups: tuple[FloatGroup, ...]


@dataclass(frozen=True, slots=True)
class FineTuning:
    """A model with weights from quantization-aware training.

    `losses[i]` is the cross-entropy of the fake-quantized model after i epochs, in nats, on the images it was trained
    on; `kept_epoch` is where it is least, and `model` has the weights of that epoch.
    """

    model: ModelRecord
    losses: tuple[float, ...]
    kept_epoch: int
    what: str


AttemptKind = Literal["per_layer_method", "float_layers", "qat"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What was tried after a rejection, and what it reached on the test split."""

    kind: AttemptKind
    what: str
    candidate: str
    comparison: PairedComparison
    decision: GateDecision


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The published version that a run would replace: its graph and amax table, or the obstacle to comparing them."""

    version: str
    onnx: ArtifactRef | None
    amax: ArtifactRef | None
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class ServedLatency:
    """Median latencies in ms of the new graph and of the version in service, measured in turns.

    `turns_ratio` is new over served, turn by turn.
    """

    batch_size: int
    new_median_ms: float
    served_median_ms: float
    turns_ratio: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """New over served, the median of the turns: above 1 the new graph is slower.

        A machine that is busy for a while slows both of a turn, where it may slow most samples of one alone.
        """
        return statistics.median(self.turns_ratio)


@dataclass(frozen=True, slots=True)
class AmaxDrift:
    """The amax of one activation quantizer in the new model and in the version in service, in the tensor's units."""

    quantizer: str
    new_amax: float
    served_amax: float


ServedDecision = Literal["accept", "regress", "inconclusive"]


@dataclass(frozen=True, slots=True)
class ServedComparison:
    """A new model against the version in service, on the same images and in turns on the same engine.

    `paired` has the version in service in FP32's place and the new model in INT8's, None where they cannot be
    compared. `drift` is ordered by the ratio of the amax, the largest change first, over the quantizers both have.
    """

    version: str
    decision: ServedDecision
    reasons: tuple[str, ...]
    served_top1_percent: float | None
    new_top1_percent: float | None
    paired: PairedComparison | None
    latencies: tuple[ServedLatency, ...]
    drift: tuple[AmaxDrift, ...]
    quantizers_of_one_alone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Publication:
    """What was published under `models/<name>/`; `published` is False where the gate rejected the model.

    `is_new` is False where this version was the latest before.
    """

    published: bool
    model: str
    version: str
    replaced: str
    is_new: bool = False


RunDecision = Literal["accept", "reject", "regress", "inconclusive"]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run of `quantize_model` returns. `decision` is accept, reject (by the gate), regress or inconclusive.

    `is_new` is False where nothing was published, or what was in service before. `page` is the run's page, empty
    where there is no server. `waited_s` is how long it waited for its model's turn itself.
    """

    run_id: str
    accepted: bool
    reasons: tuple[str, ...]
    output_directory: str
    verdict: ArtifactRef
    model: str
    version: str
    decision: RunDecision
    sentence: str
    top1_percent: float
    drop_pp: float
    is_new: bool
    page: str = ""
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RunFindings:
    """Everything a finished run found, for its verdict and report. `graphs` begins with the evaluated one.

    `served` is None where nothing was published before, where this is the published version, or where the gate
    rejected the model before.

    `candidates` holds one evaluation per distinct amax table, `tables` one entry per trial and method. `attempts` is
    what was tried after the first rejection; the rest is about the accepted attempt, else about the first candidate.
    """

    model: ModelRecord
    data: DataRecord
    draws: CalibrationDraws
    tables: tuple[AmaxRecord, ...]
    baseline: EvaluationRecord
    candidates: tuple[EvaluationRecord, ...]
    selection: Selection
    graphs: tuple[GraphRecord, ...]
    checks: tuple[GraphChecks, ...]
    engines: tuple[EngineRecord, ...]
    benchmark: BenchmarkRecord
    decision: GateDecision
    publication: Publication
    attempts: tuple[Attempt, ...] = ()
    served: ServedComparison | None = None


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """A trained checkpoint and its top-1 on the held-out split, None where there was none."""

    checkpoint: ArtifactRef
    held_out_top1_percent: float | None
