import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.errors import CalibrationError
from ptq.numerics.histogram import (
    MIN_EXPONENT,
    Histograms,
    bytes_from_trials,
    coarsen,
    empty_histograms,
    exponent_for,
    histograms_of,
    merge,
    trials_from_bytes,
)

BINS = 64
VALUES = st.lists(
    st.floats(min_value=-(2.0**40), max_value=2.0**40, width=32, allow_subnormal=True), min_size=1, max_size=60
)


def histogram(values, bins=BINS):
    return histograms_of([np.array(values, dtype=np.float32)], bins=bins, names=["relu"], image="a.png")


def assert_same(left: Histograms, right: Histograms):
    assert left.counts.tolist() == right.counts.tolist()
    assert left.exponents.tolist() == right.exponents.tolist()
    assert left.maxima.tolist() == right.maxima.tolist()
    assert left.zeros.tolist() == right.zeros.tolist()


def test_values_fall_into_bins_of_a_power_of_two():
    found = histogram([0.0, 0.5, -1.0, 3.9], bins=4)
    assert found.bin_widths.tolist() == [1.0]
    assert found.counts.tolist() == [[2, 1, 0, 1]]
    assert found.maxima.tolist() == [np.float32(3.9)]
    assert found.zeros.tolist() == [1]


def test_a_maximum_on_a_power_of_two_still_has_a_bin():
    found = histogram([4.0], bins=4)
    assert found.bin_widths.tolist() == [2.0]
    assert found.counts.tolist() == [[0, 0, 1, 0]]


@given(VALUES, VALUES)
@settings(deadline=None)
def test_merge_is_commutative(left, right):
    assert_same(merge(histogram(left), histogram(right)), merge(histogram(right), histogram(left)))


@given(VALUES, VALUES, VALUES)
@settings(deadline=None)
def test_merge_is_associative(first, second, third):
    a, b, c = histogram(first), histogram(second), histogram(third)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(VALUES, st.integers(1, 59))
@settings(deadline=None)
def test_splitting_the_values_anywhere_gives_the_same_bits(values, cut):
    cut = min(cut, len(values))
    parts = [part for part in (values[:cut], values[cut:]) if part]
    merged = empty_histograms(1, bins=BINS)
    for part in parts:
        merged = merge(merged, histogram(part))
    assert_same(merged, histogram(values))


@given(VALUES, st.integers(-20, 20))
@settings(deadline=None)
def test_scaling_by_a_power_of_two_only_moves_the_exponent(values, shift):
    values = [value for value in values if value == 0 or abs(value) > 2.0**-60] or [1.0]
    plain, scaled = histogram(values), histogram([np.ldexp(value, shift) for value in values])
    assert scaled.counts.tolist() == plain.counts.tolist()
    if plain.maxima[0] > 0:
        assert scaled.exponents[0] == plain.exponents[0] + shift


def test_the_empty_histogram_is_neutral():
    found = histogram([1.0, -7.0])
    assert_same(merge(found, empty_histograms(1, bins=BINS)), found)


def test_counts_survive_beyond_two_to_the_31():
    found = histogram([1.0, 3.0], bins=4)
    large = Histograms(found.counts * (2**33), found.exponents, found.maxima, found.zeros)
    assert merge(large, large).counts.tolist() == [[0, 2**34, 0, 2**34]]


def test_merging_does_not_change_its_arguments():
    left, right = histogram([1.0]), histogram([100.0])
    before = left.counts.copy()
    merge(left, right)
    assert left.counts.tolist() == before.tolist()


def test_coarsening_past_all_bins_leaves_everything_in_the_first():
    assert coarsen(np.array([1, 2, 3, 4]), doublings=70).tolist() == [10, 0, 0, 0]


def test_a_tensor_of_zeros_takes_the_smallest_width():
    found = histogram([0.0, -0.0])
    assert found.exponents.tolist() == [MIN_EXPONENT]
    assert found.zeros.tolist() == [2]
    assert exponent_for(0.0, bins=BINS) == MIN_EXPONENT


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_layer_and_image(bad):
    with pytest.raises(CalibrationError, match=r"Activation relu holds NaN or infinity for image a\.png"):
        histogram([1.0, bad])


def test_histograms_of_different_shapes_are_not_merged():
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(histogram([1.0], bins=4), histogram([1.0], bins=8))


def test_a_round_trip_through_bytes_keeps_every_bit():
    trials = [histogram([1.0, 2.0]), histogram([0.1])]
    data = bytes_from_trials(trials)
    assert data == bytes_from_trials(trials)
    for before, after in zip(trials, trials_from_bytes(data), strict=True):
        assert_same(before, after)
