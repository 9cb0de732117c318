import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq.calibration.shards import bytes_from_shard, draws_of_shard, merge_shards, shard_from_bytes
from ptq.calibration.statistics import collect_statistics
from ptq.numerics.histogram import bytes_from_trials

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (12, 6, 6, 1), dtype=np.uint8)
# Images of very different ranges: the bins of the shards have different widths.
PIXELS[7] = 128
NAMES = ["input", "relu", "unread"]
DRAWS = ((3, 0, 11, 7), (7, 8), (1, 2, 3, 4, 5, 6))


def reader(image):
    return [image, np.maximum(image * 3, 0) ** 5, image[:, 0]]


def collect(draws):
    return collect_statistics(
        [reader], PIXELS, draws=draws, names=NAMES, channel_axes=[1, 1, None],
        image_names=[f"{index}.png" for index in range(len(PIXELS))], mean=[0.5], std=[0.01], bins=256,
    )  # fmt: skip


def bits(trials):
    means = [mean.tobytes() for trial in trials for mean in trial.channel_sums.means()]
    return bytes_from_trials([trial.histograms for trial in trials]), means


@pytest.mark.parametrize("shards", [1, 2, 5, 10])
def test_shards_in_any_number_and_order_merge_to_the_bytes_of_one_piece(shards):
    parts = [bytes_from_shard(collect(draws_of_shard(DRAWS, shard=shard, shards=shards))) for shard in range(shards)]
    assert bits(merge_shards(parts)) == bits(collect(DRAWS))
    assert bits(merge_shards(parts[::-1])) == bits(collect(DRAWS))


def test_a_shard_of_which_a_trial_has_drawn_nothing_is_read_back_as_it_was():
    trials = collect(draws_of_shard(DRAWS, shard=1, shards=10))
    assert [trial.channel_sums.images for trial in trials] == [0, 0, 1]
    assert bytes_from_shard(shard_from_bytes(bytes_from_shard(trials))) == bytes_from_shard(trials)


@given(
    draws=st.lists(st.lists(st.integers(0, 30), unique=True), min_size=1, max_size=4).filter(any),
    fraction=st.floats(0, 1),
)
def test_every_image_of_every_draw_is_in_exactly_one_shard(draws, fraction):
    images = len({position for draw in draws for position in draw})
    shards = 1 + int(fraction * (images - 1))
    parts = [draws_of_shard(draws, shard=shard, shards=shards) for shard in range(shards)]
    assert all(any(part) for part in parts)
    for trial, draw in enumerate(draws):
        assert sorted(position for part in parts for position in part[trial]) == sorted(draw)


@pytest.mark.parametrize(("shard", "shards"), [(2, 2), (-1, 2), (0, 4)])
def test_a_shard_that_does_not_exist_or_would_be_empty_is_refused(shard, shards):
    with pytest.raises(ValueError, match=rf"Shard {shard} of {shards} was asked for over 3 images"):
        draws_of_shard([[0, 1], [5]], shard=shard, shards=shards)


def test_no_shard_is_nothing_to_merge():
    with pytest.raises(ValueError, match="No shard was given"):
        merge_shards([])
