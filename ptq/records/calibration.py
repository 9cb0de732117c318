"""Which images were drawn, and which statistics and amax tables came of them?"""

from dataclasses import dataclass

from ptq.records.base import ArtifactRef
from ptq.records.data import PreparedImages


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
    def is_trained(self) -> bool:
        """Whether QAT has changed the network's weights."""
        return self.method.endswith("_qat")

    @property
    def identity(self) -> str:
        """What makes two candidates one: the digests of the table and of the biases."""
        return f"{self.table.sha256}{self.biases.sha256 if self.biases else ''}"
