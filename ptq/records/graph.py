"""What was found about ONNX files and the engines built of them?"""

from dataclasses import dataclass
from typing import Literal

from ptq.config import Dialect, Precision
from ptq.records.base import ArtifactRef


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
    """Which engine, at which version, on which device, with how many threads (0 for a GPU).

    `isa` is the instruction set that the engine's kernels use, as `ptq.engines.isa` names it: processors of one name
    differ in it, and so in their results. Empty where it changes no result.
    """

    name: str
    version: str
    device: str
    threads: int
    isa: str = ""


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
