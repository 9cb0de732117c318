import pytest
from pydantic import ValidationError

from ptq.config import CalibrationConfig, PtqConfig, RunnerConfig

MODEL = {"model": {"name": "resnet18", "checkpoint": "a.pth"}, "data": {"path": "images"}}


def test_one_percentile_is_the_method_of_that_name():
    found = CalibrationConfig(percentiles=(99.9,)).labelled_methods
    assert [item.label for item in found] == ["max", "percentile", "mse", "entropy"]
    assert [item.percentile for item in found] == [None, 99.9, None, None]


def test_each_of_several_percentiles_has_a_label_of_its_own():
    found = CalibrationConfig(methods=("mse", "percentile"), percentiles=(99.9, 99.99999, 100)).labelled_methods
    assert [item.label for item in found] == ["mse", "percentile-99.9", "percentile-99.99999", "percentile-100"]
    assert [item.percentile for item in found] == [None, 99.9, 99.99999, 100.0]


def test_a_method_is_found_by_its_label():
    config = CalibrationConfig(percentiles=(99.9, 99.99))
    assert config.labelled("percentile-99.99").percentile == 99.99
    with pytest.raises(ValueError, match="'per_layer' is not a method of this calibration; expected one of max, perc"):
        config.labelled("per_layer")


@pytest.mark.parametrize(
    ("percentiles", "message"),
    [
        ((99.9, 0.0), "greater than 0"),
        ((100.1,), "less than or equal to 100"),
        ((), "at least 1 item"),
        ((99.9, 99.99, 99.9), r"percentiles names one percentile twice: \[99.9, 99.99, 99.9\]"),
    ],
)
def test_percentiles_that_cannot_be_used_are_refused(percentiles, message):
    with pytest.raises(ValidationError, match=message):
        CalibrationConfig(percentiles=percentiles)


def test_two_percentiles_are_enough_to_choose_a_method_per_layer():
    calibration = {"methods": ["percentile"], "percentiles": [99.9, 99.99]}
    fallback = {"per_layer_method": True}
    assert PtqConfig.model_validate({**MODEL, "calibration": calibration, "fallback": fallback})
    one = {"methods": ["percentile"], "percentiles": [99.99]}
    with pytest.raises(ValidationError, match="give at least two methods, or two percentiles, to choose from"):
        PtqConfig.model_validate({**MODEL, "calibration": one, "fallback": fallback})


def test_both_usual_percentiles_are_compared_unless_told_otherwise():
    found = CalibrationConfig(methods=("percentile",)).labelled_methods
    assert [item.label for item in found] == ["percentile-99.99", "percentile-99.95"]


def test_without_a_tolerance_there_is_no_stopping_rule():
    assert CalibrationConfig().stopping_rule("cpu") is None


def test_the_stopping_rule_asks_for_every_method_of_the_calibration():
    config = CalibrationConfig(methods=("max", "percentile"), percentiles=(99.0, 99.9), tolerance_percent=5)
    rule = config.stopping_rule("tensorrt")
    assert [item.label for item in rule.methods] == ["max", "percentile-99", "percentile-99.9"]
    assert (rule.dialect, rule.tolerance_percent) == ("tensorrt", 5.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 31}, "tolerance_percent is 2 and images 31: an interval needs at least 32 images; raise images"),
        ({"methods": ("max",)}, r"methods is \['max'\]: the maximum of a sample has no interval; add a method"),
    ],
)
def test_a_tolerance_that_cannot_be_judged_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        CalibrationConfig(tolerance_percent=2, **settings)


@pytest.mark.parametrize("address", ["", "127.0.0.1:8786", "http://host:8786", "tcp://host", "tcp://user@host:8786"])
def test_dask_without_the_address_of_a_scheduler_is_refused(address):
    with pytest.raises(ValidationError, match=rf"address is '{address}' and name 'dask': give .* tcp://host:port"):
        RunnerConfig(name="dask", address=address)


@pytest.mark.parametrize("address", ["tcp://10.0.0.5:8786", "tls://scheduler.local:8786"])
def test_dask_takes_the_address_of_a_scheduler(address):
    assert RunnerConfig(name="dask", address=address).address == address


def test_threads_need_no_address():
    assert PtqConfig.model_validate(MODEL).runner.name == "threads"
