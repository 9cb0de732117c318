"""Does the verdict's sentence say accuracy, uncertainty and speed?"""

from report_inputs import benchmark, make_inputs, measurement, verdict

from ptq.report.inputs import verdict_sentence


def test_the_verdict_says_accuracy_uncertainty_and_speed_in_one_sentence():
    assert verdict_sentence(make_inputs()) == (
        "Accepted: INT8 (entropy, trial 2) reaches 84.8 % top-1 on 624 test images, 0.16 pp below FP32 "
        "(95 % interval -0.9 to 1.2 pp, McNemar p = 1.00), and is 4.0 times as fast at batch 1."
    )


def test_a_rejected_model_names_the_first_reason_before_its_numbers():
    reasons = ("The top-1 drop is 0.16 pp; at most 0.10 pp is accepted.", "INT8 runs at 4.00 times FP32.")
    sentence = verdict_sentence(make_inputs(verdict=verdict(accepted=False, reasons=reasons)))
    assert sentence.startswith(
        "Rejected: The top-1 drop is 0.16 pp; at most 0.10 pp is accepted. INT8 (entropy, trial 2) reaches 84.8 %"
    )


def test_a_model_that_gains_accuracy_is_above_fp32():
    best = verdict().best.model_copy(update={"drop_pp": -0.32, "drop_interval_pp": (-0.5, -0.1), "mcnemar_p": 0.0004})
    sentence = verdict_sentence(make_inputs(verdict=verdict().model_copy(update={"best": best})))
    assert "0.32 pp above FP32 (95 % interval -0.50 to -0.10 pp, McNemar p < 0.001)" in sentence


def test_a_model_without_any_drop_is_the_same_as_fp32():
    best = verdict().best.model_copy(update={"drop_pp": 0.0})
    sentence = verdict_sentence(make_inputs(verdict=verdict().model_copy(update={"best": best})))
    assert "images, the same as FP32 (" in sentence


def test_a_slower_model_is_said_to_take_longer():
    record = benchmark(measurement("fp32", 8, 4.0), measurement("int8", 8, 5.0))
    assert verdict_sentence(make_inputs(benchmark=record)).endswith(", and takes 1.25 times as long at batch 8.")


def test_without_a_measurement_the_sentence_says_nothing_of_speed():
    record = benchmark(measurement("int8", 1, 5.0))
    assert verdict_sentence(make_inputs(benchmark=record)).endswith("McNemar p = 1.00).")
