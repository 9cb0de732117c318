import math

import pytest
from report_inputs import parity

from ptq.evaluation.gate import decide
from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.records.evaluation import IsaEvaluation, PairedComparison, SplitMetrics
from ptq.records.graph import EngineIdentity
from ptq.records.parity import Parting

FAST = {("fp32", 1): 8.0, ("int8", 1): 2.0, ("fp32", 32): 200.0, ("int8", 32): 50.0}


def benchmark_of(medians_ms):
    return BenchmarkRecord(
        engine=EngineIdentity(name="openvino", version="1", device="CPU", threads=2),
        machine="test",
        clock_mhz=None,
        measurements=tuple(
            Measurement(
                precision=precision,
                batch_size=batch_size,
                samples_ms=(median,),
                median_ms=median,
                # Far from the median, so that a gate which reads the mean is found out.
                mean_ms=1000.0 * median if precision == "int8" else median,
                p90_ms=median,
                p95_ms=median,
                p99_ms=median,
                throughput_images_per_s=100.0,
                rounds_median_ms=(median,),
            )
            for (precision, batch_size), median in medians_ms.items()
        ),
        warnings=(),
    )


def comparison_of(drop_pp, interval=(-0.5, 0.5)):
    return PairedComparison(
        images=1000,
        drop_pp=drop_pp,
        drop_interval_pp=interval,
        mcnemar_p=0.5,
        fp32_only_correct=8,
        int8_only_correct=5,
        flipped=20,
    )


def decision_of(*, drop_pp=0.3, interval=(-0.5, 0.9), medians_ms=FAST, graph_errors=0, parting=None, isas=(), **limits):
    asked = {"max_drop_pp": 1.0, "min_speedup_fp32": 2.0, "min_speedup_fp16": 0.0} | limits
    return decide(
        comparison=comparison_of(drop_pp, interval),
        benchmark=benchmark_of(medians_ms),
        graph_errors=graph_errors,
        parity=parity(parting),
        isas=isas,
        fp32_top1_percent=80.0,
        **asked,
    )


def test_a_model_that_meets_every_limit_is_accepted_with_the_numbers_found_and_asked():
    decision = decision_of()
    assert decision.accepted
    assert decision.reasons == (
        "The graph checks found 0 errors, as asked.",
        "The engine computes what the INT8 file says: 19.7 dB SQNR on 64 images, and 19.7 dB where the file is "
        "computed in float.",
        "The top-1 drop is 0.30 pp on 1000 images (95 % interval -0.50 to 0.90 pp); at most 1.00 pp is accepted "
        "(gate.max_drop_pp).",
        "INT8 runs at 4.00 times FP32 at batch 1 (2.000 against 8.000 ms), 4.00 times FP32 at batch 32 "
        "(50.000 against 200.000 ms); at least 2 times is asked at every batch size (gate.min_speedup_fp32).",
    )


def test_an_engine_that_computes_something_else_rejects_the_model_and_the_layer_is_named():
    decision = decision_of(parting=Parting("conv1", "saturation", "They part first at conv1: its sums saturate."))
    assert not decision.accepted
    assert decision.reasons[0] == (
        "The engine does not compute what the INT8 file says: 7.0 dB SQNR on 64 images against 19.7 dB where the file "
        "is computed in float. They part first at conv1: its sums saturate."
    )


def under(isa, top1_percent):
    metrics = SplitMetrics("test", 700, top1_percent, 99.0, 0.5, 19.0, 95.0)
    return IsaEvaluation(isa, metrics, median_ms=2.0)


def test_the_drop_must_hold_under_every_instruction_set_asked_for():
    decision = decision_of(isas=[under("avx512_core_vnni", 79.5), under("avx2", 67.0)])
    assert not decision.accepted
    assert decision.reasons[0] == (
        "Under avx2 the top-1 drop is 13.00 pp on 700 images; at most 1.00 pp is accepted (gate.max_drop_pp)."
    )
    assert any(reason.startswith("Under avx512_core_vnni the top-1 drop is 0.50 pp") for reason in decision.reasons)
    assert decision_of(isas=[under("avx2", 79.0)]).accepted


def test_one_graph_error_rejects_the_model():
    decision = decision_of(graph_errors=1)
    assert not decision.accepted
    assert decision.reasons[0] == "The graph checks found 1 error; 0 are accepted."


def test_a_drop_above_the_limit_rejects_the_model():
    decision = decision_of(drop_pp=1.4, interval=(0.2, 2.6))
    assert not decision.accepted
    assert decision.reasons[0].startswith("The top-1 drop is 1.40 pp on 1000 images (95 % interval 0.20 to 2.60 pp)")


def test_a_drop_on_the_limit_is_accepted():
    assert decision_of(drop_pp=1.0, interval=(0.8, 1.0)).accepted


def test_a_drop_that_is_not_a_number_rejects_the_model():
    assert not decision_of(drop_pp=math.nan).accepted


def test_a_drop_whose_interval_includes_the_limit_is_accepted_but_not_proven():
    decision = decision_of(interval=(-0.5, 1.1))
    assert decision.accepted
    assert decision.reasons[2].endswith(
        "The interval includes the limit: the drop is accepted but not proven to stay below it."
    )


@pytest.mark.parametrize("high", [0.99, 1.0])
def test_a_drop_whose_interval_ends_at_the_limit_or_below_is_proven(high):
    assert "not proven" not in decision_of(interval=(-0.5, high)).reasons[2]


def test_a_negative_limit_asks_for_a_gain():
    assert not decision_of(drop_pp=0.0, max_drop_pp=-0.5).accepted
    assert decision_of(drop_pp=-0.6, max_drop_pp=-0.5).accepted


def test_a_number_just_beyond_its_limit_is_written_with_enough_decimals():
    assert "The top-1 drop is 1.0004 pp" in decision_of(drop_pp=1.0004).reasons[0]
    assert "at most 1.0000 pp is accepted" in decision_of(drop_pp=1.0004).reasons[0]


def test_a_speed_up_below_the_limit_at_one_batch_size_rejects_the_model():
    decision = decision_of(medians_ms=FAST | {("int8", 32): 160.0})
    assert not decision.accepted
    assert "4.00 times FP32 at batch 1" in decision.reasons[0]
    assert "1.25 times FP32 at batch 32" in decision.reasons[0]


def test_a_speed_up_on_the_limit_is_accepted():
    assert decision_of(min_speedup_fp32=4.0).accepted


def test_every_failed_condition_is_listed_before_those_that_hold():
    decision = decision_of(drop_pp=3.0, medians_ms={("fp32", 1): 1.0, ("int8", 1): 1.0}, min_speedup_fp32=1.5)
    assert [reason.split()[1] for reason in decision.reasons] == ["top-1", "runs", "graph", "engine"]


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        (("int8", 32), "Not measured: INT8 at batch 32."),
        (("fp32", 1), "Not measured: FP32 at batch 1."),
    ],
)
def test_a_missing_latency_rejects_the_model_and_is_named(absent, words):
    decision = decision_of(medians_ms={key: value for key, value in FAST.items() if key != absent})
    assert not decision.accepted
    assert words in decision.reasons[0]


def test_a_benchmark_of_floats_alone_rejects_the_model():
    decision = decision_of(medians_ms={("fp32", 1): 8.0})
    assert not decision.accepted
    assert decision.reasons[0].startswith("The speed-up is unknown; at least 2 times is asked")
    assert decision.reasons[0].endswith("Not measured: INT8 at batch 1.")


def test_an_empty_benchmark_rejects_the_model():
    decision = decision_of(medians_ms={})
    assert not decision.accepted
    assert decision.reasons[0].startswith("No latency was measured, neither of INT8 nor of FP32;")


def test_a_limit_of_zero_over_fp16_is_not_asked():
    decision = decision_of(medians_ms=FAST | {("fp16", 1): 0.1, ("fp16", 32): 0.1}, min_speedup_fp16=0.0)
    assert decision.accepted
    assert len(decision.reasons) == 4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_limit_over_fp16_uses_the_half_precision_that_was_measured(precision):
    decision = decision_of(medians_ms=FAST | {(precision, 1): 3.0, (precision, 32): 75.0}, min_speedup_fp16=1.5)
    assert decision.accepted
    assert f"1.50 times {precision.upper()} at batch 32 (50.000 against 75.000 ms)" in decision.reasons[4]


def test_an_int8_model_slower_than_fp16_is_rejected():
    decision = decision_of(medians_ms=FAST | {("fp16", 1): 1.8, ("fp16", 32): 75.0}, min_speedup_fp16=1.0)
    assert not decision.accepted
    assert "0.90 times FP16 at batch 1" in decision.reasons[0]
    assert "(gate.min_speedup_fp16)" in decision.reasons[0]


def test_of_two_half_precisions_the_faster_is_the_rival():
    both = {("fp16", 1): 3.0, ("fp16", 32): 75.0, ("bf16", 1): 2.5, ("bf16", 32): 90.0}
    reason = decision_of(medians_ms=FAST | both, min_speedup_fp16=1.0).reasons[4]
    assert "1.25 times BF16 at batch 1" in reason
    assert "1.50 times FP16 at batch 32" in reason


def test_a_limit_over_fp16_without_any_half_precision_rejects_the_model():
    decision = decision_of(min_speedup_fp16=1.0)
    assert not decision.accepted
    assert decision.reasons[0].endswith("Not measured: FP16 or BF16 at batch 1, FP16 or BF16 at batch 32.")


@pytest.mark.parametrize("median", [0.0, -1.0, math.nan, math.inf])
def test_a_latency_that_is_not_a_positive_number_is_refused(median):
    with pytest.raises(ValueError, match="The median latency of int8 at batch 1 is .* ms; expected a positive number"):
        decision_of(medians_ms=FAST | {("int8", 1): median})
