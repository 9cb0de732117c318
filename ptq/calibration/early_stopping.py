"""How many calibration images does each layer need?

Looks at a trial after 32, 64, 128, ... of its images and stops it once the 95 % interval of every layer's amax is
within the tolerance. The interval is a delete-a-group jackknife over groups of images, each with histograms of its
own, so memory does not grow with the number of images. Whoever runs the network is passed in. Everything is exact
merges and fixed formulas: the same draw stops at the same image for any number of workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
from jaxtyping import Bool, Float, Int

from ptq.calibration.statistics import TrialStatistics, merge_statistics
from ptq.config import LEAST_ADAPTIVE_IMAGES, LabelledMethod
from ptq.numerics.amax import amax_from_histograms
from ptq.numerics.histogram import Histograms, empty_histograms, merge
from ptq.records.calibration import CalibrationDraws, LayerLength, TrialLength
from ptq.wording import first_names

GROUPS = 8
# Student's t with GROUPS - 1 = 7 degrees of freedom at 0.975.
T_QUANTILE = 2.364624251592785
NAMES_SHOWN = 8

Collect = Callable[[Sequence[Sequence[int]]], list[TrialStatistics]]


@dataclass(frozen=True, slots=True)
class AdaptiveTrial:
    """The statistics of the first `length.images` images of a draw, and how many each layer needed."""

    statistics: TrialStatistics
    length: TrialLength


@dataclass(slots=True)
class _Running:
    """A trial under way: statistics per group, and the intervals found at each look, in percent of amax."""

    draw: Sequence[int]
    groups: list[TrialStatistics] = field(default_factory=list)
    intervals: list[Float[np.ndarray, " tensors"]] = field(default_factory=list)
    is_stopped: bool = False


def look_counts(most: int) -> tuple[int, ...]:
    """Returns after how many images a trial is looked at; the last is `most`.

    >>> look_counts(200), look_counts(64), look_counts(20)
    ((32, 64, 128, 200), (32, 64), (20,))
    """
    counts = []
    count = LEAST_ADAPTIVE_IMAGES
    while count < most:
        counts.append(count)
        count *= 2
    return (*counts, most)


def leave_one_out(groups: Sequence[Histograms]) -> list[Histograms]:
    """Returns, for every group, the histograms of all other groups.

    Merges from both ends meet at the group left out. Merging is exact, so this equals collecting without the group,
    the bin width included, which subtracting counts from the whole would leave too coarse.
    """
    neutral = empty_histograms(*groups[0].counts.shape[:1], bins=groups[0].counts.shape[1])
    before, after = [neutral], [neutral]
    for group in groups[:-1]:
        before.append(merge(before[-1], group))
    for group in reversed(groups[1:]):
        after.append(merge(after[-1], group))
    return [merge(left, right) for left, right in zip(before, reversed(after), strict=True)]


def interval_percent(
    whole: Float[np.ndarray, " tensors"], left_out: Float[np.ndarray, "groups tensors"]
) -> Float[np.ndarray, " tensors"]:
    """Returns half the width of the 95 % interval of an estimate, in percent of it.

    With G groups and the estimates e_g without group g, the squared standard error is (G - 1) / G times the sum of
    (e_g - mean)^2, and the interval reaches t(G - 1, 0.975) standard errors to either side. Source: Kott, The
    delete-a-group jackknife, Journal of Official Statistics 17 (2001). Leaving out many values at a time serves
    quantiles as well, for which leaving out one at a time does not: Shao and Wu, A general theory for jackknife
    variance estimation, Annals of Statistics 17 (1989). Differences below one bin of the histogram are not seen.

    Args:
        whole: the estimate from all groups, positive.
        left_out: the estimates without each of the 8 groups.
    """
    groups = len(left_out)
    deviations = left_out - left_out.mean(axis=0)
    errors = np.sqrt((groups - 1) / groups * (deviations**2).sum(axis=0))
    return 100 * T_QUANTILE * errors / whole


def widest_intervals(
    groups: Sequence[Histograms],
    *,
    methods: Sequence[LabelledMethod],
    bounds: Int[np.ndarray, " tensors"],
    tolerance_percent: float,
) -> Float[np.ndarray, " tensors"]:
    """Returns half the width of the widest 95 % interval of each tensor's amax over the methods, in percent of amax.

    Args:
        groups: the histograms of the 8 groups.
        methods: `max` is left out. Its jackknife is not consistent: the maximum without a group is the maximum of all
            unless the group holds it, so at most one of the 8 estimates differs (Miller, A trustworthy jackknife,
            Annals of Mathematical Statistics 35, 1964, shows it for the end point of a distribution). `mse` and
            `entropy` take the best of many candidates, and an interval sees a jump from one to another only where
            leaving out a group causes it.
        bounds: the integer amax maps to, 127 for int8 and 255 for uint8, (tensors,).
        tolerance_percent: a tensor that one method finds wider than this is not looked at by the slower ones.

    Returns:
        (tensors,); infinite where the values outside some group are all zero.
    """
    parts = [reduce(merge, groups), *leave_one_out(groups)]
    is_alive = np.all([part.maxima > 0 for part in parts], axis=0)
    widest = np.where(is_alive, 0.0, np.inf)
    pending = np.flatnonzero(is_alive)
    for method in _fast_first(methods):
        if pending.size == 0:
            break
        amax = _amax_of_parts(parts, pending, method=method, bounds=bounds)
        intervals = interval_percent(amax[0], amax[1:])
        widest[pending] = np.maximum(widest[pending], intervals)
        pending = pending[intervals <= tolerance_percent]
    return widest


def _fast_first(methods: Sequence[LabelledMethod]) -> list[LabelledMethod]:
    order = ("percentile", "mse", "entropy")
    return sorted((item for item in methods if item.method in order), key=lambda item: order.index(item.method))


def _amax_of_parts(
    parts: Sequence[Histograms],
    tensors: Int[np.ndarray, " some"],
    *,
    method: LabelledMethod,
    bounds: Int[np.ndarray, " tensors"],
) -> Float[np.ndarray, "parts some"]:
    """The amax of some tensors in every part, from one call, which uses the cores better than one for each."""
    stacked = Histograms(
        *(
            np.concatenate([getattr(part, name)[tensors] for part in parts])
            for name in ("counts", "exponents", "maxima", "zeros")
        )
    )
    names = [str(index) for index in np.tile(tensors, len(parts))]
    found = amax_from_histograms(
        stacked, methods=[method], bounds=np.tile(np.asarray(bounds)[tensors], len(parts)), names=names
    )
    return found[method.label].reshape(len(parts), len(tensors))


def images_needed(is_tight: Bool[np.ndarray, "looks tensors"], counts: Sequence[int]) -> tuple[int | None, ...]:
    """Returns, per tensor, the images after which it became tight and stayed so; None if it never did.

    >>> images_needed(np.array([[True, True, False], [False, True, False]]), [32, 64])
    (None, 32, None)
    >>> images_needed(np.array([[True, False], [False, True], [True, True]]), [32, 64, 96])
    (96, 64)
    """
    needed: list[int | None] = []
    for tensor in is_tight.T:
        loose = np.flatnonzero(~tensor)
        first = int(loose[-1]) + 1 if loose.size else 0
        needed.append(counts[first] if first < len(tensor) else None)
    return tuple(needed)


def collect_adaptively(
    collect: Collect,
    draws: Sequence[Sequence[int]],
    *,
    names: Sequence[str],
    methods: Sequence[LabelledMethod],
    bounds: Int[np.ndarray, " tensors"],
    tolerance_percent: float,
) -> list[AdaptiveTrial]:
    """Returns the statistics of every trial over as many of its images as its layers need.

    Args:
        collect: from draws to the statistics of each, in one pass; see `collection.collect_statistics`. A draw may be
            empty, but not all of them.
        draws: per trial the positions of its images in a random order of which every prefix is close to stratified;
            all of one length. Image i of a draw belongs to group i modulo 8.
        names: names of the tensors.
        methods: those whose amax must be within the tolerance; `max` does not count.
        bounds: the integer amax maps to, 127 for int8 and 255 for uint8, (tensors,).
        tolerance_percent: half the width of the widest 95 % interval accepted, in percent of amax. The level holds for
            each look; that a trial stops at the first of up to a few looks makes it a little optimistic.

    Raises:
        CalibrationError: an activation holds NaN or infinity.
        ValueError: the draws are not of one length, or shorter than two images for each group.
    """
    lengths = {len(draw) for draw in draws}
    if len(lengths) != 1 or min(lengths) < 2 * GROUPS:
        raise ValueError(f"Draws have the lengths {sorted(lengths)}; expected one length of at least {2 * GROUPS}.")
    trials = [_Running(draw) for draw in draws]
    before = 0
    for count in look_counts(lengths.pop()):
        running = [trial for trial in trials if not trial.is_stopped]
        if not running:
            break
        # Looks are multiples of GROUPS, so that the fresh images begin at group 0.
        fresh = iter(collect([trial.draw[before + g : count : GROUPS] for trial in running for g in range(GROUPS)]))
        for trial in running:
            parts = [next(fresh) for _ in range(GROUPS)]
            trial.groups = list(map(merge_statistics, trial.groups, parts)) if trial.groups else parts
            intervals = widest_intervals(
                [group.histograms for group in trial.groups], methods=methods, bounds=bounds,
                tolerance_percent=tolerance_percent,
            )  # fmt: skip
            trial.intervals.append(intervals)
            trial.is_stopped = bool(np.all(intervals <= tolerance_percent))
        before = count
    return [_finished(trial, names=names, tolerance_percent=tolerance_percent) for trial in trials]


def _finished(trial: _Running, *, names: Sequence[str], tolerance_percent: float) -> AdaptiveTrial:
    intervals = np.stack(trial.intervals)
    counts = look_counts(len(trial.draw))[: len(intervals)]
    layers = tuple(
        LayerLength(name, needed, round(float(interval), 3) if np.isfinite(interval) else None)
        for name, needed, interval in zip(
            names, images_needed(intervals <= tolerance_percent, counts), intervals[-1], strict=True
        )
    )
    return AdaptiveTrial(reduce(merge_statistics, trial.groups), TrialLength(counts[-1], layers))


def used_draws(
    draws: CalibrationDraws,
    lengths: Sequence[TrialLength],
    *,
    labels: Int[np.ndarray, " images"],
    class_names: Sequence[str],
    tolerance_percent: float,
) -> CalibrationDraws:
    """Returns the draws with the images really used, ascending, and with warnings of loose layers and unused classes.

    Args:
        draws: in the order in which the images were used.
        lengths: of every trial.
        labels: the class of every prepared image.
        class_names: the model's classes.
        tolerance_percent: for the warning.
    """
    indices = tuple(tuple(sorted(draw[: length.images])) for draw, length in zip(draws.indices, lengths, strict=True))
    warnings = [*draws.warnings]
    loose = loose_layers_warning(lengths, tolerance_percent=tolerance_percent)
    if loose is not None:
        warnings.append(loose)
    used = {int(labels[position]) for draw in indices for position in draw}
    unused = [class_names[label] for label in sorted({int(label) for label in labels} - used)]
    if unused:
        warnings.append(
            f"Calibration had enough images before it came to one of {len(unused)} of the {len(used) + len(unused)} "
            f"classes drawn: {first_names(unused, NAMES_SHOWN)}. Lower calibration.tolerance_percent to use more."
        )
    return replace(draws, indices=indices, warnings=tuple(warnings), lengths=tuple(lengths))


def describe_lengths(lengths: Sequence[TrialLength], *, most: int, tolerance_percent: float) -> str:
    """Returns how many images each trial used, and the layer that needed most.

    >>> layers = (LayerLength("relu", 32, 1.5), LayerLength("fc", 64, 1.9))
    >>> describe_lengths([TrialLength(64, layers)], most=512, tolerance_percent=2.0)
    'Calibration used 64 of at most 512 images for amax within 2 % in every layer; fc needed most, 64'
    """
    used = ", ".join(str(length.images) for length in lengths)
    slowest = max(
        (layer for length in lengths for layer in length.layers),
        key=lambda layer: (layer.images_needed is None, layer.images_needed or 0, _width(layer)),
    )
    needed = f"more than {most}" if slowest.images_needed is None else str(slowest.images_needed)
    goal = f"amax within {tolerance_percent:g} % in every layer"
    loose = sum(not length.is_tight for length in lengths)
    reached = f", and {loose} of {len(lengths)} draws did not reach {goal}" if loose else f" for {goal}"
    return f"Calibration used {used} of at most {most} images{reached}; {slowest.name} needed most, {needed}"


def loose_layers_warning(lengths: Sequence[TrialLength], *, tolerance_percent: float) -> str | None:
    """Returns a sentence that names the layers whose amax is not tight after all images of some trial; else None."""
    loose: dict[str, LayerLength] = {}
    for length in lengths:
        for layer in length.layers:
            known = loose.get(layer.name)
            if layer.images_needed is None and (known is None or _width(layer) > _width(known)):
                loose[layer.name] = layer
    if not loose:
        return None
    trials = sum(not length.is_tight for length in lengths)
    ordered = sorted(loose.values(), key=_width, reverse=True)
    names = first_names([f"{layer.name} ({width_text(layer)})" for layer in ordered], NAMES_SHOWN)
    return (
        f"The amax of {len(ordered)} of {len(lengths[0].layers)} layers is not within {tolerance_percent:g} % after "
        f"all {max(length.images for length in lengths)} images of {trials} of {len(lengths)} draws: {names}. "
        "Raise calibration.images, or calibration.tolerance_percent."
    )


def _width(layer: LayerLength) -> float:
    return float("inf") if layer.interval_percent is None else layer.interval_percent


def width_text(layer: LayerLength) -> str:
    """Returns the width of a layer's last interval.

    >>> width_text(LayerLength("fc", None, 7.25)), width_text(LayerLength("fc", None, None))
    ('7.2 %', 'only zeros')
    """
    return "only zeros" if layer.interval_percent is None else f"{layer.interval_percent:.1f} %"
