"""Scales that keep sums of two products within 16 bits, held against the sums themselves."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.numerics.saturation import (
    LARGEST_INPUT,
    LARGEST_SUM,
    count_saturated,
    largest_sums,
    neighbours,
    scales_without_saturation,
)


def pairs_by_hand(inputs, positions, groups):
    """The pairs as (input, position): side by side in channels, or along a row of all positions."""
    if groups == 1:
        return {((c, p), (c + 1, p)) for p in range(positions) for c in range(0, inputs - 1, 2)}
    row = [(c, p) for p in range(positions) for c in range(inputs)]
    return set(zip(row[::2], row[1::2], strict=False))


@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("positions", [1, 4, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_neighbours_are_the_pairs_written_out(inputs, positions, groups):
    found = neighbours(inputs, positions, outputs=4, groups=groups)
    assert {tuple(divmod(int(e), positions) for e in pair) for pair in found} == pairs_by_hand(
        inputs, positions, groups
    )


def test_the_pairs_of_several_runtimes_are_those_of_any():
    found = neighbours(3, 2, outputs=4, groups=1, runtimes=["openvino", "onnxruntime"]).tolist()
    assert found == [[0, 2], [1, 3], [4, 1], [3, 5]]
    assert neighbours(4, 9, outputs=4, groups=1, runtimes=["onnxruntime"]).shape == (18, 2)


def test_a_depthwise_convolution_has_no_pairs_and_one_with_two_outputs_a_group_has():
    assert len(neighbours(1, 9, outputs=1, groups=8)) == 0
    assert neighbours(1, 9, outputs=2, groups=8).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def worst_sums(weight, scale, largest, groups):
    """The largest magnitude of each channel's sums, over inputs that are 0 or the largest."""
    outputs, inputs = weight.shape[:2]
    positions = weight[0, 0].size
    steps = np.clip(np.rint(weight.reshape(outputs, inputs, positions) / scale[:, None, None]), -128, 127)
    worst = np.zeros(outputs)
    for out in range(outputs):
        first = out // (outputs // groups) * inputs
        for one, other in pairs_by_hand(inputs, positions, groups):
            for a, b in itertools.product((0, 1), repeat=2):
                total = (
                    a * steps[out][one] * largest[first + one[0]] + b * steps[out][other] * largest[first + other[0]]
                )
                worst[out] = max(worst[out], abs(total))
    return worst


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([(4, 6, 3, 1), (6, 3, 3, 2), (4, 5, 1, 1), (8, 1, 3, 4)]), st.booleans()
)
def test_no_sum_saturates_and_no_scale_is_larger_than_it_must_be(seed, shape, any_input):
    outputs, inputs, kernel, groups = shape
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((outputs, inputs, kernel, kernel)).astype(np.float32)
    weight[0] = np.abs(weight[0]).max()
    scale = (np.abs(weight).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    channels = inputs * groups
    largest = np.full(channels, LARGEST_INPUT) if any_input else generator.integers(0, 256, channels)
    found = scales_without_saturation(weight, scale, largest, groups=groups)
    assert found.dtype == np.float32
    assert np.all(found >= scale)
    assert worst_sums(weight, found, largest, groups).max() <= LARGEST_SUM
    grown = found > scale
    a_little_less = np.maximum(found * (1 - 1e-5), scale).astype(np.float32)
    assert np.all(worst_sums(weight, a_little_less, largest, groups)[grown] > LARGEST_SUM)
    assert np.all(worst_sums(weight, scale, largest, groups)[~grown] <= LARGEST_SUM)


@pytest.mark.parametrize(("shape", "groups"), [((5, 4, 3, 3), 1), ((4, 3, 3, 3), 2), ((6, 1, 3, 3), 6)])
def test_the_largest_sums_are_those_of_inputs_that_are_zero_or_largest(shape, groups):
    generator = np.random.default_rng(1)
    weight = generator.standard_normal(shape).astype(np.float32)
    scale = np.full(shape[0], 0.02, np.float32)
    largest = generator.integers(0, 256, shape[1] * groups)
    found = largest_sums(weight, scale, largest, groups=groups)
    expected = np.zeros(shape[0]) if shape[1] == 1 else worst_sums(weight, scale, largest, groups)
    assert found.tolist() == expected.tolist()


def test_more_pairs_than_are_watched_at_once_are_all_kept_within_the_sum():
    weight = np.full((1, 400), 1.0, np.float32)
    weight[0, 100:] = np.linspace(0.99, 1.01, 300)
    scale = np.array([1.01 / 127], np.float32)
    found = scales_without_saturation(weight, scale, np.full(400, LARGEST_INPUT), groups=1)
    assert worst_sums(weight[..., None], found, np.full(400, LARGEST_INPUT), 1).max() <= LARGEST_SUM


def test_scales_that_suffice_stay_as_they_are_to_the_bit():
    weight = np.array([[1.0, -1.0, 0.5, 0.5]], np.float32)
    scale = np.array([1 / 127], np.float32)
    assert scales_without_saturation(weight, scale, np.full(4, LARGEST_INPUT), groups=1).tolist() == scale.tolist()


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "groups", "strides", "dilations"),
    [
        (4, 3, 3, 1, (1, 1), (1, 1)), (3, 2, 2, 1, (2, 1), (1, 2)), (3, 2, 3, 2, (1, 1), (1, 1)),
        (5, 4, 1, 1, (1, 1), (1, 1)),
    ],
)  # fmt: skip
def test_saturated_sums_are_counted_one_by_one(inputs, outputs, size, groups, strides, dilations):
    generator = np.random.default_rng(1)
    steps = generator.integers(-127, 128, (outputs * groups, inputs, size, size)).astype(np.float32)
    factors = generator.integers(0, 256, (2, inputs * groups, 7, 8)).astype(np.float32)
    pairs = neighbours(inputs, size * size, outputs=outputs, groups=groups)
    saturated = sums = 0
    reach = [(size - 1) * step for step in dilations]
    for image, out in itertools.product(factors, range(outputs * groups)):
        channels = image[out // outputs * inputs :][:inputs]
        for row, column in itertools.product(range(0, 7 - reach[0], strides[0]), range(0, 8 - reach[1], strides[1])):
            window = channels[:, row:, column:][:, :: dilations[0], :: dilations[1]][:, :size, :size]
            products = (window * steps[out]).ravel()
            for first, second in pairs:
                sums += 1
                saturated += not -32768 <= products[first] + products[second] <= 32767
    found = count_saturated(steps, factors, strides=strides, dilations=dilations, groups=groups)
    assert found == (saturated, sums)
    assert 0 < saturated < sums
