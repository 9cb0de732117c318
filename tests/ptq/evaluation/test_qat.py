import numpy as np
import pytest
import torch
from networks import PLACEMENT, Untraceable, small_resnet
from torch import nn

from ptq.errors import CalibrationError
from ptq.evaluation.fallback import torch_threads
from ptq.evaluation.qat import fine_tune_
from ptq.networks.fake_quant import fake_quant_from_folded, weight_amax
from ptq.networks.folding import fold_model
from ptq.networks.unfolding import unfolded_state
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of

MEAN, STD = [0.5] * 3, [0.25] * 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These networks are too small for more."""
    with torch_threads(1):
        yield


def examples(count=48):
    """Pictures in four shades, one a class."""
    labels = np.arange(count) % 4
    noise = np.random.default_rng(0).integers(0, 40, (count, 12, 12, 3))
    return (noise + 55 * labels[:, None, None, None]).astype(np.uint8), labels


class Network:
    """A network with its folded and its fake-quantized form."""

    def __init__(self, model=None):
        self.original = (model or small_resnet()).eval()
        self.folded = fold_model(self.original)
        module = self.folded.module
        self.plan = place_quantizers(view_of(module, traced=self.folded.traced), **PLACEMENT)
        self.fake_quant = fake_quant_from_folded(
            module, self.plan, dialect="cpu", activation_amax={spec.name: 4.0 for spec in self.plan.activations},
            weight_amax=weight_amax(module, self.plan),
        )  # fmt: skip

    def tune(self, *, train=None, epochs=4, learning_rate=0.2, seed=0):
        return fine_tune_(
            self.fake_quant, self.plan, train=train or examples(), mean=MEAN, std=STD, epochs=epochs,
            learning_rate=learning_rate, seed=seed, progress=lambda epoch: None,
        )  # fmt: skip

    def state(self):
        return unfolded_state(self.original, self.folded, self.fake_quant)


@pytest.fixture(scope="module")
def tuned():
    network = Network()
    return network, network.tune()


def test_the_loss_of_the_fake_quantized_model_falls(tuned):
    _, result = tuned
    assert len(result.losses) == 5
    assert result.losses[-1] < result.losses[0] - 0.1
    assert result.kept_epoch == min(range(5), key=lambda epoch: result.losses[epoch])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tuned):
    network, result = tuned
    again, other = Network(), Network()
    assert again.tune() == result
    other.tune(seed=1)
    first, second, third = network.state(), again.state(), other.state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], third["fc.weight"])


def test_every_amax_stays_as_calibration_chose_it(tuned):
    network, _ = tuned
    untouched = Network()
    before, after = untouched.fake_quant.state_dict(), network.fake_quant.state_dict()
    names = [name for name in before if name.endswith("_amax")]
    assert len(names) == len(network.plan.quantizers)
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_the_weights_keep_the_amax_that_the_export_computes_from_them(tuned):
    network, _ = tuned
    before, after = (weight_amax(module, network.plan) for module in (network.folded.module, network.fake_quant))
    assert len(before) == 7
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(network.folded.module.fc.weight, network.fake_quant.fc.weight)


def test_the_weights_are_a_checkpoint_of_the_original_network_that_folds_to_those_trained(tuned):
    network, _ = tuned
    loaded = small_resnet(seed=9)
    loaded.load_state_dict(network.state())
    trained, folded = network.fake_quant.state_dict(), fold_model(loaded).module.state_dict()
    assert len(folded) == 14
    assert all(torch.equal(value, trained[name]) for name, value in folded.items())


def test_a_layer_with_a_bias_and_a_batchnorm_of_another_epsilon_folds_back_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[1].running_mean.fill_(0.3)
    model[1].running_var.fill_(2.0)
    network = Network(model)
    assert network.tune(epochs=1).kept_epoch == 1
    loaded = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loaded.load_state_dict(network.state())
    trained, folded = network.fake_quant.state_dict(), fold_model(loaded.eval()).module.state_dict()
    assert {name: torch.equal(value, trained[name]) for name, value in folded.items()} == {
        "0.weight": True, "0.bias": True,
    }  # fmt: skip


def test_a_model_that_cannot_be_traced_is_fine_tuned_under_its_own_names():
    network = Network(Untraceable())
    result = network.tune(epochs=2)
    assert result.losses[result.kept_epoch] < result.losses[0]
    assert network.state().keys() == network.original.state_dict().keys()


def test_one_epoch_on_a_handful_of_images_changes_the_weights():
    network = Network()
    assert network.tune(train=examples(8), epochs=1).kept_epoch == 1
    assert not torch.equal(network.folded.module.fc.weight, network.fake_quant.fc.weight)


def test_training_that_makes_it_worse_leaves_the_weights_as_they_were():
    network = Network()
    result = network.tune(epochs=2, learning_rate=1e9)
    assert result.kept_epoch == 0
    before, after = Network().state(), network.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_input_network_is_not_changed(tuned):
    network, _ = tuned
    untouched = small_resnet().state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in network.original.state_dict().items())


def test_without_images_there_is_nothing_to_train_on():
    pixels, labels = examples()
    with pytest.raises(CalibrationError, match=r"QAT was given 0 images.*calibration.images"):
        Network().tune(train=(pixels[:0], labels[:0]))
