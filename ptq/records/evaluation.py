"""How right is each candidate, and which was selected?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptq.config import METHODS
from ptq.records.base import ArtifactRef
from ptq.records.calibration import AmaxRecord


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
class IsaEvaluation:
    """One model under one instruction set: metrics, and the median latency at batch 1 in ms."""

    isa: str
    metrics: SplitMetrics
    median_ms: float


@dataclass(frozen=True, slots=True)
class IsaEvaluations:
    """One model under each instruction set asked for, on the test split against FP32."""

    found: tuple[IsaEvaluation, ...] = ()


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

    def table_among(self, tables: Sequence[AmaxRecord]) -> AmaxRecord:
        """Returns the amax table of the chosen candidate."""
        return next(each for each in tables if (each.method, each.trial) == (self.method, self.trial))


def in_method_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Returns the labels once each: max, percentile, mse, entropy in this order, then others; else as they come.

    >>> in_method_order(["mse", "max_float1", "percentile-99.9", "percentile-99", "max", "mse"])
    ('max', 'percentile-99.9', 'percentile-99', 'mse', 'max_float1')
    """
    position: dict[str, int] = {method: index for index, method in enumerate(METHODS)}

    def place(label: str) -> int:
        method, _, more = label.partition("-")
        # The name of a fallback is that of a method with an underscore and more behind it.
        return len(METHODS) if "_" in more else position.get(method, len(METHODS))

    return tuple(sorted(dict.fromkeys(labels), key=place))
