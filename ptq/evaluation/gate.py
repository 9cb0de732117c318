"""Is the INT8 model good enough to publish?

Holds what was measured against its limits and says in words what it found. It publishes nothing, and what to try
after a rejection is decided elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.records.decision import GateDecision
from ptq.records.evaluation import IsaEvaluation, PairedComparison
from ptq.records.parity import ParityRecord

# What a person is told of a run that published nothing, by its decision.
HEADLINES = {
    "reject": "the new INT8 model was rejected",
    "regress": "the new INT8 model is worse than the one in service",
    "inconclusive": "the new INT8 model is not shown to be as good as the one in service",
}


@dataclass(frozen=True, slots=True)
class _Condition:
    """Whether one condition holds, and the reason in words."""

    holds: bool
    reason: str


def decide(
    *,
    comparison: PairedComparison,
    benchmark: BenchmarkRecord,
    graph_errors: int,
    parity: ParityRecord,
    max_drop_pp: float,
    min_speedup_fp32: float,
    min_speedup_fp16: float,
    isas: Sequence[IsaEvaluation] = (),
    fp32_top1_percent: float = math.nan,
) -> GateDecision:
    """Returns whether every condition holds, with one reason for each, failed conditions first.

    Args:
        comparison: INT8 against FP32 on the test split.
        benchmark: latencies of INT8 and its rivals at every batch size.
        graph_errors: errors of the graph checks; any rejects the model.
        parity: whether the engine computes what the graph says; it is rejected where it does not.
        max_drop_pp: largest accuracy drop accepted, in percentage points.
        min_speedup_fp32: least ratio of FP32's median latency to INT8's, at every batch size.
        min_speedup_fp16: the same over FP16 or BF16, the faster where both were measured; 0 skips it.
        isas: INT8 on the test split under the instruction sets asked for; `max_drop_pp` must hold under each.
        fp32_top1_percent: FP32's top-1 on the test split, which those are held against.

    A latency that is asked for and missing rejects the model: what was not measured is not known to be fast.

    Raises:
        ValueError: a median latency is not a positive number.
    """
    conditions = [
        _graph_condition(graph_errors),
        _parity_condition(parity),
        _drop_condition(comparison, max_drop_pp),
        _speedup_condition(benchmark, rivals=("fp32",), limit=min_speedup_fp32, option="gate.min_speedup_fp32"),
    ]
    if min_speedup_fp16 > 0:
        conditions.append(
            _speedup_condition(
                benchmark, rivals=("fp16", "bf16"), limit=min_speedup_fp16, option="gate.min_speedup_fp16"
            )
        )
    conditions += [_isa_condition(each, fp32_top1_percent, max_drop_pp) for each in isas]
    # sorted is stable: within failed and held conditions the order above stays.
    ordered = sorted(conditions, key=lambda condition: condition.holds)
    return GateDecision(
        accepted=all(condition.holds for condition in conditions),
        reasons=tuple(condition.reason for condition in ordered),
    )


def _graph_condition(graph_errors: int) -> _Condition:
    if graph_errors == 0:
        return _Condition(True, "The graph checks found 0 errors, as asked.")
    noun = "error" if graph_errors == 1 else "errors"
    return _Condition(False, f"The graph checks found {graph_errors} {noun}; 0 are accepted.")


def _parity_condition(parity: ParityRecord) -> _Condition:
    engine, file = parity.engine.sqnr_db, parity.file.sqnr_db
    if parity.parting is None:
        return _Condition(
            True,
            f"The engine computes what the INT8 file says: {engine:.1f} dB SQNR on {parity.images} images, and "
            f"{file:.1f} dB where the file is computed in float.",
        )
    if parity.parting.in_file:
        return _Condition(False, f"The INT8 file is not what was decided. {parity.parting.sentence}")
    return _Condition(
        False,
        f"The engine does not compute what the INT8 file says: {engine:.1f} dB SQNR on {parity.images} images against "
        f"{file:.1f} dB where the file is computed in float. {parity.parting.sentence}",
    )


def _drop_condition(comparison: PairedComparison, max_drop_pp: float) -> _Condition:
    low, high = comparison.drop_interval_pp
    drop, limit = _distinct(comparison.drop_pp, max_drop_pp)
    found = (
        f"The top-1 drop is {drop} pp on {comparison.images} images (95 % interval {low:.2f} to {high:.2f} pp); "
        f"at most {limit} pp is accepted (gate.max_drop_pp)."
    )
    # Written as <=, so that a drop that is not a number is rejected.
    if not comparison.drop_pp <= max_drop_pp:
        return _Condition(False, found)
    if high > max_drop_pp:
        found += " The interval includes the limit: the drop is accepted but not proven to stay below it."
    return _Condition(True, found)


def _isa_condition(found: IsaEvaluation, fp32_top1_percent: float, max_drop_pp: float) -> _Condition:
    drop_pp = fp32_top1_percent - found.metrics.top1_percent
    drop, limit = _distinct(drop_pp, max_drop_pp)
    return _Condition(
        drop_pp <= max_drop_pp,
        f"Under {found.isa} the top-1 drop is {drop} pp on {found.metrics.images} images; at most {limit} pp is "
        "accepted (gate.max_drop_pp).",
    )


def _speedup_condition(benchmark: BenchmarkRecord, *, rivals: tuple[str, ...], limit: float, option: str) -> _Condition:
    """Compares INT8 with the fastest of `rivals` at every batch size of the benchmark."""
    asked = f"at least {limit:g} times is asked at every batch size ({option})"
    rival_names = " or ".join(rival.upper() for rival in rivals)
    batch_sizes = sorted({measurement.batch_size for measurement in benchmark.measurements})
    if not batch_sizes:
        return _Condition(False, f"No latency was measured, neither of INT8 nor of {rival_names}; {asked}.")
    parts, missing, holds = [], [], True
    for batch_size in batch_sizes:
        int8 = benchmark.of("int8", batch_size)
        measured = [found for found in (benchmark.of(rival, batch_size) for rival in rivals) if found is not None]
        if int8 is None:
            missing.append(f"INT8 at batch {batch_size}")
        if not measured:
            missing.append(f"{rival_names} at batch {batch_size}")
        if int8 is None or not measured:
            continue
        rival = min(measured, key=_median_ms)
        speedup = _median_ms(rival) / _median_ms(int8)
        holds = holds and speedup >= limit
        parts.append(
            f"{_distinct(speedup, limit)[0]} times {rival.precision.upper()} at batch {batch_size} "
            f"({int8.median_ms:.3f} against {rival.median_ms:.3f} ms)"
        )
    text = f"INT8 runs at {', '.join(parts)}; {asked}." if parts else f"The speed-up is unknown; {asked}."
    if missing:
        text += f" Not measured: {', '.join(missing)}."
    return _Condition(holds and not missing, text)


def _median_ms(measurement: Measurement) -> float:
    if not (math.isfinite(measurement.median_ms) and measurement.median_ms > 0):
        raise ValueError(
            f"The median latency of {measurement.precision} at batch {measurement.batch_size} is "
            f"{measurement.median_ms} ms; expected a positive number. Measure again."
        )
    return measurement.median_ms


def _distinct(found: float, limit: float) -> tuple[str, str]:
    """Both numbers with two decimals, or as many more as it takes to tell them apart, at most six."""
    for decimals in range(2, 7):
        if found == limit or round(found, decimals) != round(limit, decimals):
            break
    return f"{found:.{decimals}f}", f"{limit:.{decimals}f}"
