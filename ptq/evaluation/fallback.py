"""What can still be tried with a model that was rejected for its accuracy?

Puts files, sensitivity and QAT together for the three attempts: a method per layer, layers left in float, and QAT.
Each starts from the candidate that was chosen first. Whether an attempt is good enough is the gate's business.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ptq.config import Dialect, GateConfig, WeightMethod
from ptq.data.images import network_input
from ptq.data.sampling import evenly_spaced
from ptq.evaluation import gate
from ptq.evaluation.qat import FineTuned, fine_tune_
from ptq.evaluation.sensitivity import (
    best_methods,
    float_groups,
    layer_sqnr_db,
    most_sensitive,
    per_layer_table,
    quantizer_sqnr_db,
    quantizers_of_layers,
)
from ptq.networks.fake_quant import fake_quant_from_folded, weight_amax
from ptq.networks.folding import FoldedModel, fold_model
from ptq.networks.network import NetworkKind, network_as_built
from ptq.networks.unfolding import unfolded_state
from ptq.quantization.prepared import plan_from_file
from ptq.records.benchmark import BenchmarkRecord
from ptq.records.decision import Attempt, FloatGroup, GateDecision, LayerSensitivity, QuantizerChoice
from ptq.records.evaluation import PairedComparison, in_method_order
from ptq.records.parity import ParityRecord
from ptq.records.plan import PlacementPlan
from ptq.wording import first_names

LAYERS_NAMED = 8


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A prepared model: `weights` is safetensors in the network's own names, `plan` the placement plan."""

    name: str
    weights: Path
    plan: Path
    num_classes: int
    input_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Network:
    """A network as it was built, folded and fake-quantized."""

    original: nn.Module
    folded: FoldedModel
    fake_quant: nn.Module
    plan: PlacementPlan


def only_accuracy_failed(
    *,
    comparison: PairedComparison,
    benchmark: BenchmarkRecord,
    graph_errors: int,
    parity: ParityRecord,
    limits: GateConfig,
) -> bool:
    """Whether the gate rejects the candidate, and would accept it if any drop of accuracy were allowed."""
    with_limit, without = (
        gate.decide(
            comparison=comparison,
            benchmark=benchmark,
            graph_errors=graph_errors,
            parity=parity,
            max_drop_pp=max_drop_pp,
            min_speedup_fp32=limits.min_speedup_fp32,
            min_speedup_fp16=limits.min_speedup_fp16,
        )
        for max_drop_pp in (limits.max_drop_pp, float("inf"))
    )
    return without.accepted and not with_limit.accepted


def sensitivity_images(
    pixels: Path, draw: Sequence[int], *, images: int, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Returns normalized images of a draw, evenly spaced, for a draw is in the order of the data: class after class.

    Args:
        pixels: npy, uint8 (n, h, w, c).
        draw: positions of the drawn images.
        images: how many to take; all where the draw has fewer.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].

    Returns:
        float32 (images, c, h, w).
    """
    chosen = evenly_spaced(draw, count=images)
    return network_input(np.load(pixels, mmap_mode="r", allow_pickle=False)[chosen], mean=mean, std=std)


def choose_methods(
    model: ModelFiles,
    *,
    tables: Mapping[str, Mapping[str, float]],
    images: np.ndarray,
    dialect: Dialect,
    weight_method: WeightMethod,
    threads: int,
) -> tuple[dict[str, float], tuple[QuantizerChoice, ...]]:
    """Returns the amax table that takes the best method for every activation quantizer, and the choices behind it.

    Args:
        model: the prepared model.
        tables: the amax table of each method, of one trial, in activation units.
        images: normalized images, float32 (n, c, h, w).
        dialect: of the quantizers.
        weight_method: how the weights' amax is chosen.
        threads: CPU threads; 0 for all cores.
    """
    with torch_threads(threads):
        plan = plan_from_file(model.plan)
        network = _network(model, plan, next(iter(tables.values())), dialect, weight_method)
        found = quantizer_sqnr_db(network.fake_quant, network.plan, tables=tables, images=images)
    methods = best_methods(found)
    choices = tuple(QuantizerChoice(name, method, found[method][name]) for name, method in methods.items())
    return per_layer_table(tables, methods), choices


def rank_layers(
    model: ModelFiles,
    *,
    table: Mapping[str, float],
    images: np.ndarray,
    dialect: Dialect,
    weight_method: WeightMethod,
    threads: int,
) -> tuple[LayerSensitivity, ...]:
    """Returns the quantized layers, the most sensitive first. See `choose_methods` for the arguments."""
    with torch_threads(threads):
        network = _network(model, plan_from_file(model.plan), table, dialect, weight_method)
        quantizers = quantizers_of_layers(network.folded.module, network.plan)
        found = layer_sqnr_db(network.fake_quant, network.plan, quantizers=quantizers, images=images)
    return tuple(LayerSensitivity(layer, found[layer]) for layer in most_sensitive(found))


def fine_tune_from_files(
    model: ModelFiles,
    *,
    table: Mapping[str, float],
    pixels: Path,
    labels: Path,
    mean: Sequence[float],
    std: Sequence[float],
    dialect: Dialect,
    epochs: int,
    learning_rate: float,
    seed: int,
    threads: int,
    output: Path,
    progress: Callable[[int], None],
) -> FineTuned:
    """Fine-tunes a model with the activation amax of `table` and writes its weights to `output`, as safetensors.

    The file has the names of the original network, so that it is a checkpoint of it. Weights are
    trained within max |w|, so their graph is exported with weight method `max`. See `qat.fine_tune_` for the other
    arguments.
    """
    with torch_threads(threads):
        plan = plan_from_file(model.plan).of_dialect(dialect)
        network = _network(model, plan, table, dialect, "max")
        train = np.load(pixels, mmap_mode="r", allow_pickle=False), np.load(labels, allow_pickle=False)
        result = fine_tune_(
            network.fake_quant,
            network.plan,
            train=train,
            mean=mean,
            std=std,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            progress=progress,
        )
        state = unfolded_state(network.original, network.folded, network.fake_quant)
    safetensors.torch.save_file({name: value.contiguous() for name, value in sorted(state.items())}, output)
    return result


def _network(
    model: ModelFiles, plan: PlacementPlan, table: Mapping[str, float], dialect: Dialect, weight_method: WeightMethod
) -> _Network:
    kind = NetworkKind(model.name, model.num_classes, model.input_shape)
    state = safetensors.torch.load_file(model.weights)
    original, _ = network_as_built(state, kind, source=str(model.weights))
    folded = fold_model(original)
    fake_quant = fake_quant_from_folded(
        folded.module,
        plan,
        dialect=dialect,
        activation_amax=table,
        weight_amax=weight_amax(folded.module, plan, method=weight_method),
    )
    return _Network(original, folded, fake_quant, plan)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Gives torch that many CPU threads, 0 for all cores, and back what it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def carried_table(
    table: Mapping[str, float], *, source: PlacementPlan, target: PlacementPlan
) -> dict[str, float] | None:
    """Returns the amax of the target's activation quantizers from a table of the source's.

    None where the target has a quantizer that the source does not have on the same tensors: its amax is not known.
    """
    known = {(spec.name, spec.observed, spec.tensors, spec.never_negative) for spec in source.activations}
    wanted = [(spec.name, spec.observed, spec.tensors, spec.never_negative) for spec in target.activations]
    return {name: table[name] for name, *_ in wanted} if known.issuperset(wanted) else None


def groups_of_ranking(layers: Sequence[LayerSensitivity], *, limit: int) -> tuple[FloatGroup, ...]:
    """Returns the groups of layers to leave in float, in the order to try, with their description."""
    sqnr_db = {found.layer: found.sqnr_db for found in layers}
    return tuple(
        FloatGroup(group, _describe_group([f"{layer} ({sqnr_db[layer]:.1f} dB)" for layer in group]))
        for group in float_groups(list(sqnr_db), limit=limit)
    )


def _describe_group(parts: Sequence[str]) -> str:
    count = "one layer" if len(parts) == 1 else f"{len(parts)} layers"
    return f"{count} left in float: {first_names(parts, LAYERS_NAMED)}"


def describe_choices(choices: Sequence[QuantizerChoice]) -> str:
    """Returns how many quantizers took which method.

    >>> describe_choices([QuantizerChoice("a", "mse", 9.0), QuantizerChoice("b", "max", 9.0)])
    'the method chosen per layer: 1 max, 1 mse'
    """
    counts = Counter(choice.method for choice in choices)
    return f"the method chosen per layer: {', '.join(f'{counts[m]} {m}' for m in in_method_order(counts))}"


def describe_fine_tuning(found: FineTuned, *, images: int, learning_rate: float) -> str:
    """Returns what QAT did, and that it changed the weights.

    >>> describe_fine_tuning(FineTuned((0.5, 0.4), 1), images=96, learning_rate=0.001)
    'QAT, which changed the weights: 1 epoch on 96 images, learning rate 0.001, loss 0.5000 to 0.4000'
    """
    first, kept, epochs = found.losses[0], found.losses[found.kept_epoch], len(found.losses) - 1
    passes = f"{epochs} epoch{'' if epochs == 1 else 's'} on {images} images, learning rate {learning_rate:g}"
    if found.kept_epoch == 0:
        return f"QAT, which left the weights as they were: {passes}, loss never below {first:.4f}"
    return f"QAT, which changed the weights: {passes}, loss {first:.4f} to {kept:.4f}"


def summarize_attempts(first: GateDecision, candidate: str, attempts: Sequence[Attempt]) -> GateDecision:
    """Returns the decision of the last attempt if it was accepted, else the first, with what was tried as reasons.

    Args:
        first: the decision on the candidate chosen first, a rejection.
        candidate: its name.
        attempts: what was tried, in order; only the last may be accepted.
    """
    tried = tuple(_attempt_sentence(attempt) for attempt in attempts)
    if not attempts or not attempts[-1].decision.accepted:
        return GateDecision(accepted=False, reasons=(*first.reasons, *tried))
    before = f"{candidate} was chosen first and rejected for its accuracy. {first.reasons[0]}"
    return GateDecision(accepted=True, reasons=(*attempts[-1].decision.reasons, before, *tried))


def _attempt_sentence(attempt: Attempt) -> str:
    reached = f"{attempt.candidate} has a top-1 drop of {attempt.comparison.drop_pp:.2f} pp"
    if attempt.decision.accepted:
        return f"Tried {attempt.what}. {reached} and is accepted."
    return f"Tried {attempt.what}. {reached} and is rejected: {attempt.decision.reasons[0]}"
