"""What does `verdict.json` hold?

The one file a program reads after a run, as a pydantic model with a version. Reading with this model is the
validation; nothing is computed here. A part says which fields of a record the file shows and under which name, and is
made by `model_validate(record)`; a record that the file shows whole is a part itself.
"""

from pydantic import BaseModel, ConfigDict, Field

from ptq.records.calibration import LayerLength
from ptq.records.decision import GateDecision, PublishedDecision
from ptq.records.parity import Cause


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", from_attributes=True, validate_by_name=True, validate_by_alias=True
    )


class VerdictEngine(_Part):
    """The engine everything was measured on."""

    name: str
    version: str
    device: str
    isa: str = ""


class VerdictBaseline(_Part):
    """FP32 on the test split."""

    top1_percent: float
    n_images: int = Field(validation_alias="images", ge=1)
    loss: float


class VerdictCandidate(_Part):
    """One candidate on the test split. `same_as` names the candidate with the identical amax table, or is empty."""

    id: str
    trial: int
    method: str
    top1_percent: float
    drop_pp: float
    loss: float
    same_as: str = ""


class VerdictTrial(_Part):
    """The images a trial used. `layers` is empty where their number was fixed."""

    trial: int
    images: int
    layers: tuple[LayerLength, ...] = ()


class VerdictBest(_Part):
    """The chosen candidate against FP32 on the same images."""

    id: str
    method: str
    trial: int
    top1_percent: float
    drop_pp: float
    drop_interval_pp: tuple[float, float]
    mcnemar_p: float = Field(ge=0, le=1)
    flipped_images: int = Field(ge=0)


class VerdictLatency(_Part):
    """Latency of one batch, in milliseconds."""

    median: float = Field(validation_alias="median_ms")
    p90: float = Field(validation_alias="p90_ms")
    p99: float = Field(validation_alias="p99_ms")


class VerdictMeasurement(_Part):
    """One precision at one batch size."""

    precision: str
    batch_size: int
    latency_ms: VerdictLatency
    images_per_s: float


class VerdictInt8(_Part):
    """What ran in INT8."""

    conv_int8_input_percent: float = Field(validation_alias="int8_input_percent")
    conv_int8_output_percent: float = Field(validation_alias="int8_output_percent")
    reformats: int


class VerdictGraphChecks(_Part):
    """Number of findings."""

    errors: int
    warnings: int


class VerdictFloatLayer(_Part):
    """A layer that stays in float, and why."""

    name: str
    macs: int
    reason: str


class VerdictCoverage(_Part):
    """How many convolutions and linear layers are quantized, and their share of all multiply-accumulates."""

    layers: int
    int8_layers: int
    int8_macs_percent: float
    batchnorms: int
    in_float: tuple[VerdictFloatLayer, ...]


class VerdictParity(_Part):
    """The INT8 model on its engine and its file in float, both against FP32. `layer` is where they part, or empty."""

    images: int
    engine_sqnr_db: float
    file_sqnr_db: float
    layer: str = ""
    cause: Cause | None = None


class VerdictIsa(_Part):
    """INT8 on the test split under one instruction set; the latency is that of batch 1, in ms."""

    isa: str
    top1_percent: float
    drop_pp: float
    sqnr_db: float | None
    median_ms: float


class VerdictPublished(_Part):
    """The new model against the version in service, on the same images and in turns on the same engine.

    `change_pp` is the new top-1 minus that of the version in service. `latency_ratio` is new over published, by batch
    size; `amax_factor` is how far each quantizer's amax moved, at least 1. Empty or None where it cannot be compared.
    """

    version: str
    decision: PublishedDecision
    reasons: tuple[str, ...]
    top1_percent: float | None
    change_pp: float | None
    mcnemar_p: float | None
    latency_ratio: dict[str, float]
    amax_factor: dict[str, float]


class VerdictFile(_Part):
    """A file of the run in the store."""

    uri: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Verdict(_Part):
    """The whole file. `schema` is its version; `red_flags` say where INT8 does not beat the best float precision."""

    schema_version: int = Field(1, alias="schema", ge=1, le=1)
    run_id: str
    model: str
    checkpoint_sha256: str
    config_sha256: str
    engine: VerdictEngine
    fp32: VerdictBaseline
    calibration: tuple[VerdictTrial, ...] = ()
    candidates: tuple[VerdictCandidate, ...] = Field(min_length=1)
    best: VerdictBest
    benchmark: tuple[VerdictMeasurement, ...]
    red_flags: tuple[str, ...] = ()
    coverage: VerdictCoverage | None = None
    int8: VerdictInt8
    graph_checks: VerdictGraphChecks
    parity: VerdictParity | None = None
    isas: tuple[VerdictIsa, ...] = ()
    gate: GateDecision
    in_service: VerdictPublished | None = None
    files: dict[str, VerdictFile]
    versions: dict[str, str]
    stage_seconds: dict[str, float]
