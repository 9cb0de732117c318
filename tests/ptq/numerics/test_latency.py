import numpy as np
import pytest

from ptq.numerics.latency import (
    coefficient_of_variation,
    end_to_end,
    latency_warnings,
    measure_interleaved,
    median_ms,
    percentile_ms,
    red_flags,
    summarize,
    transfer_warnings,
)
from ptq.records.graph import Int8Share


@pytest.mark.parametrize(
    ("percent", "expected"),
    # Single precision leaves out 0, 0, 1, 5 and all 10 of the ten samples.
    [(100.0, 10.0), (99.0, 10.0), (90.0, 9.0), (50.0, 5.0), (0.0, 1.0)],
)
def test_percentiles_of_ten_samples_are_those_of_trtexec(percent, expected):
    assert percentile_ms([float(sample) for sample in range(10, 0, -1)], percent) == expected


def test_percentile_99_of_a_hundred_samples_is_the_largest_in_single_precision():
    assert percentile_ms([float(sample) for sample in range(1, 101)], 99.0) == 100.0


def test_a_percentile_of_one_sample_is_that_sample():
    assert percentile_ms([7.5], 90.0) == 7.5


def test_a_percentile_outside_0_to_100_is_refused():
    with pytest.raises(ValueError, match=r"percent must be in \[0, 100\], got 101"):
        percentile_ms([1.0], 101)


def test_a_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="there is no sample"):
        percentile_ms([], 90)


def test_the_median_of_an_odd_number_is_the_middle_sample():
    assert median_ms([9.0, 1.0, 4.0]) == 4.0


def test_the_median_of_an_even_number_is_the_mean_of_the_two_middle_samples():
    assert median_ms([1.0, 10.0, 4.0, 2.0]) == 3.0


def test_the_coefficient_of_variation_agrees_with_numpy():
    samples = np.random.default_rng(0).uniform(1, 2, 50)

    # Two orders of summation of 50 numbers.
    assert coefficient_of_variation(samples.tolist()) == pytest.approx(100 * samples.std() / samples.mean(), rel=1e-12)


def test_equal_samples_do_not_vary():
    assert coefficient_of_variation([2.0, 2.0, 2.0]) == 0.0


def test_a_summary_keeps_the_samples_of_every_round_in_order():
    measurement = summarize("int8", 4, [[3.0, 1.0], [2.0, 4.0]])

    assert measurement.samples_ms == (3.0, 1.0, 2.0, 4.0)
    assert measurement.rounds_median_ms == (2.0, 3.0)
    assert (measurement.median_ms, measurement.mean_ms, measurement.p99_ms) == (2.5, 2.5, 4.0)


def test_throughput_is_all_images_over_the_sum_of_the_latencies():
    # 2 inferences of 32 images in 8 ms.
    assert summarize("fp32", 32, [[3.0], [5.0]]).throughput_images_per_s == 8000.0


def test_throughput_is_over_the_elapsed_time_where_it_is_given():
    assert summarize("fp32", 32, [[3.0], [5.0]], elapsed_s=0.004).throughput_images_per_s == 16000.0


def test_a_round_without_samples_is_refused():
    with pytest.raises(ValueError, match="int8 at batch 1 has 2 rounds, and each needs a sample"):
        summarize("int8", 1, [[1.0], []])


def test_a_latency_of_zero_is_refused():
    with pytest.raises(ValueError, match="latencies must be positive, got 0.0 ms"):
        summarize("int8", 1, [[1.0, 0.0]])


def test_precisions_are_measured_in_turns():
    turns: list[tuple] = []

    def record(precision: str):
        def timed(*arguments: float) -> tuple[list[float], float]:
            turns.append((precision, *arguments))
            return [1.0], 0.001

        return timed

    measure_interleaved(
        {"fp32": record("fp32"), "int8": record("int8")},
        batch_size=1,
        rounds=3,
        warmup_ms=200.0,
        duration_s=3.0,
        min_iterations=10,
    )

    # A third of the three seconds and of the ten inferences, rounded up, in each turn.
    assert turns == [("fp32", 200.0, 1.0, 4), ("int8", 200.0, 1.0, 4)] * 3


def test_rounds_are_joined_into_one_measurement_per_precision():
    slow, fast = iter([([4.0], 0.004), ([6.0], 0.006)]), iter([([1.0, 3.0], 0.005), ([2.0], 0.003)])

    fp32, int8 = measure_interleaved(
        {"fp32": lambda *_: next(slow), "int8": lambda *_: next(fast)},
        batch_size=8,
        rounds=2,
        warmup_ms=0,
        duration_s=1,
        min_iterations=1,
    )

    assert (fp32.precision, fp32.samples_ms, fp32.throughput_images_per_s) == ("fp32", (4.0, 6.0), 1600.0)
    assert (int8.precision, int8.rounds_median_ms, int8.throughput_images_per_s) == ("int8", (2.0, 2.0), 3000.0)


def test_no_round_at_all_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure_interleaved({}, batch_size=1, rounds=0, warmup_ms=0, duration_s=1, min_iterations=1)


def test_a_stable_and_fast_int8_gives_no_warning():
    measurements = [summarize("fp32", 1, [[4.0, 4.1]]), summarize("int8", 1, [[1.0, 1.02]])]

    assert (*latency_warnings(measurements), *red_flags(measurements, {})) == ()


def test_an_unstable_latency_is_named_with_its_variation():
    (warning,) = latency_warnings([summarize("fp32", 32, [[1.0, 3.0]])])

    assert warning.startswith(
        "FP32 at batch size 32 is unstable: the coefficient of variation of its latency is 50.0 %"
    )


def test_int8_slower_than_bf16_is_named_even_if_faster_than_fp32():
    measurements = [summarize("fp32", 1, [[4.0]]), summarize("bf16", 1, [[2.0]]), summarize("int8", 1, [[2.5]])]

    (warning,) = red_flags(measurements, {})

    assert warning.startswith("INT8 at batch size 1 is not faster than the best float precision")
    assert "its median is 2.500 ms, and BF16's is 2.000 ms" in warning


def test_int8_is_compared_at_its_own_batch_size_only():
    assert red_flags([summarize("fp32", 32, [[1.0]]), summarize("int8", 1, [[2.0]])], {}) == ()


def share(**fields):
    values = {"layers": 4, "int8_input_percent": 50.0, "int8_output_percent": 25.0, "reformats": 1}
    return Int8Share(**{**values, "float_layers": ("conv2", "fc"), "reformat_layers": ("copy of conv2",), **fields})


def test_a_red_flag_names_the_float_layers_and_the_reformats():
    measurements = [summarize("fp32", 1, [[2.0]]), summarize("int8", 1, [[2.0]])]
    (flag,) = red_flags(measurements, {1: share()})
    assert flag.endswith(
        "2 of 4 convolutions and linear layers ran in float (conv2, fc); "
        "the engine converts between types 1 times (copy of conv2)."
    )


def test_a_red_flag_cuts_a_long_list_of_layers():
    measurements = [summarize("fp32", 1, [[2.0]]), summarize("int8", 1, [[3.0]])]
    (flag,) = red_flags(measurements, {1: share(float_layers=tuple(f"conv{index}" for index in range(12)))})
    assert "conv9 and 2 more" in flag
    assert "conv10" not in flag


def transfers(*, upload=0.1, compute=1.0, enqueue=0.1):
    return end_to_end(
        "int8", 4, upload_ms=[upload], compute_ms=[compute], download_ms=[0.1], enqueue_ms=[enqueue], elapsed_s=0.01
    )


def test_a_run_with_short_transfers_has_no_warning():
    assert transfer_warnings([transfers(enqueue=0.8, upload=0.99)]) == ()


def test_a_host_that_enqueues_slowly_is_named():
    (warning,) = transfer_warnings([transfers(enqueue=0.81)])
    assert warning.startswith("INT8 at batch size 4 is bound by the host: enqueueing takes 0.810 ms")


def test_an_upload_as_long_as_the_compute_is_named():
    (warning,) = transfer_warnings([transfers(upload=1.0)])
    assert warning.startswith("INT8 at batch size 4 is bound by transfers: the upload takes 1.000 ms")
