"""Which candidate is the best, and how much of its lead is noise?

Ranks candidates on the selection split, compares the first with FP32 on the test split, and separates the
spread over calibration draws from the spread expected from the finite test set. It measures nothing and
decides nothing about publication.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptq.evaluation.predictions import PredictionTables
from ptq.numerics.paired_test import paired_comparison, sampling_std_pp
from ptq.records.calibration import AmaxRecord
from ptq.records.evaluation import (
    EvaluationRecord,
    FlippedImage,
    MethodSpread,
    PairedComparison,
    Selection,
    in_method_order,
)


@dataclass(frozen=True, slots=True)
class ComparedImages:
    """The images of the test split, in one order: files, labels, and the class each model predicts, all (n,)."""

    paths: Sequence[str]
    labels: np.ndarray
    fp32_predictions: np.ndarray
    int8_predictions: np.ndarray


def compared_images(baseline: PredictionTables, chosen: PredictionTables, *, split: str) -> ComparedImages:
    """Returns the images of `split` with the predictions of FP32 and of the chosen candidate.

    Raises:
        ValueError: a model was not evaluated on `split`, or the two were evaluated on other images.
    """
    for name, tables in (("FP32", baseline), ("the chosen candidate", chosen)):
        if split not in tables:
            raise ValueError(f"There are no predictions of {name} on {split!r}, only on {sorted(tables)}.")
    fp32, int8 = baseline[split], chosen[split]
    identity = ["index", "path", "sha256", "label"]
    if not fp32.select(identity).equals(int8.select(identity)):
        raise ValueError(
            f"FP32 and the chosen candidate were evaluated on different images of {split!r} ({len(fp32)} and "
            f"{len(int8)} rows). A paired comparison needs the same images in the same order; evaluate both again."
        )
    return ComparedImages(
        paths=tuple(fp32["path"].to_list()),
        labels=fp32["label"].to_numpy(),
        fp32_predictions=fp32["prediction"].to_numpy(),
        int8_predictions=int8["prediction"].to_numpy(),
    )


def rank_candidates(candidates: Sequence[EvaluationRecord], *, selection_split: str) -> tuple[EvaluationRecord, ...]:
    """Returns the candidates, best first.

    First those whose top-1 on `selection_split` lies within one standard error of the best, which the images of the
    split cannot tell apart; among them the larger SQNR of the logits, then agreement with FP32, then top-1. Then the
    others by top-1, SQNR and agreement. Last the method's name and the trial, so that equal candidates always come
    in one order.

    Source: the one-standard-error rule of Breiman, Friedman, Olshen and Stone, Classification and Regression Trees
    (1984), section 3.4.3, with fidelity to FP32 in the place of simplicity.

    Raises:
        ValueError: there is no candidate, or one has no trial, method, SQNR or agreement (FP32 has none).
        KeyError: a candidate was not measured on `selection_split`.
    """
    if not candidates:
        raise ValueError("There is no candidate to rank; expected at least one evaluation.")
    least = _least_equal_top1(candidates, selection_split)
    return tuple(sorted(candidates, key=lambda candidate: _rank_key(candidate, selection_split, least)))


def method_spreads(rows: Sequence[tuple[str, int, float]]) -> tuple[MethodSpread, ...]:
    """Returns the spread of top-1 over the trials, one entry a method: max, percentile, mse, entropy, then others.

    Args:
        rows: (method, trial, top-1 in percent), one row for every method and trial. Trials that share one
            amax table each keep their row: a table drawn twice weighs twice.

    Raises:
        ValueError: a method and trial come twice.

    >>> spread = method_spreads([("mse", 0, 90.0), ("mse", 1, 92.0), ("max", 0, 80.0)])
    >>> [(item.method, item.mean_top1_percent, round(item.std_pp, 3)) for item in spread]
    [('max', 80.0, 0.0), ('mse', 91.0, 1.414)]
    """
    seen = [(method, trial) for method, trial, _ in rows]
    repeated = next((pair for pair in seen if seen.count(pair) > 1), None)
    if repeated:
        raise ValueError(f"Method {repeated[0]} has trial {repeated[1]} twice; expected one top-1 for each.")
    spreads = []
    for method in in_method_order(name for name, _, _ in rows):
        spreads.append(_spread(method, [value for name, _, value in rows if name == method]))
    return tuple(spreads)


def spread_sentence(spread: MethodSpread, comparison: PairedComparison, *, trials: int) -> str:
    """Returns one sentence that separates the spread over calibration draws from that of the finite test set.

    Args:
        spread: top-1 of the chosen method over the trials.
        comparison: the chosen candidate against FP32 on the test split.
        trials: number of trials behind `spread`, at least 1.
    """
    expected = sampling_std_pp(comparison)
    if trials < 2:
        return (
            f"One draw of {spread.method} says nothing about the spread over calibration draws; "
            f"{comparison.images} test images alone would move the drop by {expected:.2f} pp (standard deviation)."
        )
    found = f"Over {trials} draws {spread.method}'s top-1 varies by {spread.std_pp:.2f} pp (standard deviation)"
    if comparison.fp32_only_correct + comparison.int8_only_correct == 0:
        return (
            f"{found}; INT8 and FP32 are right on the same of the {comparison.images} test images, "
            f"so these give no estimate of their own noise."
        )
    images = f"{comparison.images} test images alone would move the drop by {expected:.2f} pp"
    if spread.std_pp <= expected:
        return f"{found}; {images}, so differences between draws are within the noise of the test set."
    return f"{found}; {images}, so the choice of calibration images matters more than the noise of the test set."


def select(
    *,
    candidates: Sequence[EvaluationRecord],
    tables: Sequence[AmaxRecord],
    test_images: ComparedImages,
    selection_split: str,
    test_split: str,
    is_selection_on_test: bool,
) -> Selection:
    """Returns the best candidate with its comparison to FP32 and the reason in words.

    Args:
        candidates: one evaluation for each distinct amax table, on both splits.
        tables: one amax table for every method and trial, equal tables included.
        test_images: the test split, with FP32's predictions and those of the best candidate, the first of
            `rank_candidates`.
        selection_split: split on which the candidates are ranked.
        test_split: split of the comparison, the spreads and the flipped images.
        is_selection_on_test: whether both splits hold the same images; the reason then says so.

    Raises:
        ValueError: the predictions are not those of the best candidate, a candidate and the tables do not
            match, or the two splits have one name while `is_selection_on_test` is False.
        KeyError: a candidate was not measured on one of the splits.
    """
    if selection_split == test_split and not is_selection_on_test:
        raise ValueError(f"Selection and test split are both {test_split!r}, but is_selection_on_test is False.")
    ranked = rank_candidates(candidates, selection_split=selection_split)
    best = ranked[0]
    table_of = {(record.method, record.trial): record for record in tables}
    comparison = _compare(best, test_images, test_split)
    spreads = method_spreads(_rows_of_all_trials(candidates, tables, table_of, test_split))
    method, trial = _origin(best)
    own_spread = next(spread for spread in spreads if spread.method == method)
    trials = sum(record.method == method for record in tables)
    return Selection(
        candidate=best.candidate,
        trial=trial,
        method=method,
        table=table_of[method, trial].table,
        selection_split=selection_split,
        test_split=test_split,
        reason=_reason(ranked, selection_split=selection_split, is_selection_on_test=is_selection_on_test),
        comparison=comparison,
        flipped_images=_flipped_images(test_images),
        spreads=spreads,
        sampling_std_pp=sampling_std_pp(comparison),
        spread_sentence=spread_sentence(own_spread, comparison, trials=trials),
    )


def _origin(candidate: EvaluationRecord) -> tuple[str, int]:
    if candidate.method is None or candidate.trial is None:
        raise ValueError(
            f"{candidate.candidate} has method {candidate.method} and trial {candidate.trial}; a candidate has both. "
            f"Leave the FP32 baseline out."
        )
    return candidate.method, candidate.trial


def _quality(candidate: EvaluationRecord, split: str) -> tuple[float, float, float]:
    metrics = candidate.on(split)
    if metrics.sqnr_db is None or metrics.agreement_percent is None:
        raise ValueError(f"{candidate.candidate} has no SQNR or agreement on {split!r}; evaluate it against FP32.")
    return metrics.top1_percent, metrics.sqnr_db, metrics.agreement_percent


def _least_equal_top1(candidates: Sequence[EvaluationRecord], split: str) -> float:
    """The best top-1 less its standard error, in percent."""
    best = max((candidate.on(split) for candidate in candidates), key=lambda metrics: metrics.top1_percent)
    share = best.top1_percent / 100
    return best.top1_percent - 100 * math.sqrt(share * (1 - share) / best.images)


def _rank_key(
    candidate: EvaluationRecord, split: str, least: float
) -> tuple[bool, tuple[float, float, float], str, int]:
    top1_percent, sqnr_db, agreement_percent = _quality(candidate, split)
    is_behind = top1_percent < least
    by_fidelity = (-sqnr_db, -agreement_percent, -top1_percent)
    by_top1 = (-top1_percent, -sqnr_db, -agreement_percent)
    return is_behind, by_top1 if is_behind else by_fidelity, *_origin(candidate)


def _spread(method: str, top1: Sequence[float]) -> MethodSpread:
    mean = math.fsum(top1) / len(top1)
    deviations = math.fsum((value - mean) ** 2 for value in top1)
    return MethodSpread(
        method=method,
        mean_top1_percent=mean,
        min_top1_percent=min(top1),
        max_top1_percent=max(top1),
        std_pp=math.sqrt(deviations / (len(top1) - 1)) if len(top1) > 1 else 0.0,
    )


def _rows_of_all_trials(
    candidates: Sequence[EvaluationRecord],
    tables: Sequence[AmaxRecord],
    table_of: dict[tuple[str, int], AmaxRecord],
    split: str,
) -> list[tuple[str, int, float]]:
    """One row for every table, with the top-1 of the candidate that was evaluated with an equal table."""
    top1_of: dict[str, float] = {}
    for candidate in candidates:
        origin = _origin(candidate)
        if origin not in table_of:
            raise ValueError(
                f"{candidate.candidate} comes from {origin[0]}, trial {origin[1]}, which has no amax table; "
                f"there are tables for {sorted(table_of)}."
            )
        top1_of[table_of[origin].identity] = candidate.on(split).top1_percent
    unmeasured = [(record.method, record.trial) for record in tables if record.identity not in top1_of]
    if unmeasured:
        raise ValueError(
            f"No candidate was evaluated for the amax tables of {unmeasured}; expected one for each table."
        )
    return [(record.method, record.trial, top1_of[record.identity]) for record in tables]


def _compare(best: EvaluationRecord, images: ComparedImages, test_split: str) -> PairedComparison:
    comparison = paired_comparison(images.fp32_predictions, images.int8_predictions, images.labels)
    if len(images.paths) != comparison.images:
        raise ValueError(f"{comparison.images} test images have {len(images.paths)} paths; expected one each.")
    correct = int((images.int8_predictions == images.labels).sum())
    recorded = best.on(test_split)
    if recorded.images != comparison.images or round(recorded.top1_percent * recorded.images / 100) != correct:
        raise ValueError(
            f"The predictions are right on {correct} of {comparison.images} images of {test_split!r}, but the best "
            f"candidate {best.candidate} is right on {recorded.top1_percent:.2f} % of {recorded.images}. "
            f"Pass the predictions of the first of `rank_candidates`."
        )
    return comparison


def _flipped_images(images: ComparedImages) -> tuple[FlippedImage, ...]:
    flipped = np.flatnonzero(images.fp32_predictions != images.int8_predictions).tolist()
    return tuple(
        FlippedImage(
            path=images.paths[index],
            label=int(images.labels[index]),
            fp32_prediction=int(images.fp32_predictions[index]),
            int8_prediction=int(images.int8_predictions[index]),
        )
        for index in flipped
    )


def _reason(ranked: Sequence[EvaluationRecord], *, selection_split: str, is_selection_on_test: bool) -> str:
    best = ranked[0]
    own_top1 = _quality(best, selection_split)[0]
    if len(ranked) == 1:
        text = f"{best.candidate} is the only candidate; its top-1 on {selection_split} is {own_top1:.2f} %."
    else:
        text = _choice(ranked, selection_split)
    if is_selection_on_test:
        text += " Selection and report share one split, so the reported accuracy is optimistic."
    return text


def _choice(ranked: Sequence[EvaluationRecord], split: str) -> str:
    """Why the first of several came first."""
    best = ranked[0]
    qualities = [_quality(candidate, split) for candidate in ranked]
    best_top1 = max(top1 for top1, _, _ in qualities)
    least = _least_equal_top1(ranked, split)
    equal = [quality for quality in qualities if quality[0] >= least]
    own_top1, sqnr_db, agreement_percent = qualities[0]
    if len(equal) == 1:
        return f"{best.candidate} has the best top-1 on {split} of {len(ranked)} candidates, {own_top1:.2f} %."
    text = (
        f"{len(equal)} of {len(ranked)} candidates have a top-1 on {split} within one standard error "
        f"({best_top1 - least:.2f} pp) of the best, {best_top1:.2f} %; of these {best.candidate}, with "
        f"{own_top1:.2f} %, "
    )
    rivals = [quality for quality in equal if quality[1] == sqnr_db]
    if len(rivals) == 1:
        return f"{text}has the logits closest to FP32's, {sqnr_db:.2f} dB."
    if sum(quality[2] == agreement_percent for quality in rivals) == 1:
        return f"{text}shares the best SQNR, {sqnr_db:.2f} dB, and agrees most with FP32, {agreement_percent:.2f} %."
    return f"{text}is the first by top-1, method and trial where SQNR and agreement are equal."
