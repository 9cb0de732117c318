import numpy as np
import polars as pl
import pytest

from ptq.evaluation.predictions import predictions_table
from ptq.evaluation.selection import (
    ComparedImages,
    compared_images,
    method_spreads,
    rank_candidates,
    select,
    spread_sentence,
)
from ptq.numerics.paired_test import sampling_std_pp
from ptq.records.base import ArtifactRef
from ptq.records.calibration import AmaxRecord
from ptq.records.evaluation import EvaluationRecord, FlippedImage, MethodSpread, PairedComparison, SplitMetrics

BLOB = ArtifactRef(name="blob", sha256="0" * 64, size_bytes=1)


def metrics_on(split, *, top1, sqnr, agreement, images=10):
    return SplitMetrics(
        split=split,
        images=images,
        top1_percent=top1,
        top5_percent=100.0,
        loss=0.5,
        sqnr_db=sqnr,
        agreement_percent=agreement,
    )


def candidate(method, trial, *, top1, sqnr=15.0, agreement=95.0, test_top1=70.0, images=10):
    return EvaluationRecord(
        candidate=f"{method}-{trial}",
        trial=trial,
        method=method,
        splits=(
            metrics_on("val", top1=top1, sqnr=sqnr, agreement=agreement, images=images),
            metrics_on("test", top1=test_top1, sqnr=sqnr, agreement=agreement),
        ),
        predictions=BLOB,
        logits=BLOB,
    )


def amax(method, trial, sha256):
    return AmaxRecord(trial=trial, method=method, table=ArtifactRef(name="amax.json", sha256=sha256, size_bytes=9))


def comparison_with(*, lost, gained, images):
    return PairedComparison(
        images=images,
        drop_pp=100 * (lost - gained) / images,
        drop_interval_pp=(-1.0, 1.0),
        mcnemar_p=1.0,
        fp32_only_correct=lost,
        int8_only_correct=gained,
        flipped=lost + gained,
    )


def spread_of(method, std_pp):
    return MethodSpread(
        method=method, mean_top1_percent=85.0, min_top1_percent=84.0, max_top1_percent=86.0, std_pp=std_pp
    )


# Ten images of class 0: FP32 misses the last two, INT8 the first and the last two, one of them differently.
IMAGES = ComparedImages(
    paths=tuple(f"test/{index}.png" for index in range(10)),
    labels=np.zeros(10, dtype=np.int64),
    fp32_predictions=np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
    int8_predictions=np.array([1, 0, 0, 0, 0, 0, 0, 0, 1, 2]),
)
CANDIDATES = (
    candidate("max", 0, top1=80.0, test_top1=60.0, images=1000),
    candidate("entropy", 0, top1=90.0, test_top1=70.0, images=1000),
    candidate("entropy", 1, top1=85.0, test_top1=80.0, images=1000),
)
# The max tables of both trials are one and the same.
TABLES = (amax("max", 0, "aa"), amax("max", 1, "aa"), amax("entropy", 0, "bb"), amax("entropy", 1, "cc"))


def selection_of(**changes):
    arguments = {
        "candidates": CANDIDATES,
        "tables": TABLES,
        "test_images": IMAGES,
        "selection_split": "val",
        "test_split": "test",
        "is_selection_on_test": False,
    }
    return select(**(arguments | changes))


def names(ranked):
    return [record.candidate for record in ranked]


def test_a_top1_beyond_one_standard_error_decides_even_with_the_worst_sqnr():
    # At 80 % of 10,000 images one standard error is 0.4 points.
    ranked = rank_candidates(
        [
            candidate("max", 0, top1=79.5, sqnr=30.0, images=10_000),
            candidate("mse", 0, top1=80.0, sqnr=5.0, images=10_000),
        ],
        selection_split="val",
    )
    assert names(ranked) == ["mse-0", "max-0"]


def test_within_one_standard_error_the_logits_closest_to_fp32_decide():
    ranked = rank_candidates(
        [
            candidate("max", 0, top1=79.7, sqnr=30.0, images=10_000),
            candidate("mse", 0, top1=80.0, sqnr=5.0, images=10_000),
            candidate("entropy", 0, top1=78.0, sqnr=40.0, images=10_000),
        ],
        selection_split="val",
    )
    assert names(ranked) == ["max-0", "mse-0", "entropy-0"]


def test_the_test_split_has_no_say_in_the_ranking():
    ranked = rank_candidates(
        [candidate("max", 0, top1=80.0, test_top1=99.0), candidate("mse", 0, top1=81.0, sqnr=15.1, test_top1=1.0)],
        selection_split="val",
    )
    assert names(ranked) == ["mse-0", "max-0"]


def test_equal_top1_is_decided_by_sqnr_then_by_agreement():
    ranked = rank_candidates(
        [
            candidate("max", 0, top1=80.0, sqnr=15.0, agreement=96.0),
            candidate("mse", 0, top1=80.0, sqnr=15.0, agreement=97.0),
            candidate("entropy", 0, top1=80.0, sqnr=16.0, agreement=90.0),
        ],
        selection_split="val",
    )
    assert names(ranked) == ["entropy-0", "mse-0", "max-0"]


def test_equal_candidates_come_in_one_order_whatever_order_they_are_given_in():
    equal = [candidate("mse", 1, top1=80.0), candidate("mse", 0, top1=80.0), candidate("entropy", 3, top1=80.0)]
    assert names(rank_candidates(equal, selection_split="val")) == ["entropy-3", "mse-0", "mse-1"]
    assert names(rank_candidates(equal[::-1], selection_split="val")) == ["entropy-3", "mse-0", "mse-1"]


def test_no_candidate_is_refused():
    with pytest.raises(ValueError, match="no candidate to rank"):
        rank_candidates([], selection_split="val")


def test_a_baseline_among_the_candidates_is_refused():
    fp32 = EvaluationRecord(
        candidate="fp32",
        trial=None,
        method=None,
        splits=(metrics_on("val", top1=90.0, sqnr=200.0, agreement=100.0),),
        predictions=BLOB,
        logits=BLOB,
    )
    with pytest.raises(ValueError, match="fp32 has method None and trial None.*Leave the FP32 baseline out"):
        rank_candidates([fp32], selection_split="val")


def test_a_candidate_that_was_not_compared_with_fp32_is_refused():
    with pytest.raises(ValueError, match="max-0 has no SQNR or agreement on 'val'"):
        rank_candidates([candidate("max", 0, top1=80.0, sqnr=None)], selection_split="val")


def test_a_split_that_was_not_measured_is_named_with_those_that_were():
    with pytest.raises(KeyError, match=r"not measured on 'dev', only on \['val', 'test'\]"):
        rank_candidates([candidate("max", 0, top1=80.0)], selection_split="dev")


def test_the_spread_is_the_sample_standard_deviation_over_the_trials():
    # Mean 84, squared deviations 4 + 0 + 4, divided by 2.
    (spread,) = method_spreads([("mse", 0, 82.0), ("mse", 1, 84.0), ("mse", 2, 86.0)])
    assert spread == MethodSpread(
        method="mse", mean_top1_percent=84.0, min_top1_percent=82.0, max_top1_percent=86.0, std_pp=2.0
    )


def test_one_trial_has_no_spread():
    assert method_spreads([("max", 0, 82.0)])[0].std_pp == 0.0


def test_trials_with_equal_accuracy_have_exactly_no_spread():
    assert method_spreads([("max", trial, 84.1) for trial in range(5)])[0].std_pp == 0.0


def test_spreads_come_in_the_order_of_the_config_and_only_for_methods_that_ran():
    spreads = method_spreads([("entropy", 0, 1.0), ("mse", 0, 1.0), ("max", 0, 1.0)])
    assert [spread.method for spread in spreads] == ["max", "mse", "entropy"]


def test_a_trial_given_twice_is_refused():
    with pytest.raises(ValueError, match="Method mse has trial 1 twice"):
        method_spreads([("mse", 1, 82.0), ("max", 1, 80.0), ("mse", 1, 82.0)])


def test_the_sentence_calls_a_small_spread_noise_of_the_test_set():
    # 100 sqrt(7 - 1 / 624) / 624 = 0.42
    assert spread_sentence(spread_of("entropy", 0.08), comparison_with(lost=4, gained=3, images=624), trials=5) == (
        "Over 5 draws entropy's top-1 varies by 0.08 pp (standard deviation); 624 test images alone would move the "
        "drop by 0.42 pp, so differences between draws are within the noise of the test set."
    )


def test_the_sentence_calls_a_large_spread_a_matter_of_the_calibration_images():
    sentence = spread_sentence(spread_of("mse", 3.5), comparison_with(lost=4, gained=3, images=624), trials=5)
    assert sentence.endswith(
        "0.42 pp, so the choice of calibration images matters more than the noise of the test set."
    )


def test_the_sentence_claims_nothing_from_one_draw():
    assert spread_sentence(spread_of("max", 0.0), comparison_with(lost=4, gained=3, images=624), trials=1) == (
        "One draw of max says nothing about the spread over calibration draws; 624 test images alone would move the "
        "drop by 0.42 pp (standard deviation)."
    )


def test_the_sentence_claims_no_noise_where_both_models_are_right_on_the_same_images():
    sentence = spread_sentence(spread_of("max", 0.1), comparison_with(lost=0, gained=0, images=50), trials=3)
    assert sentence.endswith("right on the same of the 50 test images, so these give no estimate of their own noise.")


def test_the_selection_is_the_best_on_the_selection_split_with_its_own_table():
    selection = selection_of()
    assert (selection.candidate, selection.method, selection.trial) == ("entropy-0", "entropy", 0)
    assert selection.table.sha256 == "bb"
    assert (selection.selection_split, selection.test_split) == ("val", "test")


def test_the_selection_compares_with_fp32_on_the_test_images():
    comparison = selection_of().comparison
    assert (comparison.images, comparison.drop_pp, comparison.flipped) == (10, 10.0, 2)
    assert selection_of().sampling_std_pp == sampling_std_pp(comparison)


def test_the_selection_lists_every_image_whose_prediction_changed():
    assert selection_of().flipped_images == (
        FlippedImage(path="test/0.png", label=0, fp32_prediction=0, int8_prediction=1),
        FlippedImage(path="test/9.png", label=0, fp32_prediction=1, int8_prediction=2),
    )


def test_trials_that_share_a_table_each_count_in_the_spread():
    tables = (*TABLES, amax("entropy", 2, "cc"))
    entropy = selection_of(tables=tables).spreads[-1]
    # 70, 80 and once more 80.
    assert entropy.mean_top1_percent == pytest.approx(230 / 3, abs=1e-12)


def test_a_method_whose_trials_all_share_one_table_has_no_spread():
    max_spread = selection_of().spreads[0]
    assert (max_spread.method, max_spread.mean_top1_percent, max_spread.std_pp) == ("max", 60.0, 0.0)


def test_methods_that_share_a_table_both_have_a_spread():
    tables = (*TABLES, amax("percentile", 0, "aa"))
    spreads = selection_of(tables=tables).spreads
    assert [spread.method for spread in spreads] == ["max", "percentile", "entropy"]
    assert [spread.mean_top1_percent for spread in spreads] == [60.0, 60.0, 75.0]


def test_the_spread_sentence_counts_the_trials_of_the_chosen_method():
    assert selection_of().spread_sentence.startswith("Over 2 draws entropy's top-1 varies by 7.07 pp")


def test_the_reason_gives_the_accuracy_and_the_number_of_candidates():
    assert selection_of().reason == "entropy-0 has the best top-1 on val of 3 candidates, 90.00 %."


@pytest.mark.parametrize(
    ("rival", "words"),
    [
        (
            candidate("max", 0, top1=90.0, sqnr=12.0, images=1000),
            "2 of 3 candidates have a top-1 on val within one standard error (0.95 pp) of the best, 90.00 %; of these "
            "entropy-0, with 90.00 %, has the logits closest to FP32's, 15.00 dB.",
        ),
        (
            candidate("max", 0, top1=90.0, agreement=90.0, images=1000),
            "entropy-0, with 90.00 %, shares the best SQNR, 15.00 dB, and agrees most with FP32, 95.00 %.",
        ),
        (
            candidate("max", 0, top1=90.0, images=1000),
            "is the first by top-1, method and trial where SQNR and agreement",
        ),
    ],
    ids=["sqnr", "agreement", "name"],
)
def test_the_reason_says_what_decided_between_equals(rival, words):
    selection = selection_of(candidates=(rival, candidate("entropy", 0, top1=90.0, images=1000), CANDIDATES[2]))
    assert selection.candidate == "entropy-0"
    assert words in selection.reason


def test_the_reason_for_an_only_candidate_is_that_there_is_no_other():
    selection = selection_of(candidates=CANDIDATES[1:2], tables=TABLES[2:3])
    assert selection.reason == "entropy-0 is the only candidate; its top-1 on val is 90.00 %."


def test_the_reason_admits_that_selection_and_report_share_one_split():
    selection = selection_of(
        candidates=[candidate("entropy", 0, top1=0.0)],
        tables=TABLES[2:3],
        selection_split="test",
        is_selection_on_test=True,
    )
    assert selection.reason.endswith("Selection and report share one split, so the reported accuracy is optimistic.")


def test_one_split_under_both_names_without_the_flag_is_refused():
    with pytest.raises(ValueError, match="both 'test', but is_selection_on_test is False"):
        selection_of(selection_split="test")


def test_predictions_of_another_candidate_are_refused():
    other = ComparedImages(IMAGES.paths, IMAGES.labels, IMAGES.fp32_predictions, IMAGES.fp32_predictions)
    with pytest.raises(ValueError, match="right on 8 of 10 images.*entropy-0 is right on 70.00 % of 10"):
        selection_of(test_images=other)


def test_paths_of_another_length_are_refused():
    shorter = ComparedImages(IMAGES.paths[:9], IMAGES.labels, IMAGES.fp32_predictions, IMAGES.int8_predictions)
    with pytest.raises(ValueError, match="10 test images have 9 paths"):
        selection_of(test_images=shorter)


def test_a_candidate_without_an_amax_table_is_refused():
    with pytest.raises(ValueError, match="entropy-1 comes from entropy, trial 1, which has no amax table"):
        selection_of(tables=TABLES[:3])


def test_an_amax_table_that_no_candidate_measured_is_refused():
    with pytest.raises(ValueError, match=r"No candidate was evaluated for the amax tables of \[\('mse', 4\)\]"):
        selection_of(tables=(*TABLES, amax("mse", 4, "dd")))


def table_of(predictions, *, paths=("a.png", "b.png", "c.png")):
    logits = np.eye(3, dtype=np.float32)[list(predictions)]
    return predictions_table(logits, np.array([0, 1, 2]), split="test", paths=paths, sha256=("1", "2", "3"))


def test_compared_images_hold_the_predictions_of_both_models():
    images = compared_images({"test": table_of([0, 1, 1])}, {"test": table_of([0, 2, 2])}, split="test")
    assert images.paths == ("a.png", "b.png", "c.png")
    assert images.labels.tolist() == [0, 1, 2]
    assert images.fp32_predictions.tolist() == [0, 1, 1]
    assert images.int8_predictions.tolist() == [0, 2, 2]


def test_models_evaluated_on_different_images_are_not_compared():
    other = table_of([0, 1, 1], paths=("a.png", "c.png", "b.png"))
    with pytest.raises(ValueError, match=r"on different images of 'test' \(3 and 3 rows\).*evaluate both again"):
        compared_images({"test": table_of([0, 1, 1])}, {"test": other}, split="test")


def test_models_evaluated_on_different_numbers_of_images_are_not_compared():
    with pytest.raises(ValueError, match=r"\(3 and 2 rows\)"):
        compared_images({"test": table_of([0, 1, 1])}, {"test": table_of([0, 1, 1]).head(2)}, split="test")


def test_a_split_without_predictions_is_named_with_those_that_have_some():
    with pytest.raises(ValueError, match=r"no predictions of the chosen candidate on 'test', only on \['val'\]"):
        compared_images({"test": table_of([0, 1, 1])}, {"val": pl.DataFrame()}, split="test")
