"""What was decided about a run's model, and why?"""

from dataclasses import dataclass
from typing import Literal

from ptq.records.base import ArtifactRef
from ptq.records.benchmark import BenchmarkRecord, PublishedLatency
from ptq.records.calibration import AmaxRecord, CalibrationDraws
from ptq.records.data import DataRecord
from ptq.records.evaluation import EvaluationRecord, IsaEvaluation, PairedComparison, Selection
from ptq.records.graph import EngineRecord, GraphChecks, GraphRecord
from ptq.records.parity import ParityRecord
from ptq.records.plan import ModelRecord


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
class PublishedModel:
    """The published version that a run would replace: its graph and amax table, or the obstacle to comparing them."""

    version: str
    onnx: ArtifactRef | None
    amax: ArtifactRef | None
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class AmaxDrift:
    """The amax of one activation quantizer in the new model and in the version in service, in the tensor's units."""

    quantizer: str
    new_amax: float
    published_amax: float


PublishedDecision = Literal["accept", "regress", "inconclusive"]


@dataclass(frozen=True, slots=True)
class PublishedComparison:
    """A new model against the version in service, on the same images and in turns on the same engine.

    `paired` has the version in service in FP32's place and the new model in INT8's, None where they cannot be
    compared. `drift` is ordered by the ratio of the amax, the largest change first, over the quantizers both have.
    """

    version: str
    decision: PublishedDecision
    reasons: tuple[str, ...]
    published_top1_percent: float | None
    new_top1_percent: float | None
    paired: PairedComparison | None
    latencies: tuple[PublishedLatency, ...]
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

    `versus_published` is None where nothing was published before, where this is the published version, or where the
    gate rejected the model before.

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
    parity: ParityRecord
    isas: tuple[IsaEvaluation, ...]
    engines: tuple[EngineRecord, ...]
    benchmark: BenchmarkRecord
    decision: GateDecision
    publication: Publication
    attempts: tuple[Attempt, ...] = ()
    versus_published: PublishedComparison | None = None
