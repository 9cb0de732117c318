"""Do trials stop at the right image, and does an interval mean what it says?"""

from functools import partial, reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.calibration.early_stopping import (
    GROUPS,
    collect_adaptively,
    describe_lengths,
    interval_percent,
    leave_one_out,
    look_counts,
    loose_layers_warning,
    used_draws,
    widest_intervals,
)
from ptq.calibration.statistics import collect_statistics
from ptq.config import LabelledMethod
from ptq.numerics.histogram import empty_histograms, histograms_of, merge
from ptq.records.base import ArtifactRef
from ptq.records.calibration import CalibrationDraws, LayerLength, TrialLength
from ptq.records.data import PreparedImages

NAMES = ["light", "heavy"]
COUNT = 512
# The first two pixels of an image are its number, which seeds what its layers see.
PIXELS = np.zeros((COUNT, 2, 2, 1), dtype=np.uint8)
PIXELS[:, 0, 0, 0], PIXELS[:, 0, 1, 0] = np.divmod(np.arange(COUNT), 256)
INT8 = np.array([127, 127])
PERCENTILE = LabelledMethod(label="percentile", method="percentile", percentile=99.9)
METHODS = (
    LabelledMethod(label="max", method="max"),
    PERCENTILE,
    LabelledMethod(label="mse", method="mse"),
    LabelledMethod(label="entropy", method="entropy"),
)
ORDER = np.random.default_rng(0).permutation(COUNT).tolist()


def reader(image):
    """A uniform layer, and one whose largest values come from a few images that are much brighter than the others."""
    high, low = np.rint(image[0, 0, 0] * 255).astype(int)
    generator = np.random.default_rng(256 * high + low)
    light = generator.uniform(0, 1, (1, 4, 200)).astype(np.float32)
    heavy = np.abs(generator.standard_normal((1, 4, 200)) * generator.lognormal(0, 0.3)).astype(np.float32)
    return [light, heavy]


def collector(workers=1, read=reader):
    return partial(
        collect_statistics, [read] * workers, PIXELS, names=NAMES, channel_axes=[1, None],
        image_names=[f"{i}.png" for i in range(COUNT)], mean=[0.0], std=[1.0], bins=1024,
    )  # fmt: skip


def adaptive(draws, *, tolerance_percent, methods=(PERCENTILE,), workers=1, read=reader):
    collect = collector(workers, read)
    return collect_adaptively(
        lambda parts: collect(draws=parts), draws, names=NAMES, methods=methods, bounds=INT8,
        tolerance_percent=tolerance_percent,
    )  # fmt: skip


def bits(statistics):
    found = statistics.histograms
    arrays = (found.counts, found.exponents, found.maxima, found.zeros, *statistics.channel_sums.sums)
    return [array.tobytes() for array in arrays]


def test_a_light_tailed_layer_is_tight_early_and_a_heavy_tailed_one_late():
    (trial,) = adaptive([ORDER], tolerance_percent=10)
    light, heavy = trial.length.layers
    assert light.images_needed == 32
    assert heavy.images_needed == trial.length.images == 256
    assert 0 < heavy.interval_percent <= 10


def test_a_wider_tolerance_stops_earlier():
    lengths = [adaptive([ORDER], tolerance_percent=percent)[0].length.images for percent in (20, 10, 7)]
    assert lengths == [32, 256, 512]


def test_every_method_but_max_must_be_tight():
    alone = [adaptive([ORDER], tolerance_percent=20, methods=[method])[0] for method in METHODS[1:]]
    (together,) = adaptive([ORDER], tolerance_percent=20, methods=METHODS)
    assert together.length.images == max(trial.length.images for trial in alone)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.slow
def test_the_number_of_workers_changes_neither_the_images_nor_a_bit(workers):
    draws = [ORDER, ORDER[::-1]]
    expected = adaptive(draws, tolerance_percent=12, methods=METHODS)
    found = adaptive(draws, tolerance_percent=12, methods=METHODS, workers=workers)
    assert [trial.length for trial in found] == [trial.length for trial in expected]
    assert [bits(trial.statistics) for trial in found] == [bits(trial.statistics) for trial in expected]


def test_the_statistics_are_those_of_the_images_used_and_of_no_other():
    trials = adaptive([ORDER, ORDER[::-1]], tolerance_percent=10)
    assert len({trial.length.images for trial in trials}) == 2
    used = [ORDER[: trials[0].length.images], ORDER[::-1][: trials[1].length.images]]
    expected = collector()(draws=used)
    assert [bits(trial.statistics) for trial in trials] == [bits(statistics) for statistics in expected]


def test_a_trial_does_not_depend_on_the_others():
    assert adaptive([ORDER, ORDER[::-1]], tolerance_percent=12)[0].length == (
        adaptive([ORDER], tolerance_percent=12)[0].length
    )


def test_a_layer_that_is_never_tight_is_named_after_all_images():
    (trial,) = adaptive([ORDER], tolerance_percent=1)
    assert trial.length.images == COUNT
    assert not trial.length.is_tight
    assert [layer.images_needed for layer in trial.length.layers] == [32, None]
    warning = loose_layers_warning([trial.length], tolerance_percent=1)
    width = trial.length.layers[1].interval_percent
    assert warning == (
        f"The amax of 1 of 2 layers is not within 1 % after all 512 images of 1 of 1 draws: heavy ({width:.1f} %). "
        "Raise calibration.images, or calibration.tolerance_percent."
    )


def test_a_layer_without_any_value_but_zero_is_never_tight():
    (trial,) = adaptive([ORDER[:64]], tolerance_percent=50, read=lambda image: [reader(image)[0], np.zeros((1, 4, 4))])
    assert trial.length.layers[1] == LayerLength("heavy", None, None)
    assert "heavy (only zeros)" in loose_layers_warning([trial.length], tolerance_percent=50)


def test_no_image_is_read_twice_in_a_trial():
    seen = []

    def read(image):
        seen.append(image.tobytes())
        return reader(image)

    adaptive([ORDER], tolerance_percent=1, read=read)
    assert len(seen) == len(set(seen)) == COUNT


@pytest.mark.parametrize("draws", [[[0, 1, 2]], [ORDER[:64], ORDER[:32]]])
def test_draws_too_short_or_of_several_lengths_are_refused(draws):
    with pytest.raises(ValueError, match=r"Draws have the lengths .*; expected one length of at least 16"):
        adaptive(draws, tolerance_percent=5)


def test_looks_double_and_end_with_all_images():
    assert look_counts(33) == (32, 33)
    assert look_counts(32) == (32,)
    assert all(count % GROUPS == 0 for count in look_counts(1000)[:-1])


def histograms(generator):
    sizes = (10.0 ** generator.integers(-3, 3, 2))[:, None]
    values = (generator.exponential(1, (2, 50)) * sizes).astype(np.float32)
    return histograms_of(list(values), bins=256, names=NAMES, image="a.png")


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8))
@pytest.mark.slow
def test_leaving_a_group_out_is_merging_the_others(seed, count):
    generator = np.random.default_rng(seed)
    groups = [histograms(generator) for _ in range(count)]
    for index, found in enumerate(leave_one_out(groups)):
        expected = reduce(merge, groups[:index] + groups[index + 1 :])
        for name in ("counts", "exponents", "maxima", "zeros"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_the_interval_of_a_mean_is_that_of_the_t_test():
    # For a mean over equal groups the jackknife gives the standard error of the group means, exactly.
    means = np.array([[9.0], [11.0], [10.0], [10.0], [8.0], [12.0], [10.0], [10.0]])
    left_out = (means.sum(axis=0) - means) / 7
    # Standard deviation sqrt(10 / 7), divided by sqrt(8), times t(7, 0.975) = 2.3646, in percent of 10.
    assert interval_percent(np.array([10.0]), left_out)[0] == pytest.approx(23.646 * np.sqrt(10 / 56), rel=1e-4)


@pytest.mark.slow
def test_the_interval_holds_the_true_percentile_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    truth, hits = -np.log(1 - 0.99), 0
    method = LabelledMethod(label="percentile", method="percentile", percentile=99.0)
    for _ in range(300):
        groups = [
            histograms_of([generator.exponential(1, 2000).astype(np.float32)], bins=4096, names=["relu"], image="a")
            for _ in range(GROUPS)
        ]
        (percent,) = widest_intervals(groups, methods=[method], bounds=np.array([127]), tolerance_percent=100)
        whole = reduce(merge, groups)
        edge = np.searchsorted(np.cumsum(whole.counts[0]), 0.99 * whole.totals[0]) + 1
        amax = edge * whole.bin_widths[0]
        hits += abs(amax - truth) <= percent / 100 * amax
    # 95 % of 300 is 285; four standard deviations of the binomial are 15, and the jackknife is a little conservative.
    assert 270 <= hits <= 300


def test_groups_of_which_all_but_one_are_dead_have_no_interval():
    alive = histograms(np.random.default_rng(0))
    groups = [alive] + [empty_histograms(2, bins=256)] * 7
    found = widest_intervals(groups, methods=METHODS, bounds=INT8, tolerance_percent=5)
    assert found.tolist() == [np.inf, np.inf]


LENGTHS = (
    TrialLength(64, (LayerLength("conv1", 32, 0.5), LayerLength("relu", 64, 1.9))),
    TrialLength(128, (LayerLength("conv1", 128, 1.2), LayerLength("relu", 64, 1.0))),
)


def test_the_summary_names_the_layer_that_needed_most():
    assert describe_lengths(LENGTHS, most=512, tolerance_percent=2.5) == (
        "Calibration used 64, 128 of at most 512 images for amax within 2.5 % in every layer; conv1 needed most, 128"
    )
    loose = (*LENGTHS, TrialLength(512, (LayerLength("conv1", None, 3.0), LayerLength("relu", None, 7.0))))
    assert describe_lengths(loose, most=512, tolerance_percent=2.5) == (
        "Calibration used 64, 128, 512 of at most 512 images, and 1 of 3 draws did not reach amax within 2.5 % in "
        "every layer; relu needed most, more than 512"
    )


def test_tight_trials_give_no_warning():
    assert loose_layers_warning(LENGTHS, tolerance_percent=2) is None


def test_the_recorded_draws_are_those_used_with_a_warning_of_classes_left_out():
    reference = ArtifactRef("a", "0" * 64, 1)
    prepared = PreparedImages(reference, reference, 4, reference)
    draws = CalibrationDraws(prepared, indices=((3, 0, 2), (2, 3, 1)), warnings=("A warning.",))
    lengths = (TrialLength(2, ()), TrialLength(1, ()))
    found = used_draws(
        draws, lengths, labels=np.array([0, 2, 1, 0]), class_names=["cat", "dog", "hen"], tolerance_percent=2
    )
    assert found.indices == ((0, 3), (2,))
    assert found.lengths == lengths
    assert found.warnings == (
        "A warning.",
        "Calibration had enough images before it came to one of 1 of the 3 classes drawn: hen. "
        "Lower calibration.tolerance_percent to use more.",
    )
