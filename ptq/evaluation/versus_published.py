"""Is a new model worse than the version in service?

Holds accuracy and latency of the two against limits, tells what is beyond chance from what is not, and orders the
layers by how far their amax has moved. It measures nothing and publishes nothing.
"""

import math
from collections.abc import Mapping, Sequence

from ptq.config import Dialect
from ptq.errors import PtqError
from ptq.graph.summary import summarize_onnx
from ptq.records.base import ArtifactRef
from ptq.records.benchmark import PublishedLatency
from ptq.records.decision import AmaxDrift, GateDecision, PublishedComparison, PublishedDecision, PublishedModel
from ptq.records.evaluation import PairedComparison
from ptq.storage.store import Store

# A layer whose amax changes by more than this factor sees other activations than before.
NOTABLE_DRIFT = 2.0
_LAYERS_NAMED = 3
_SEVEREST: tuple[PublishedDecision, ...] = ("regress", "inconclusive", "accept")


def compare(
    *,
    version: str,
    published_top1_percent: float,
    new_top1_percent: float,
    paired: PairedComparison,
    latencies: Sequence[PublishedLatency],
    published_amax: Mapping[str, float],
    new_amax: Mapping[str, float],
    max_regression_pp: float,
    max_slowdown: float,
) -> PublishedComparison:
    """Returns how a new model compares with the version in service, and whether it may take its place.

    A model is worse where its top-1 is more than `max_regression_pp` below, or its median latency more than
    `max_slowdown` times that of the version in service. It regresses where that is beyond chance: the 95 % interval
    of the drop does not reach 0, or a one-sided sign test says at 5 % that more than half of all turns would be slower
    by more than the limit. Where it is worse but chance can explain it, the comparison is inconclusive; else the model
    is accepted.

    Args:
        version: the version in service.
        published_top1_percent: its top-1 on the test split, in percent.
        new_top1_percent: the new model's, on the same images.
        paired: the two, image by image; the version in service in FP32's place.
        latencies: per batch size, measured in turns.
        published_amax: amax of each activation quantizer of the version in service.
        new_amax: the same of the new model.
        max_regression_pp: largest loss of top-1, in percentage points.
        max_slowdown: largest ratio of median latencies.

    Raises:
        ValueError: a median latency or a ratio is not a finite number above 0.
    """
    accuracy, accuracy_reason = _accuracy(paired, max_regression_pp)
    speed, speed_reason = _speed(latencies, max_slowdown)
    drift = amax_drift(published_amax, new_amax)
    decision = min((accuracy, speed), key=_SEVEREST.index)
    ordered = sorted(((accuracy, accuracy_reason), (speed, speed_reason)), key=lambda item: item[0] != decision)
    return PublishedComparison(
        version=version,
        decision=decision,
        reasons=(*(reason for _, reason in ordered if reason), *_drift_reasons(drift)),
        published_top1_percent=published_top1_percent,
        new_top1_percent=new_top1_percent,
        paired=paired,
        latencies=tuple(latencies),
        drift=drift,
        quantizers_of_one_alone=tuple(sorted(set(published_amax) ^ set(new_amax))),
    )


def incomparable(published: PublishedModel) -> PublishedComparison:
    """Returns the comparison with a version that cannot be compared: inconclusive, with its obstacle as the reason."""
    reason = (
        f"Version {published.version} in service cannot be compared: {published.obstacle}. Publish under another name "
        "(model.publish_as), or set gate.publish_inconclusive."
    )
    return PublishedComparison(
        version=published.version,
        decision="inconclusive",
        reasons=(reason,),
        published_top1_percent=None,
        new_top1_percent=None,
        paired=None,
        latencies=(),
        drift=(),
    )


def held_against(
    decision: GateDecision, comparison: PublishedComparison, *, publish_inconclusive: bool
) -> GateDecision:
    """Returns the gate's decision on an accepted model after its comparison with the version in service."""
    allowed = ("accept", "inconclusive") if publish_inconclusive else ("accept",)
    is_accepted = decision.accepted and comparison.decision in allowed
    if is_accepted:
        return GateDecision(True, (*decision.reasons, *comparison.reasons))
    word = "worse than" if comparison.decision == "regress" else "not shown to be as good as"
    head = f"The model is {word} version {comparison.version} in service, which stays."
    return GateDecision(False, (f"{head} {comparison.reasons[0]}", *comparison.reasons[1:], *decision.reasons))


def amax_drift(published: Mapping[str, float], new: Mapping[str, float]) -> tuple[AmaxDrift, ...]:
    """Returns the quantizers of both models, those first whose amax changed by the largest factor.

    >>> [found.quantizer for found in amax_drift({"conv1": 1.0, "fc": 4.0}, {"conv1": 1.5, "fc": 1.0})]
    ['fc', 'conv1']
    """
    drift = [AmaxDrift(key, float(new[key]), float(published[key])) for key in published if key in new]
    return tuple(sorted(drift, key=lambda item: (-drift_factor(item), item.quantizer)))


def drift_factor(drift: AmaxDrift) -> float:
    """Returns the factor by which an amax grew or shrank, at least 1; infinity where one of the two is 0.

    >>> drift_factor(AmaxDrift("conv1", new_amax=1.0, published_amax=4.0))
    4.0
    """
    if drift.new_amax == drift.published_amax:
        return 1.0
    if min(drift.new_amax, drift.published_amax) <= 0:
        return math.inf
    return max(drift.new_amax / drift.published_amax, drift.published_amax / drift.new_amax)


def _accuracy(paired: PairedComparison, limit: float) -> tuple[PublishedDecision, str]:
    low, high = paired.drop_interval_pp
    found = (
        f"Against the version in service top-1 changes by {-paired.drop_pp + 0.0:+.2f} pp on {paired.images} images "
        f"(95 % interval {-high + 0.0:+.2f} to {-low + 0.0:+.2f} pp); a loss of at most {limit:.2f} pp is accepted "
        "(gate.max_regression_pp)."
    )
    # Written as <=, so that a drop that is not a number is not accepted.
    if paired.drop_pp <= limit:
        return "accept", found
    if low > 0:
        return "regress", found
    return "inconclusive", f"{found} The interval includes 0: these images cannot tell the two apart."


def _speed(latencies: Sequence[PublishedLatency], limit: float) -> tuple[PublishedDecision, str]:
    for item in latencies:
        if not all(
            math.isfinite(x) and x > 0 for x in (item.new_median_ms, item.published_median_ms, *item.turns_ratio)
        ):
            raise ValueError(
                f"The median latencies at batch {item.batch_size} are {item.new_median_ms} and "
                f"{item.published_median_ms} ms; expected numbers above 0. Measure again."
            )
    if not latencies:
        return "accept", ""
    parts = ", ".join(
        f"{item.ratio:.2f} times at batch {item.batch_size} ({item.new_median_ms:.3f} against "
        f"{item.published_median_ms:.3f} ms)"
        for item in latencies
    )
    found = (
        f"Its latency, turn by turn, is {parts} that of the version in service; at most {limit:g} is accepted "
        "(gate.max_slowdown)."
    )
    slow = [item for item in latencies if item.ratio > limit]
    if not slow:
        return "accept", found
    if any(_is_beyond_chance(item.turns_ratio, limit) for item in slow):
        return "regress", found
    slower = min(slow, key=lambda item: item.ratio).turns_ratio
    count = sum(ratio > limit for ratio in slower)
    return "inconclusive", f"{found} Only {count} of {len(slower)} turns were slower: the machine may have been busy."


def _is_beyond_chance(ratios: Sequence[float], limit: float) -> bool:
    """A one-sided sign test at 5 %: were ratios as often below the limit as above, would so many be above?

    >>> _is_beyond_chance([1.2] * 12 + [1.0] * 4, 1.1), _is_beyond_chance([1.2] * 11 + [1.0] * 5, 1.1)
    (True, False)
    """
    above = sum(ratio > limit for ratio in ratios)
    ways = sum(math.comb(len(ratios), count) for count in range(above, len(ratios) + 1))
    return 20 * ways <= 2 ** len(ratios)


def _drift_reasons(drift: Sequence[AmaxDrift]) -> tuple[str, ...]:
    notable = [item for item in drift if drift_factor(item) > NOTABLE_DRIFT]
    if not notable:
        return ()
    named = ", ".join(
        f"{item.quantizer} ({item.published_amax:.4g} to {item.new_amax:.4g})" for item in notable[:_LAYERS_NAMED]
    )
    noun = "layer" if len(notable) == 1 else "layers"
    return (f"The amax of {len(notable)} {noun} moved by more than {NOTABLE_DRIFT:g} times: {named}.",)


def published_version(
    store: Store,
    model: str,
    *,
    onnx_sha256: str,
    dialect: Dialect,
    input_shape: tuple[int, int, int],
    num_classes: int,
) -> PublishedModel | None:
    """Returns the version of `model` in service, None where there is none, or where it is the new graph itself.

    Args:
        store: where it was published.
        model: name under which it was published.
        onnx_sha256: digest of the new graph.
        dialect: dialect of the new graph, in which the other is wanted too.
        input_shape: (c, h, w) of the new graph.
        num_classes: classes of the new graph.

    A version whose graph is gone, is of another dialect or has other images or classes comes with the obstacle in
    words.
    """
    entry = store.latest(model)
    if entry is None or entry.get("onnx_sha256") == onnx_sha256:
        return None
    version, objects = str(entry["version"]), entry.get("objects", {})
    name = "model_int8.onnx" if entry.get("dialect") == dialect else f"model_int8_{dialect}.onnx"
    if name not in objects or "amax.json" not in objects:
        return PublishedModel(version, None, None, f"it has no graph of the dialect {dialect}")
    onnx, amax = ArtifactRef(**objects[name]), ArtifactRef(**objects["amax.json"])
    try:
        store.get_path(amax)
        found = summarize_onnx(store.get_path(onnx))
    except PtqError as error:
        return PublishedModel(version, None, None, f"its graph cannot be read ({error})")
    if found.input_shape[1:] != input_shape or found.outputs != num_classes:
        obstacle = (
            f"it reads images of {_times(found.input_shape[1:])} and tells {found.outputs} classes apart, the new "
            f"model reads {_times(input_shape)} and tells {num_classes}"
        )
        return PublishedModel(version, None, None, obstacle)
    return PublishedModel(version, onnx, amax)


def _times(shape: tuple[int | None, ...]) -> str:
    return " x ".join(str(size) for size in shape)
