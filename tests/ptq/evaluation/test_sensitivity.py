import numpy as np
import pytest
import torch
from networks import PLACEMENT, NeedsTwoMethods, Untraceable, small_resnet
from torch import nn

from ptq.errors import CalibrationError
from ptq.evaluation.fallback import torch_threads
from ptq.evaluation.sensitivity import (
    best_methods,
    float_groups,
    layer_sqnr_db,
    quantizer_sqnr_db,
    quantizers_of_layers,
)
from ptq.networks.fake_quant import fake_quant_from_folded, weight_amax
from ptq.networks.folding import fold_model
from ptq.numerics.metrics import SQNR_LIMIT_DB
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These networks are too small for more."""
    with torch_threads(1):
        yield


class TwoLinears(nn.Module):
    """x -> 2x -> 2x, one number in and one out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.first.weight.fill_(2.0)
            self.second.weight.fill_(1.0)

    def forward(self, x):
        return self.second(self.first(torch.flatten(x, 1)))


def prepared(model):
    folded = fold_model(model.eval())
    return folded.module, place_quantizers(view_of(folded.module, traced=folded.traced), **PLACEMENT)


def fake_quant(module, plan, table, weights=None):
    return fake_quant_from_folded(
        module, plan, dialect="tensorrt", activation_amax=table, weight_amax=weights or weight_amax(module, plan)
    )


def images(*values):
    return np.array(values, dtype=np.float32).reshape(-1, 1, 1, 1)


def test_the_sqnr_of_a_quantizer_is_that_of_the_logits_when_it_alone_is_active():
    module, plan = prepared(TwoLinears())
    assert [spec.name for spec in plan.activations] == ["flatten", "first"]
    model = fake_quant(module, plan, {"flatten": 127.0, "first": 127.0})
    # Steps of 1: the input 10 is exact, and so is 20 behind the first layer. Steps of 3: 10 becomes 9, and 20 becomes
    # 21; logits of 18 and 21 instead of 20 are 20 log10(20 / 2) = 20 dB and 20 log10(20 / 1) = 26.02 dB.
    tables = {"max": {"flatten": 127.0, "first": 127.0}, "mse": {"flatten": 381.0, "first": 381.0}}
    found = quantizer_sqnr_db(model, plan, tables=tables, images=images(10.0))
    assert found["max"] == {"flatten": SQNR_LIMIT_DB, "first": SQNR_LIMIT_DB}
    assert found["mse"]["flatten"] == pytest.approx(20.0, abs=1e-4)
    assert found["mse"]["first"] == pytest.approx(26.0206, abs=1e-4)


def test_the_sqnr_of_a_layer_counts_its_input_and_its_weight_and_nothing_else():
    module, plan = prepared(TwoLinears())
    weights = {"first.weight": torch.tensor([2.0]), "second.weight": torch.tensor([127 / 100])}
    # The second weight, 1, is exactly 100 steps of 0.01; the first is 127 of its own. Only the input of the first layer
    # is off: 10 becomes 9.
    model = fake_quant(module, plan, {"flatten": 381.0, "first": 127.0}, weights)
    found = layer_sqnr_db(model, plan, quantizers=quantizers_of_layers(module, plan), images=images(10.0))
    assert found["first"] == pytest.approx(20.0, abs=1e-4)
    assert found["second"] > 120


def test_a_weight_that_does_not_fit_its_steps_makes_its_layer_sensitive():
    module, plan = prepared(TwoLinears())
    weights = {"first.weight": torch.tensor([2.0]), "second.weight": torch.tensor([127 * 0.8])}
    # Steps of 0.8: the weight 1 becomes 0.8, a logit of 20 becomes 16, 20 log10(20 / 4) = 13.98 dB.
    model = fake_quant(module, plan, {"flatten": 127.0, "first": 127.0}, weights)
    found = layer_sqnr_db(model, plan, quantizers=quantizers_of_layers(module, plan), images=images(10.0))
    assert found["second"] == pytest.approx(13.9794, abs=1e-4)
    assert found["first"] > 120


def test_the_result_does_not_depend_on_how_images_fall_into_batches():
    module, plan = prepared(TwoLinears())
    table = {"flatten": 381.0, "first": 381.0}
    model = fake_quant(module, plan, table)
    one = quantizer_sqnr_db(model, plan, tables={"max": table}, images=images(10.0))
    many = quantizer_sqnr_db(model, plan, tables={"max": table}, images=images(*[10.0] * 70))
    assert many["max"]["first"] == pytest.approx(one["max"]["first"], abs=1e-9)


def test_a_table_without_a_quantizer_is_refused():
    module, plan = prepared(TwoLinears())
    model = fake_quant(module, plan, {"flatten": 1.0, "first": 1.0})
    with pytest.raises(CalibrationError, match="Quantizer first has amax None"):
        quantizer_sqnr_db(model, plan, tables={"max": {"flatten": 1.0}}, images=images(10.0))


def test_a_quantizer_before_a_max_pool_belongs_to_the_layer_behind_it():
    module, plan = prepared(small_resnet())
    found = quantizers_of_layers(module, plan)
    assert next(spec.tensors for spec in plan.activations if spec.name == "maxpool") == ("relu",)
    assert found["conv1"] == ("x", "conv1.weight")
    assert found["block1.conv1"] == ("maxpool", "block1.conv1.weight")
    assert found["block2.conv1"][0] == found["block2.downsample.0"][0]
    assert all(len(names) == 2 for names in found.values())


def test_every_layer_of_a_model_that_cannot_be_traced_has_its_own_input_quantizer():
    module, plan = prepared(Untraceable())
    assert quantizers_of_layers(module, plan) == {"conv": ("conv", "conv.weight"), "fc": ("fc", "fc.weight")}
    table = {"conv": 4.0, "fc": 4.0}
    pixels = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    model = fake_quant(module, plan, table)
    found = quantizer_sqnr_db(model, plan, tables={"max": table}, images=pixels)
    assert 20 < found["max"]["conv"] < 100
    assert 20 < found["max"]["fc"] < 100


def test_the_layer_behind_the_outliers_is_the_most_sensitive():
    module, plan = prepared(NeedsTwoMethods())
    pixels = np.random.default_rng(0).uniform(-2, 2, size=(4, 3, 24, 24)).astype(np.float32)
    amax = {"x": 2.0, "relu": 4.4e4, "relu_1": 440.0, "score": 4.4, "flatten": 4.4}
    assert [spec.name for spec in plan.activations] == list(amax)
    model = fake_quant(module, plan, amax)
    found = layer_sqnr_db(model, plan, quantizers=quantizers_of_layers(module, plan), images=pixels)
    assert min(found, key=found.get) == "gather"
    assert found["gather"] == pytest.approx(0.0, abs=0.1)  # nothing of the signal is left


def test_the_method_of_a_quantizer_is_chosen_by_its_own_sqnr_alone():
    found = {"max": {"a": 10.0, "b": 30.0}, "entropy": {"a": 20.0, "b": 29.0}, "percentile": {"a": 20.0, "b": 5.0}}
    assert best_methods(found) == {"a": "percentile", "b": "max"}


def test_one_layer_always_stays_quantized():
    assert float_groups(["a", "b", "c"], limit=1) == (("a",),)
    assert float_groups(["a", "b", "c"], limit=100) == (("a",), ("a", "b"))
    assert float_groups(["a"], limit=1) == ()


def test_four_layers_are_tried_as_one_two_and_four():
    assert [len(group) for group in float_groups(list("abcdefgh"), limit=4)] == [1, 2, 4]
