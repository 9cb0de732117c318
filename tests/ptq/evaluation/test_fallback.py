import dataclasses

import numpy as np
import pytest
from pydantic import ValidationError
from report_inputs import parity

from ptq.config import GateConfig, PtqConfig
from ptq.evaluation.fallback import (
    carried_table,
    describe_fine_tuning,
    groups_of_ranking,
    only_accuracy_failed,
    sensitivity_images,
    summarize_attempts,
)
from ptq.evaluation.qat import FineTuned
from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.records.decision import Attempt, GateDecision, LayerSensitivity
from ptq.records.evaluation import PairedComparison
from ptq.records.graph import EngineIdentity
from ptq.records.parity import Parting
from ptq.records.plan import PlacementPlan, QuantizerSpec

REJECTED = GateDecision(False, ("The top-1 drop is 9.00 pp.", "The graph checks found 0 errors, as asked."))
ACCEPTED = GateDecision(True, ("The top-1 drop is 0.50 pp.",))
PARTING = Parting("conv1", "saturation", "They part first at conv1.")
LIMITS = GateConfig(max_drop_pp=1.0, min_speedup_fp32=1.5, min_speedup_fp16=0.0)


def comparison(drop_pp):
    return PairedComparison(
        images=100, drop_pp=drop_pp, drop_interval_pp=(drop_pp - 1, drop_pp + 1), mcnemar_p=0.5, fp32_only_correct=9,
        int8_only_correct=0, flipped=9,
    )  # fmt: skip


def benchmark(*, fp32_ms):
    """INT8 takes 1 ms."""

    def measurement(precision, median_ms):
        return Measurement(precision, 1, (median_ms,), *[median_ms] * 5, 1000 / median_ms, (median_ms,))

    engine = EngineIdentity("openvino", "1", "a CPU", 1)
    return BenchmarkRecord(engine, "a CPU", None, (measurement("fp32", fp32_ms), measurement("int8", 1.0)), ())


@pytest.mark.parametrize(
    ("drop_pp", "fp32_ms", "graph_errors", "parting", "expected"),
    [
        pytest.param(9.0, 2.0, 0, None, True, id="accuracy alone"),
        pytest.param(0.5, 2.0, 0, None, False, id="accepted"),
        pytest.param(0.5, 1.2, 0, None, False, id="speed alone"),
        pytest.param(9.0, 1.2, 0, None, False, id="accuracy and speed"),
        pytest.param(9.0, 2.0, 1, None, False, id="accuracy and graph"),
        pytest.param(9.0, 2.0, 0, PARTING, False, id="accuracy and engine"),
        pytest.param(float("nan"), 2.0, 0, None, False, id="accuracy unknown"),
    ],
)
def test_a_fallback_can_help_only_where_accuracy_alone_is_rejected(drop_pp, fp32_ms, graph_errors, parting, expected):
    found = only_accuracy_failed(
        comparison=comparison(drop_pp),
        benchmark=benchmark(fp32_ms=fp32_ms),
        graph_errors=graph_errors,
        parity=parity(parting),
        limits=LIMITS,
    )
    assert found is expected


def attempt(candidate, what, drop_pp, decision):
    return Attempt("float_layers", what, candidate, comparison(drop_pp), decision)


def test_after_rejected_attempts_the_first_decision_stands_and_names_them():
    found = summarize_attempts(
        REJECTED, "max-0", [attempt("max_float1-0", "one layer left in float: fc (9.0 dB)", 4.0, REJECTED)]
    )
    assert not found.accepted
    assert found.reasons == (
        *REJECTED.reasons,
        "Tried one layer left in float: fc (9.0 dB). max_float1-0 has a top-1 drop of 4.00 pp and is rejected: "
        "The top-1 drop is 9.00 pp.",
    )


def test_an_accepted_attempt_is_the_decision_and_names_what_came_before():
    tried = [attempt("max_float1-0", "A", 4.0, REJECTED), attempt("max_float2-0", "B", 0.5, ACCEPTED)]
    found = summarize_attempts(REJECTED, "max-0", tried)
    assert found.accepted
    assert found.reasons == (
        "The top-1 drop is 0.50 pp.",
        "max-0 was chosen first and rejected for its accuracy. The top-1 drop is 9.00 pp.",
        "Tried A. max_float1-0 has a top-1 drop of 4.00 pp and is rejected: The top-1 drop is 9.00 pp.",
        "Tried B. max_float2-0 has a top-1 drop of 0.50 pp and is accepted.",
    )


def test_with_nothing_to_try_the_first_decision_stands():
    assert summarize_attempts(REJECTED, "max-0", []) == REJECTED


def test_images_are_taken_evenly_from_a_draw(tmp_path):
    pixels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    np.save(tmp_path / "pixels.npy", pixels)
    draw = (0, 2, 4, 6, 8, 9)
    found = sensitivity_images(tmp_path / "pixels.npy", draw, images=3, mean=[0.0], std=[1 / 255])
    assert found.reshape(-1).round(3).tolist() == [0.0, 4.0, 8.0]
    every = sensitivity_images(tmp_path / "pixels.npy", draw, images=64, mean=[0.0], std=[1 / 255])
    assert every.reshape(-1).round(3).tolist() == list(draw)


def plan(*names, **changes):
    spec = QuantizerSpec(
        name="", kind="activation", observed="", axis=None, never_negative=True, readers=("conv",), tensors=()
    )
    quantizers = tuple(
        dataclasses.replace(spec, name=name, observed=name, tensors=(name,), **changes) for name in names
    )
    return PlacementPlan(quantizers, ("conv",), (), 0, 0, True, ())


def test_a_table_is_carried_over_where_every_quantizer_is_known():
    table = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert carried_table(table, source=plan("a", "b", "c"), target=plan("c", "a")) == {"c": 3.0, "a": 1.0}
    assert carried_table(table, source=plan("a", "b", "c"), target=plan("a", readers=("fc",))) == {"a": 1.0}


def test_a_table_is_not_carried_over_to_a_quantizer_that_is_new_or_on_other_values():
    assert carried_table({"a": 1.0}, source=plan("a"), target=plan("a", "b")) is None
    assert carried_table({"a": 1.0}, source=plan("a"), target=plan("a", never_negative=False)) is None


def test_groups_name_their_layers_with_their_sensitivity():
    layers = (LayerSensitivity("fc", 9.04), LayerSensitivity("conv1", 12.0), LayerSensitivity("conv2", 30.0))
    assert [group.what for group in groups_of_ranking(layers, limit=2)] == [
        "one layer left in float: fc (9.0 dB)",
        "2 layers left in float: fc (9.0 dB), conv1 (12.0 dB)",
    ]


def test_of_many_layers_eight_are_named():
    layers = tuple(LayerSensitivity(f"conv{index}", float(index)) for index in range(12))
    assert groups_of_ranking(layers, limit=10)[-1].what.endswith("conv7 (7.0 dB) and 2 more")


def test_qat_that_found_nothing_better_says_that_the_weights_stay():
    found = describe_fine_tuning(FineTuned((0.5, 0.6, 0.7), 0), images=96, learning_rate=0.1)
    assert found == (
        "QAT, which left the weights as they were: 2 epochs on 96 images, learning rate 0.1, loss never below 0.5000"
    )


def test_a_method_per_layer_needs_two_methods_to_choose_from():
    content = {
        "model": {"name": "resnet18", "checkpoint": "a.pth"}, "data": {"path": "images"},
        "calibration": {"methods": ["max"]}, "fallback": {"per_layer_method": True},
    }  # fmt: skip
    with pytest.raises(ValidationError, match=r"per_layer_method is true and calibration.methods is \['max'\]"):
        PtqConfig.model_validate(content)


def test_no_fallback_is_configured_by_default():
    content = {"model": {"name": "resnet18", "checkpoint": "a.pth"}, "data": {"path": "images"}}
    fallback = PtqConfig.model_validate(content).fallback
    assert (fallback.per_layer_method, fallback.float_layers, fallback.qat_epochs) == (False, 0, 0)
