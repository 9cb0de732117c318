"""Do the scales of a weight belong to it, one per output channel?"""

from collections.abc import Iterator

import numpy as np

from ptq.checks.subject import Found, Subject, check, dead_channels
from ptq.graph.nodes import better_axis, channel_ratios, label, scale_of
from ptq.graph.pair_sums import outputs_first
from ptq.graph.qdq_graph import Weight
from ptq.numerics.saturation import LARGEST_INPUT, LARGEST_SUM, largest_sums, runtimes_of

_SATURATED_SHARE = 0.01
_RATIO_BOUNDS = (0.3, 3.0)
_RATIO_SHARE = 0.9


def _weight_scales(subject: Subject) -> Iterator[tuple[Weight, np.ndarray]]:
    for weight in subject.graph.weight_quantizers().values():
        scale = scale_of(weight.node)
        if scale is not None and scale.size:
            yield weight, scale


@check("weight-per-channel", "warning", "Scale the weight per output channel.")
def _weight_per_channel(subject: Subject) -> Found:
    for weight, scale in _weight_scales(subject):
        if scale.size == 1 and (weight.axis is None or weight.values.shape[weight.axis] > 1):
            yield (
                weight.node,
                f"The weight of {label(weight.layer.node)} has one scale; expected one per output channel.",
            )


@check("weight-axis", "error", "Set the axis of the Q and the DQ to the output channels.")
def _weight_axis(subject: Subject) -> Found:
    for weight, scale in _weight_scales(subject):
        if scale.size == 1 or weight.axis is None:
            continue
        found = weight.node.attrs.get("axis")
        if found is None:
            yield weight.node, f"No axis is given, and the default is 1; expected an explicit axis {weight.axis}."
        elif found not in (weight.axis, weight.axis - weight.values.ndim):
            yield (
                weight.node,
                f"The axis is {found}; the output channels of {weight.layer.node.op} are axis {weight.axis}.",
            )


@check("weight-scale-count", "error", "Give each output channel one scale.")
def _weight_scale_count(subject: Subject) -> Found:
    for weight, scale in _weight_scales(subject):
        channels = None if weight.axis is None else weight.values.shape[weight.axis]
        if channels is not None and scale.size > 1 and (scale.size != channels or scale.ndim != 1):
            yield weight.node, f"There are {scale.size} scales of shape {scale.shape} for {channels} output channels."


def _fitting_steps(subject: Subject) -> Iterator[tuple[Weight, np.ndarray, np.ndarray]]:
    """Each weight whose scales can be held against it: its step, and max|w| / (127 * step) per living channel."""
    for weight, scale in _weight_scales(subject):
        step = weight.step
        if step is None or weight.values.dtype.kind not in "fi" or not (np.isfinite(scale) & (scale > 0)).all():
            continue
        if not np.isfinite(weight.values.astype(np.float64)).all() or weight.values.size == 0:
            continue
        if scale.size == 1:
            largest = float(np.abs(weight.values.astype(np.float64)).max())
            yield weight, step, np.array([largest / (127 * step.item())] if largest else [])
        elif weight.axis is not None and scale.size == weight.values.shape[weight.axis]:
            yield weight, step, channel_ratios(weight.values, step, weight.axis)


def _misfit(weight: Weight, step: np.ndarray, ratios: np.ndarray) -> str:
    """Why the scales cannot belong to the weight; empty if they can."""
    low, high = _RATIO_BOUNDS
    rival = None if weight.axis is None or step.size == 1 else better_axis(weight.values, step, weight.axis)
    if rival is not None:
        return f"The scales follow the channels of axis {rival}; the output channels are axis {weight.axis}."
    # Of stored integers the file does not say what they were scaled from; they may use part of the codes by choice.
    if weight.quantize is not None and ratios.size and np.mean((ratios >= low) & (ratios <= high)) < _RATIO_SHARE:
        return (
            f"max|w| / (127 * scale) runs from {ratios.min():.3g} to {ratios.max():.3g}; "
            f"expected {low:g} to {high:g} for {100 * _RATIO_SHARE:.0f} % of the channels."
        )
    return ""


@check("weight-scale-fit", "error", "Compute the scales from this weight.")
def _weight_scale_fit(subject: Subject) -> Found:
    for weight, step, ratios in _fitting_steps(subject):
        problem = _misfit(weight, step, ratios)
        if problem:
            yield weight.node, problem


@check("weight-saturation", "warning", "Choose larger weight scales; max never saturates.")
def _weight_saturation(subject: Subject) -> Found:
    for weight, step, ratios in _fitting_steps(subject):
        if _misfit(weight, step, ratios) or weight.quantize is None:
            continue
        shape = [1] * weight.values.ndim
        if step.size > 1 and weight.axis is not None:
            shape[weight.axis] = step.size
        share = float(np.mean(np.abs(weight.values / step.reshape(shape)) > 127.5))
        if share > _SATURATED_SHARE:
            yield weight.node, f"{100 * share:.1f} % of the weights lie outside the INT8 range."


@check("weight-pair-sums", "warning", "Quantize with `--isa portable`, or run on processors with VNNI alone.")
def _weight_pair_sums(subject: Subject) -> Found:
    for weight, step, _ in _fitting_steps(subject) if subject.dialect != "tensorrt" else ():
        node, values = weight.layer.node, weight.values
        groups = node.attrs.get("group", 1)
        is_regular = (
            isinstance(groups, int)
            and groups >= 1
            and values.ndim >= 2
            and not any(values.shape[axis] % groups for axis in (0, 1)[: 1 + (node.op == "ConvTranspose")])
        )
        if weight.axis is None or values.dtype == np.uint8 or not is_regular:
            continue
        turned = outputs_first(values.astype(np.float32), weight.axis, node.op, groups)
        factors = np.full(turned.shape[1] * groups, LARGEST_INPUT)
        scales = np.tile(step.ravel(), len(turned) // step.size)
        runtimes = runtimes_of([subject.dialect])
        sums = largest_sums(turned, scales, factors, groups=groups, runtimes=runtimes)
        if sums.max(initial=0) > LARGEST_SUM:
            yield (
                weight.node,
                f"Two products of {label(node)} can add up to {sums.max():,.0f}; processors without VNNI cut such a "
                f"sum off at {LARGEST_SUM:,}, in {int((sums > LARGEST_SUM).sum())} of {sums.size} output channels.",
            )


@check("weight-channel-zero", "warning", "Prune the channels, or look at the training; scale per channel.")
def _weight_channel_zero(subject: Subject) -> Found:
    for weight in subject.graph.weight_quantizers().values():
        dead = np.zeros(1) if weight.axis is None else dead_channels(weight.values, weight.axis)
        if dead.any():
            what = "zeros as weights" if weight.quantize is not None else "the code 0: dead, or lost to a coarse scale"
            yield weight.node, f"{int(dead.sum())} of {dead.size} output channels have only {what}."


@check("weight-prequantized", "warning", "Keep float weights and a Q for TensorRT 8.6.")
def _weight_prequantized(subject: Subject) -> Found:
    if subject.dialect == "tensorrt":
        for weight in subject.graph.weights:
            if weight.quantize is None:
                yield weight.dequantize, f"The weight of {label(weight.layer.node)} is stored as {weight.values.dtype}."
