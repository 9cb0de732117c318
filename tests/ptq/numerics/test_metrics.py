import json
import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ptq.errors import EngineBuildError
from ptq.evaluation.predictions import (
    class_metrics,
    combined_predictions,
    parquet_from_tables,
    predictions_table,
    tables_from_parquet,
)
from ptq.numerics.metrics import cosine_per_image, cross_entropy_per_image, split_metrics, sqnr_db, top1_predictions
from ptq.numerics.paired_test import mcnemar_p, paired_comparison, paired_interval_pp, sampling_std_pp
from ptq.records.base import ArtifactRef, digest, record_from_json, to_jsonable
from ptq.records.evaluation import EvaluationRecord, PairedComparison, SplitMetrics

# Predictions 0, 1, 1, 0 against the labels 0, 1, 0, 0; class 2 has no image and is never predicted.
LOGITS = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 2.0, 0.0], [1.0, 0.0, 0.5]], dtype=np.float32)
LABELS = np.array([0, 1, 0, 0])


def metrics_of(logits, labels, reference_logits=None):
    return split_metrics(logits, labels, split="test", reference_logits=reference_logits)


def by_class_of(logits, labels):
    names = [str(index) for index in range(len(labels))]
    table = predictions_table(logits, labels, split="test", paths=names, sha256=names)
    return class_metrics(table, num_classes=logits.shape[1])


def comparison_of(lost, gained, both, neither):
    reference = np.array([1] * lost + [0] * gained + [1] * both + [0] * neither)
    predictions = np.array([0] * lost + [1] * gained + [1] * both + [0] * neither)
    return paired_comparison(reference, predictions, np.ones(len(reference), dtype=np.int64))


def test_top1_is_the_share_of_images_whose_largest_logit_is_the_label():
    assert metrics_of(LOGITS, LABELS).top1_percent == 75.0


def test_of_equal_logits_the_lowest_class_index_is_the_prediction():
    assert top1_predictions(np.array([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]


def test_top5_counts_the_fifth_class_and_not_the_sixth():
    logits = np.array([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]], dtype=np.float32)
    assert metrics_of(logits, np.array([4, 5])).top5_percent == 50.0


def test_top5_breaks_ties_by_the_lowest_class_index():
    logits = np.zeros((2, 6), dtype=np.float32)
    assert metrics_of(logits, np.array([4, 5])).top5_percent == 50.0


def test_with_fewer_than_five_classes_every_image_counts_for_top5():
    assert metrics_of(LOGITS, np.array([2, 2, 2, 1])).top5_percent == 100.0


def test_the_loss_is_the_mean_cross_entropy_in_nats():
    # softmax of (0, ln 3) is (1/4, 3/4).
    logits = np.array([[0.0, math.log(3)], [0.0, math.log(3)]])
    assert metrics_of(logits, np.array([0, 1])).loss == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, abs=1e-12)


def test_the_loss_equals_torch_in_float64():
    generator = np.random.default_rng(3)
    logits = generator.normal(scale=8.0, size=(64, 10)).astype(np.float32)
    labels = generator.integers(0, 10, size=64)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    # Both sum 64 float64 terms; only their order differs.
    assert metrics_of(logits, labels).loss == pytest.approx(expected, rel=1e-14)


def test_the_loss_stays_finite_for_logits_whose_exponential_overflows():
    assert cross_entropy_per_image(np.array([[0.0, 5000.0]], dtype=np.float32), np.array([0])).tolist() == [5000.0]


def test_the_confusion_matrix_has_labels_in_rows_and_predictions_in_columns():
    assert by_class_of(LOGITS, LABELS).confusion == ((2, 1, 0), (0, 1, 0), (0, 0, 0))


def test_recall_and_precision_are_none_for_a_class_that_never_occurs():
    found = by_class_of(LOGITS, LABELS)
    assert found.recall_percent == (200 / 3, 100.0, None)
    assert found.precision_percent == (100.0, 50.0, None)


@pytest.mark.parametrize(("column", "index"), [("label", 2), ("prediction", 2), ("label", -1)])
def test_a_class_beyond_the_models_outputs_is_refused(column, index):
    table = pl.DataFrame({"label": [0, 1], "prediction": [1, 0]}).with_columns(pl.lit(index).alias(column))
    with pytest.raises(ValueError, match=f"have the {column} {index}; expected class indices from 0 to 1"):
        class_metrics(table, num_classes=2)


def test_an_evaluation_of_a_thousand_classes_is_a_small_record():
    # Every stage that takes candidates walks, digests and stores each element of their records.
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(1000, 1000)).astype(np.float32)
    splits = tuple(
        split_metrics(logits, np.arange(1000), split=split, reference_logits=logits + 1) for split in ("val", "test")
    )
    stored = ArtifactRef(name="logits.npz", sha256=digest("logits"), size_bytes=4_000_000)
    record = EvaluationRecord("percentile-99.99-4", 4, "percentile-99.99", splits, predictions=stored, logits=stored)
    assert len(json.dumps(to_jsonable(record))) < 1024 * len(splits)


def test_the_baseline_has_neither_sqnr_nor_agreement():
    metrics = metrics_of(LOGITS, LABELS)
    assert (metrics.sqnr_db, metrics.agreement_percent) == (None, None)


def test_agreement_counts_equal_predictions_whether_right_or_wrong():
    reference = LOGITS[:, [1, 0, 2]]
    reference[2] = LOGITS[2]
    assert metrics_of(LOGITS, LABELS, reference).agreement_percent == 25.0


def test_identical_logits_reach_the_sqnr_limit_and_full_agreement():
    metrics = metrics_of(LOGITS, LABELS, LOGITS.copy())
    assert (metrics.sqnr_db, metrics.agreement_percent) == (200.0, 100.0)


def test_metrics_survive_json_without_nan_or_infinity():
    metrics = metrics_of(LOGITS, LABELS, LOGITS.copy())
    text = json.dumps(to_jsonable(metrics), allow_nan=False)
    assert record_from_json(SplitMetrics, json.loads(text)) == metrics


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_names_the_first_image(broken):
    logits = LOGITS.copy()
    logits[2:, 1] = broken
    with pytest.raises(
        EngineBuildError, match=r"under test on split 'test' are not finite for 2 of 4 images, first for image 2\."
    ):
        metrics_of(logits, LABELS)


def test_a_reference_logit_that_is_not_finite_blames_fp32():
    reference = LOGITS.copy()
    reference[0, 0] = np.nan
    with pytest.raises(EngineBuildError, match=r"Logits of FP32 on split 'test' .* image 0\. Expected finite numbers"):
        metrics_of(LOGITS, LABELS, reference)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_outside_the_classes_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected class indices from 0 to 2\."):
        metrics_of(LOGITS, np.array([0, 1, wrong, 0]))


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 3\) and labels \(3,\); expected \(n, k\) and \(n,\)"):
        metrics_of(LOGITS, LABELS[:3])


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="at least 1 image and 1 class"):
        metrics_of(LOGITS[:0], LABELS[:0])


def test_reference_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"Reference logits have shape \(3, 3\), expected \(4, 3\)"):
        metrics_of(LOGITS, LABELS, LOGITS[:3])


def test_sqnr_is_the_ratio_of_summed_squares_over_all_elements():
    # Signal 9 + 16 + 0 + 75 = 100, noise 1 + 0 + 0 + 0 = 1.
    reference = np.array([[3.0, 4.0], [0.0, math.sqrt(75.0)]])
    assert sqnr_db(reference, reference + np.array([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx(20.0, abs=1e-12)


def test_sqnr_of_noise_on_a_silent_reference_is_the_lower_limit():
    assert sqnr_db(np.zeros(3), np.ones(3)) == -200.0


def test_sqnr_above_the_limit_is_cut():
    assert sqnr_db(np.array([1.0]), np.array([1.0 + 1e-12])) == 200.0


def test_sqnr_of_float32_arrays_is_computed_in_float64():
    # In float32 the square of 1e-25 is zero, and so would the noise be.
    assert sqnr_db(np.array([1e-20], np.float32), np.array([1.1e-20], np.float32)) == pytest.approx(20.0, abs=1e-5)


def test_sqnr_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        sqnr_db(np.ones(2), np.ones(3))


def test_cosine_is_taken_row_by_row():
    a = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    b = np.array([[1.0, 1.0], [-2.0, -2.0], [5.0, 0.0]])
    # One rounding each in the length, the division and the sum.
    assert cosine_per_image(a, b) == pytest.approx([math.sqrt(0.5), -1.0, 1.0], abs=1e-15)


def test_cosine_treats_two_silent_rows_as_equal_and_one_as_unlike():
    assert cosine_per_image(np.zeros((2, 2)), np.array([[0.0, 0.0], [1.0, 0.0]])).tolist() == [1.0, 0.0]


def test_cosine_does_not_depend_on_the_size_of_the_rows():
    rows = np.array([[3e-200, 4e-200], [3e200, 4e200]])
    assert cosine_per_image(rows, np.array([[3.0, 4.0], [3.0, 4.0]])) == pytest.approx([1.0, 1.0], abs=1e-15)


def test_cosine_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"one shape \(n, k\), got \(2, 2\) and \(3, 2\)"):
        cosine_per_image(np.ones((2, 2)), np.ones((3, 2)))


def test_the_predictions_table_has_one_row_an_image_in_the_order_given():
    table = predictions_table(
        LOGITS, LABELS, split="val", paths=["a.png", "b.png", "c.png", "d.png"], sha256=["1", "2", "3", "4"]
    )
    assert table.schema == {
        "split": pl.String,
        "index": pl.Int64,
        "path": pl.String,
        "sha256": pl.String,
        "label": pl.Int64,
        "prediction": pl.Int64,
        "correct": pl.Boolean,
        "loss": pl.Float64,
        "top5_correct": pl.Boolean,
    }
    assert table.drop("loss").row(2) == ("val", 2, "c.png", "3", 0, 1, False, True)


def test_the_metrics_can_be_computed_again_from_the_predictions_table():
    table = predictions_table(LOGITS, LABELS, split="val", paths=list("abcd"), sha256=list("1234"))
    metrics = metrics_of(LOGITS, LABELS)
    assert 100 * table["correct"].mean() == metrics.top1_percent
    assert 100 * table["top5_correct"].mean() == metrics.top5_percent
    # The mean of the same four float64 values, summed in another order.
    assert table["loss"].mean() == pytest.approx(metrics.loss, rel=1e-15)


def test_a_predictions_table_with_a_path_missing_is_refused():
    with pytest.raises(ValueError, match="4 images have 3 paths and 4 digests"):
        predictions_table(LOGITS, LABELS, split="val", paths=list("abc"), sha256=list("1234"))


def test_a_predictions_table_of_logits_that_are_not_finite_is_refused():
    with pytest.raises(EngineBuildError, match="first for image 0"):
        predictions_table(LOGITS * np.nan, LABELS, split="val", paths=list("abcd"), sha256=list("1234"))


def test_tables_come_back_from_parquet_by_split_in_their_order(tmp_path):
    val, test = (
        predictions_table(LOGITS, LABELS, split=split, paths=list("dcba"), sha256=list("1234"))
        for split in ("val", "test")
    )
    (tmp_path / "predictions.parquet").write_bytes(parquet_from_tables([val, test]))
    tables = tables_from_parquet(tmp_path / "predictions.parquet")
    assert list(tables) == ["val", "test"]
    assert tables["val"].equals(val)
    assert tables["test"].equals(test)


def test_equal_tables_are_written_as_equal_bytes():
    first, second = (
        predictions_table(LOGITS, LABELS, split="val", paths=list("abcd"), sha256=list("1234")) for _ in range(2)
    )
    assert parquet_from_tables([first]) == parquet_from_tables([second])


def test_combined_predictions_name_the_candidate_of_every_row(tmp_path):
    table = predictions_table(LOGITS, LABELS, split="val", paths=list("abcd"), sha256=list("1234"))
    (tmp_path / "one.parquet").write_bytes(parquet_from_tables([table]))
    files = {"fp32": tmp_path / "one.parquet", "mse-0": tmp_path / "one.parquet"}
    combined = pl.read_parquet(combined_predictions(files))
    assert combined["candidate"].to_list() == ["fp32"] * 4 + ["mse-0"] * 4
    assert combined.tail(4).drop("candidate").equals(table)


def test_a_comparison_counts_each_kind_of_change():
    comparison = paired_comparison(
        np.array([0, 1, 2, 2, 0]),
        np.array([0, 2, 1, 0, 1]),
        np.array([0, 1, 1, 1, 1]),
    )
    assert (comparison.fp32_only_correct, comparison.int8_only_correct, comparison.flipped) == (1, 2, 4)
    assert comparison.drop_pp == -20.0


def test_a_drop_on_the_limit_is_computed_without_rounding():
    assert comparison_of(lost=3, gained=0, both=900, neither=97).drop_pp == 0.3


def test_the_interval_matches_the_published_example():
    # Example in Bonett's R functions: 26 and 4 discordant of 40 give 0.3126438 to 0.7349752.
    assert paired_interval_pp(26, 4, 40) == pytest.approx((31.26438, 73.49752), abs=5e-6)


def test_the_interval_keeps_a_width_where_no_image_changed():
    # p = q = 1/102, so it is +-1.959964 sqrt(2 / 102 / 102) = +-2.71746 pp.
    comparison = comparison_of(lost=0, gained=0, both=90, neither=10)
    assert comparison.drop_interval_pp == pytest.approx((-2.71746, 2.71746), abs=5e-6)


def test_the_interval_never_exceeds_all_images():
    assert paired_interval_pp(1, 0, 1)[1] == 100.0
    assert paired_interval_pp(0, 1, 1)[0] == -100.0


@settings(deadline=None)
@given(lost=st.integers(0, 300), gained=st.integers(0, 300), rest=st.integers(1, 2000))
def test_swapping_the_models_mirrors_the_interval(lost, gained, rest):
    low, high = paired_interval_pp(lost, gained, lost + gained + rest)
    assert paired_interval_pp(gained, lost, lost + gained + rest) == (-high, -low)


@pytest.mark.parametrize(("p_lost", "p_gained", "images"), [(0.03, 0.02, 624), (0.01, 0.005, 2000), (0.3, 0.05, 100)])
def test_the_interval_covers_the_true_drop_in_about_95_percent_of_the_test_sets(p_lost, p_gained, images):
    counts = np.random.default_rng(0).multinomial(images, [p_lost, p_gained, 1 - p_lost - p_gained], size=4000)
    intervals = np.array([paired_interval_pp(int(lost), int(gained), images) for lost, gained, _ in counts])
    drop_pp = 100 * (p_lost - p_gained)
    coverage = np.mean((intervals[:, 0] <= drop_pp) & (drop_pp <= intervals[:, 1]))
    # 4000 sets leave a standard error of 0.35 points; the method itself is exact to a few points.
    assert 0.935 <= coverage <= 0.985


@settings(deadline=None)
@given(lost=st.integers(0, 80), gained=st.integers(0, 80))
def test_mcnemar_equals_the_binomial_test_of_scipy(lost, gained):
    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    # scipy sums probabilities in floating point.
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_a_discordant_image_is_one():
    assert comparison_of(lost=0, gained=0, both=5, neither=5).mcnemar_p == 1.0


def test_mcnemar_stays_a_probability_for_thousands_of_discordant_images():
    assert mcnemar_p(2500, 2500) == 1.0
    assert mcnemar_p(0, 5000) == 0.0


def test_a_comparison_of_different_lengths_is_refused():
    with pytest.raises(ValueError, match="got 2 FP32 predictions, 3 INT8 predictions and 3 labels"):
        paired_comparison(np.zeros(2), np.zeros(3), np.zeros(3))


def test_a_comparison_without_images_is_refused():
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        paired_comparison(np.zeros(0), np.zeros(0), np.zeros(0))


def test_the_sampling_deviation_is_that_of_the_drop_over_test_sets_drawn_anew():
    comparison = comparison_of(lost=200, gained=12, both=370, neither=42)
    draws = np.random.default_rng(1).multinomial(624, [200 / 624, 12 / 624, 412 / 624], size=20_000)
    # 20,000 draws know a standard deviation to 0.5 %; four times that is allowed.
    assert sampling_std_pp(comparison) == pytest.approx(np.std(100 * (draws[:, 0] - draws[:, 1]) / 624), rel=0.02)


def test_the_sampling_deviation_is_zero_where_both_models_are_right_on_the_same_images():
    assert sampling_std_pp(comparison_of(lost=0, gained=0, both=3, neither=1)) == 0.0


def test_a_comparison_survives_json():
    comparison = comparison_of(lost=2, gained=1, both=3, neither=1)
    assert record_from_json(PairedComparison, json.loads(json.dumps(to_jsonable(comparison)))) == comparison
