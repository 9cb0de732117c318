"""How are the weights of a quantized model fine-tuned?

Quantization-aware training of a fake-quantized, BatchNorm-folded model: the forward pass quantizes, the backward pass
goes straight through (Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013), as
pytorch-quantization's quantizers do. Every amax stays as calibration chose it. The same seed gives the same weights.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ptq.data.images import network_input
from ptq.errors import CalibrationError
from ptq.networks.fake_quant import exportable_fake_quant
from ptq.networks.training import MOMENTUM, Examples, evaluate_classifier, learning_rates
from ptq.records.plan import PlacementPlan

BATCH_SIZE = 32
# The one-cycle schedule ends at 0, so that an epoch of one step would train nothing.
LEAST_STEPS = 4


@dataclass(frozen=True, slots=True)
class FineTuned:
    """`losses[i]` is the cross-entropy after i epochs, in nats; the model has the weights of epoch `kept_epoch`."""

    losses: tuple[float, ...]
    kept_epoch: int


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The weight of a quantized layer, its amax per channel, and which entries reach it, with their values."""

    weight: torch.Tensor
    amax: torch.Tensor
    reaches: torch.Tensor
    values: torch.Tensor


def fine_tune_(
    model: nn.Module,
    plan: PlacementPlan,
    *,
    train: Examples,
    mean: Sequence[float],
    std: Sequence[float],
    epochs: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[int], None],
) -> FineTuned:
    """Trains the weights of a fake-quantized model in place and leaves those of the epoch with the least loss.

    Args:
        model: a fake-quantized model in `eval()`, in which it stays: there is no dropout, and BatchNorm that could not
            be folded keeps its statistics.
        plan: the plan it was built from.
        train: pixels, uint8 (n, h, w, c), and labels (n,) in [0, k).
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        epochs: passes over the images, at least 1.
        learning_rate: peak of the one-cycle schedule.
        seed: of the order of the images.
        progress: called with the number of finished epochs.

    Returns:
        The loss on `train` before training and after every epoch. Epoch 0 is kept where training made it worse, and a
        loss that is not finite ends the training.

    In each channel the weights that reach its amax stay, and the others stay within it: max |w|, from which the export
    computes the scale, is then the amax the weights were trained with.

    Raises:
        CalibrationError: there is no image.
    """
    if len(train[0]) == 0:
        raise CalibrationError("QAT was given 0 images; expected at least 1. Raise calibration.images.")
    parameters = [parameter.requires_grad_(True) for parameter in model.parameters()]
    bounds = _weight_bounds(model, plan)
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM)
    order = np.random.Generator(np.random.PCG64(seed))
    steps = min(max(math.ceil(len(train[0]) / BATCH_SIZE), LEAST_STEPS), len(train[0]))
    with exportable_fake_quant():
        losses = [evaluate_classifier(model, train, mean=mean, std=std)[0]]
        kept_epoch, kept = 0, copy.deepcopy(model.state_dict())
        for epoch in range(1, epochs + 1):
            rates = learning_rates(epoch, epochs=epochs, steps=steps, peak=learning_rate)
            for rate, chosen in zip(rates, np.array_split(order.permutation(len(train[0])), steps), strict=True):
                optimizer.param_groups[0]["lr"] = rate
                images = torch.from_numpy(network_input(train[0][chosen], mean=mean, std=std))
                _step_(model, optimizer, images, torch.from_numpy(train[1][chosen]))
                _keep_within_(bounds)
            losses.append(evaluate_classifier(model, train, mean=mean, std=std)[0])
            progress(epoch)
            if not math.isfinite(losses[-1]):
                break
            if losses[-1] < losses[kept_epoch]:
                kept_epoch, kept = epoch, copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(kept[name])
    return FineTuned(tuple(losses), kept_epoch)


def _step_(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _weight_bounds(model: nn.Module, plan: PlacementPlan) -> list[_Bounds]:
    bounds = []
    for spec in plan.weights:
        weight = model.get_submodule(spec.readers[0]).weight
        assert isinstance(weight, torch.Tensor)
        others = [dimension for dimension in range(weight.ndim) if dimension != spec.axis]
        values = weight.detach().clone()
        amax = values.abs().amax(others, keepdim=True)
        bounds.append(_Bounds(weight, amax, values.abs() == amax, values))
    return bounds


def _keep_within_(bounds: Sequence[_Bounds]) -> None:
    with torch.no_grad():
        for bound in bounds:
            clipped = torch.maximum(torch.minimum(bound.weight, bound.amax), -bound.amax)
            bound.weight.copy_(torch.where(bound.reaches, bound.values, clipped))
