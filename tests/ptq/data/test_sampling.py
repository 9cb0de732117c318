"""Are calibration images drawn in proportion, exactly, and never from what is evaluated?"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_data import index, write_images

from ptq.data.index import ImageRow, parquet_from_index, rows_of_split
from ptq.data.sampling import (
    calibration_overlap,
    classes_never_drawn,
    draw_calibration_indices,
    draw_stratified,
    draw_trials,
    refuse_overlap,
    stratified_order,
)
from ptq.errors import CalibrationError


def test_a_draw_is_proportional_to_the_classes():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    drawn = draw_stratified(labels, images=20, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [12, 6, 2]


def test_the_largest_remainder_gets_the_image_left_over():
    labels = np.repeat([0, 1, 2], [46, 33, 21])
    drawn = draw_stratified(labels, images=10, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [5, 3, 2]


def test_a_rare_class_gets_one_image_where_there_are_enough():
    labels = np.repeat([0, 1, 2], [998, 1, 1])
    drawn = draw_stratified(labels, images=3, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [1, 1, 1]


def test_a_draw_smaller_than_the_classes_does_not_always_take_the_first_ones():
    labels = np.repeat(np.arange(100), 2)
    drawn = {label for seed in range(20) for label in labels[draw_stratified(labels, images=10, seed=seed)].tolist()}
    assert len(drawn) > 50


def test_the_same_seed_draws_the_same_images_and_another_seed_others():
    labels = np.repeat([0, 1], 200)
    first = draw_stratified(labels, images=50, seed=3)
    np.testing.assert_array_equal(draw_stratified(labels, images=50, seed=3), first)
    assert not np.array_equal(draw_stratified(labels, images=50, seed=4), first)


def test_a_draw_stays_what_it_was():
    drawn = draw_stratified(np.repeat([0, 1], [12, 6]), images=6, seed=7)
    # Recorded once: a draw is part of a run's identity, so it may not change with a library.
    assert drawn.tolist() == [0, 6, 7, 8, 14, 15]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 2**31 - 1))
def test_a_draw_is_exact_sorted_without_replacement_and_fair(labels, images, seed):
    labels = np.array(labels, dtype=np.int64)
    images = min(images, len(labels))
    drawn = draw_stratified(labels, images=images, seed=seed)
    assert len(drawn) == images
    assert np.all(np.diff(drawn) > 0)
    classes = np.unique(labels)
    counts = np.array([np.sum(labels[drawn] == label) for label in classes])
    assert images < len(classes) or counts.min() >= 1


def test_too_few_images_are_refused_with_the_numbers():
    with pytest.raises(
        CalibrationError, match=r'calibration\.images asks for 512; split "train" has 300 images\. Lower'
    ):
        draw_calibration_indices(np.zeros(300, dtype=np.int64), images=512, seed=0)


def test_asking_for_a_negative_number_of_images_is_a_wrong_argument():
    with pytest.raises(ValueError, match=r"images must be in \[0, 3\], got -1"):
        draw_stratified(np.zeros(3, dtype=np.int64), images=-1, seed=0)


def test_classes_that_no_trial_drew_are_found():
    labels = np.array([5, 5, 2, 9, 2])
    assert classes_never_drawn(labels, [np.array([0]), np.array([1])]) == (2, 9)
    assert classes_never_drawn(labels, []) == (2, 5, 9)


def test_an_overlap_is_the_digests_in_both():
    assert calibration_overlap(["b", "a", "a", "c"], ["c", "a", "d"]) == ["a", "c"]


def test_an_overlap_is_refused_naming_three_pairs_of_files():
    drawn = [ImageRow(f"train/{number}.png", 0, f"digest{number}") for number in range(5)]
    evaluated = [ImageRow(f"test/{number}.png", 0, f"digest{number}") for number in range(1, 6)]
    expected = (
        '4 calibration images drawn from split "train" are also in split "test", on which the model is evaluated: '
        r"train/1\.png = test/1\.png, train/2\.png = test/2\.png, train/3\.png = test/3\.png and 1 more\. Expected none"
    )
    with pytest.raises(CalibrationError, match=expected):
        refuse_overlap(drawn, evaluated, split="train", evaluated_split="test")


def test_disjoint_images_are_accepted():
    rows = [ImageRow("a.png", 0, "one")], [ImageRow("a.png", 0, "two")]
    assert refuse_overlap(*rows, split="train", evaluated_split="test") is None


@pytest.fixture
def table(folder, tmp_path):
    path = tmp_path / "index.parquet"
    path.write_bytes(parquet_from_index(index(folder)))
    return path


def drawn_trials(table, **options):
    settings = {"split": "train", "evaluated_splits": ("val", "test"), "images": 2, "trials": 5, "seed": 0}
    return draw_trials(table, class_names=("cat", "dog"), **(settings | options))


def test_trials_are_draws_with_successive_seeds_over_the_images_drawn(table):
    found = drawn_trials(table)
    rows = rows_of_split(table, "train")
    labels = np.array([row.label for row in rows])
    for trial, positions in enumerate(found.indices):
        expected = [rows[position] for position in draw_stratified(labels, images=2, seed=trial)]
        assert [found.rows[position] for position in positions] == expected
    assert {position for trial in found.indices for position in trial} == set(range(len(found.rows)))
    assert found.warnings == ()


def test_trials_warn_of_classes_never_drawn(table):
    found = drawn_trials(table, images=1, trials=1)
    assert len(found.warnings) == 1
    assert 'No calibration image of 1 of the 2 classes in split "train" was drawn' in found.warnings[0]


def test_trials_refuse_to_calibrate_on_the_split_that_is_evaluated(table):
    with pytest.raises(CalibrationError, match=r'drawn from split "test" are also in split "test".*test/cat/g\.png'):
        drawn_trials(table, split="test")


def test_trials_skip_an_evaluated_split_that_is_absent(table):
    assert drawn_trials(table, evaluated_splits=("dev", "test")).indices == drawn_trials(table).indices


def test_trials_refuse_a_copy_of_an_evaluated_image_under_another_name(folder, tmp_path):
    write_images(folder, {"test/cat/copy.png": 1})
    (tmp_path / "index.parquet").write_bytes(parquet_from_index(index(folder)))
    with pytest.raises(CalibrationError, match=r"train/cat/a\.png = test/cat/copy\.png"):
        drawn_trials(tmp_path / "index.parquet", images=4)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**31 - 1))
def test_every_prefix_of_an_order_holds_each_class_nearly_in_proportion(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = stratified_order(labels, seed=seed)
    assert sorted(order) == list(range(len(labels)))
    counts = np.cumsum(labels[order][:, None] == np.arange(len(sizes)), axis=0)
    lengths = np.arange(1, len(labels) + 1)
    # At any place of the order each class is within one image of its share, so a prefix is within one per class of its
    # own length, and a class is off by one and by its share of that.
    shares = np.array(sizes) / len(labels)
    assert np.all(np.abs(counts - lengths[:, None] * shares) <= 1 + len(sizes) * shares)


def test_an_order_has_no_period_that_groups_of_every_eighth_image_could_meet():
    labels = np.repeat(np.arange(8), 64)
    groups = labels[stratified_order(labels, seed=0)].reshape(-1, 8)
    assert all(len(np.unique(group)) == 8 for group in groups.T)


def test_an_order_depends_on_the_seed_alone():
    labels = np.repeat([0, 1], 20)
    assert stratified_order(labels, seed=3).tolist() == stratified_order(labels, seed=3).tolist()
    assert stratified_order(labels, seed=3).tolist() != stratified_order(labels, seed=4).tolist()


def test_ordered_trials_hold_the_same_images_as_ascending_ones(table):
    plain, ordered = (drawn_trials(table, images=3, is_ordered=flag) for flag in (False, True))
    assert plain.rows == ordered.rows
    assert plain.indices == tuple(tuple(sorted(draw)) for draw in ordered.indices)
    assert plain.indices != ordered.indices
