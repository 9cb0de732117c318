"""Where do a model's quantizers go, and what was made of its network?"""

from dataclasses import dataclass, replace
from typing import Literal

from ptq.config import Dialect
from ptq.records.base import ArtifactRef


@dataclass(frozen=True, slots=True)
class QuantizerSpec:
    """One quantizer of the model.

    `name` is unique; for an activation it is the tensor it quantizes, for a weight its layer. `observed` is
    the tensor whose distribution decides amax: behind a pool that commutes with the quantizer, else the
    quantized tensor itself. `axis` is the axis kept, None for per tensor. `never_negative` is proved from
    the graph. `readers` are the nodes that read the quantized value; `tensors` the tensors it is put on, more
    than one where the operands of a concat share one scale. `dialect` is set for one that the graphs of other dialects
    have not.
    """

    name: str
    kind: Literal["activation", "weight"]
    observed: str
    axis: int | None
    never_negative: bool
    readers: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    dialect: Dialect | None = None


@dataclass(frozen=True, slots=True)
class LayerInput:
    """Which activation quantizer's tensor a quantized layer reads, and the tensor's channel axis."""

    layer: str
    quantizer: str
    channel_axis: int


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """Where quantizers go, and what stays in float and why.

    `float_operators` are the ONNX operators that were left in float by choice wherever they would be quantized, and
    `chosen_float_layers` the layers that were.
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
    chosen_float_layers: tuple[str, ...] = ()

    def of_dialect(self, dialect: Dialect) -> "PlacementPlan":
        """Returns the plan of the graphs of one dialect."""
        return replace(self, quantizers=tuple(spec for spec in self.quantizers if spec.dialect in (None, dialect)))

    @property
    def activations(self) -> tuple[QuantizerSpec, ...]:
        """The activation quantizers, in the order of the graph."""
        return tuple(spec for spec in self.quantizers if spec.kind == "activation")

    @property
    def weights(self) -> tuple[QuantizerSpec, ...]:
        """The weight quantizers, in the order of the graph."""
        return tuple(spec for spec in self.quantizers if spec.kind == "weight")


@dataclass(frozen=True, slots=True)
class LayerInFloat:
    """A convolution or linear layer without quantizers; `macs` are its multiply-accumulates for one image."""

    name: str
    macs: int
    reason: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of a network's convolutions and linear layers are quantized, of all that its FP32 graph calls.

    `macs` are multiply-accumulates for one image, `int8_macs` those of quantized layers, `chosen_macs` those that the
    settings leave in float. `batchnorms` are those that could not be folded into a layer.
    """

    layers: int
    int8_layers: int
    macs: int
    int8_macs: int
    chosen_macs: int
    batchnorms: int
    in_float: tuple[LayerInFloat, ...]

    @property
    def int8_macs_percent(self) -> float:
        """The share of multiply-accumulates that is quantized, of those that are not left in float by choice."""
        wanted = self.macs - self.chosen_macs
        return 100.0 * self.int8_macs / wanted if wanted else 100.0


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A loaded checkpoint: the BatchNorm-folded network as FP32 ONNX and as weights, and its placement plan.

    `observed_onnx` is the FP32 graph with every observed tensor as an output. `source` is what is quantized: the
    PyTorch network, or an ONNX file or export, whose `weights` are the FP32 graph in canonical form. `is_trained`
    says that its weights are no longer those of the FP32 graph.
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
    coverage: Coverage
    source: Literal["torch", "onnx"] = "torch"
    is_trained: bool = False
