import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.errors import CalibrationError
from ptq.numerics.bias_correction import RESOLUTION, channel_sums_of
from ptq.numerics.histogram import MIN_EXPONENT, empty_histograms, histograms_of, merge
from ptq.numerics.histogram_kernel import Accumulators

BINS = 64
VALUES = st.lists(
    st.floats(min_value=-(2.0**40), max_value=2.0**40, width=32, allow_subnormal=True) | st.just(0.0),
    min_size=1,
    max_size=60,
)
IMAGES = st.lists(VALUES, min_size=1, max_size=5)


def array(values):
    return np.array([values], dtype=np.float32)


def accumulated(images, *, draws=None, trials=1, bins=BINS, axis=None):
    found = Accumulators(trials=trials, names=["relu"], channel_axes=[axis], bins=bins)
    for number, image in enumerate(images):
        found.add_image_([0] if draws is None else draws[number], "a.png")(0, image)
    return found.statistics()


def merged(images, *, bins=BINS):
    whole = empty_histograms(1, bins=bins)
    for image in images:
        whole = merge(whole, histograms_of([image], bins=bins, names=["relu"], image="a.png"))
    return whole


def assert_same(left, right):
    for name in ("counts", "exponents", "maxima", "zeros"):
        assert getattr(left, name).tobytes() == getattr(right, name).tobytes(), name


@given(IMAGES)
@settings(deadline=None)
def test_images_leave_what_merging_their_histograms_leaves(images):
    images = [array(values) for values in images]
    ((found, _),) = accumulated(images)
    assert_same(found, merged(images))


@given(IMAGES, st.data())
@settings(deadline=None)
def test_each_trial_has_the_bits_it_would_have_alone_whatever_the_others_drew(images, data):
    images = [array(values) for values in images]
    drawn = st.sets(st.integers(0, 2), min_size=1).map(sorted)
    draws = data.draw(st.lists(drawn, min_size=len(images), max_size=len(images)))
    found = accumulated(images, draws=draws, trials=3)
    for trial in range(3):
        own = [image for image, draw in zip(images, draws, strict=True) if trial in draw]
        assert_same(found[trial][0], merged(own))
        assert found[trial][1].images == len(own)


@given(IMAGES, st.randoms(use_true_random=False))
@settings(deadline=None)
@pytest.mark.slow
def test_the_order_of_images_does_not_change_a_bit(images, random):
    images = [array(values) for values in images]
    shuffled = random.sample(images, len(images))
    assert_same(accumulated(images)[0][0], accumulated(shuffled)[0][0])


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4095, 4096, 4097, 50_000])
def test_tensors_longer_than_a_block_are_counted_whole(size):
    generator = np.random.default_rng(size)
    images = [np.maximum(generator.standard_normal((1, size)), 0).astype(np.float32) * scale for scale in (1, 9, 0.1)]
    ((found, _),) = accumulated(images, bins=4096)
    assert_same(found, merged(images, bins=4096))


def test_a_maximum_at_the_end_of_a_tensor_starts_the_count_again():
    image = np.ones((1, 20_000), np.float32)
    image[0, -1] = 1000
    first = np.ones((1, 100), np.float32)
    ((found, _),) = accumulated([first, image], bins=4096)
    assert_same(found, merged([first, image], bins=4096))


def test_the_largest_and_the_smallest_floats_have_bins():
    tiny = np.float32(1e-45)
    largest = np.finfo(np.float32).max
    for values in ([tiny, 0.0, -tiny], [largest, -largest, 1.0], [tiny, largest]):
        ((found, _),) = accumulated([array(values)])
        assert_same(found, merged([array(values)]))
    assert accumulated([array([tiny])])[0][0].exponents.tolist() == [MIN_EXPONENT]


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 1, 5, 7), (1, 64, 3, 3), (1, 700, 7, 7), (1, 5000, 1, 1)])
@pytest.mark.parametrize("is_channels_last", [True, False])
def test_channel_sums_are_the_plain_ones_to_one_unit(shape, is_channels_last):
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    given_image = np.ascontiguousarray(image.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if is_channels_last else image
    ((histograms, sums),) = accumulated([given_image], axis=1)
    (expected,) = channel_sums_of([image], axes=[1]).sums
    # float64 sums in another order differ by less than the resolution, which rounding turns into one unit.
    assert np.abs(sums.sums[0] - expected).max() <= 1
    assert_same(histograms, merged([image]))


def test_channel_sums_start_again_with_the_count():
    image = np.ones((1, 64, 100, 1), np.float32)
    image[0, :, -1] = 1000
    ((_, sums),) = accumulated([image], axis=1)
    np.testing.assert_allclose(sums.means()[0], 10.99, rtol=0, atol=RESOLUTION)


def test_channel_sums_belong_to_the_trials_that_drew_the_image():
    images = [np.full((1, 2, 2, 2), value, np.float32) for value in (1, 5)]
    first, second = accumulated(images, draws=[[0], [0, 1]], trials=2, axis=1)
    assert first[1].means()[0].tolist() == [3, 3]
    assert second[1].means()[0].tolist() == [5, 5]


def test_a_trial_that_drew_nothing_is_neutral():
    _, (histograms, sums) = accumulated([array([1.0])], draws=[[0]], trials=2)
    assert_same(histograms, empty_histograms(1, bins=BINS))
    assert sums.sums == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_layer_and_image_and_leaves_no_trace(bad):
    found = Accumulators(trials=1, names=["relu"], channel_axes=[None], bins=BINS)
    with pytest.raises(CalibrationError, match=r"Activation relu holds NaN or infinity for image a\.png"):
        found.add_tensor_(0, array([1.0, bad]), trials=[0], image="a.png")
    found.add_tensor_(0, array([2.0]), trials=[0], image="b.png")
    assert_same(found.statistics()[0][0], merged([array([2.0])]))


def test_an_empty_tensor_is_an_error():
    with pytest.raises(CalibrationError, match=r"Tensor relu has 0 values for image a\.png"):
        accumulated([np.zeros((1, 0), np.float32)])


def test_names_and_axes_must_match():
    with pytest.raises(ValueError, match="2 tensors have 1 channel axes"):
        Accumulators(trials=1, names=["a", "b"], channel_axes=[None], bins=BINS)


PROGRAM = """
import numpy as np
from ptq.numerics.histogram_kernel import Accumulators
from ptq.numerics.histogram import histograms_of
image = np.maximum(np.random.default_rng(0).standard_normal((1, 10_007)), 0).astype(np.float32)
found = Accumulators(trials=1, names=["relu"], channel_axes=[None], bins=4096)
found.add_tensor_(0, image, trials=[0], image="a.png")
expected = histograms_of([image], bins=4096, names=["relu"], image="a.png")
((histograms, _),) = found.statistics()
raise SystemExit(0 if (histograms.counts == expected.counts).all() else 1)
"""


@pytest.mark.slow
def test_a_processor_without_vector_compression_counts_the_same(tmp_path):
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    assert subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=False).returncode == 0
