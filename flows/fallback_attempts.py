"""What the main flow tries with a model that was rejected for its accuracy alone, in order."""

from collections.abc import Iterator
from dataclasses import replace

from flows.judging import Judged, equalized, exported, judge
from ptq.config import WeightMethod
from ptq.records.calibration import AmaxRecord
from ptq.records.decision import Attempt, AttemptKind, RunFindings
from ptq.records.plan import ModelRecord
from tasks.runtime.context import RunContext
from tasks.stages.evaluation import evaluate, select_candidate
from tasks.stages.fallback import carry_amax, choose_methods, fine_tune, rank_layers, summarize_attempts
from tasks.stages.model import prepare_model


def fall_back(judged: Judged, first: RunFindings) -> RunFindings:
    """Try what is configured until something is accepted; the first findings stay where nothing is."""
    attempts: list[Attempt] = []
    found = first
    for attempt, findings in _attempts(judged, first):
        attempts.append(attempt)
        if attempt.decision.accepted:
            found = findings
            break
    decision = summarize_attempts(first.decision, first.selection.candidate, attempts, run=judged.run)
    return replace(found, decision=decision, attempts=tuple(attempts))


def _attempts(judged: Judged, first: RunFindings) -> Iterator[tuple[Attempt, RunFindings]]:
    """Yield each configured attempt with its findings: a method per layer, layers left in float, QAT."""
    run, draws, model = judged.run, judged.draws, first.model
    of_trial = [table for table in first.tables if table.trial == first.selection.trial]
    best = first.selection.table_among(of_trial)
    if run.config.fallback.per_layer_method:
        chosen = choose_methods(model, of_trial, draws, run=run)
        yield _attempt(judged, first, model, chosen.amax, kind="per_layer_method", what=chosen.what)
    if run.config.fallback.float_layers:
        for group in rank_layers(model, best, draws, run=run).groups:
            smaller, amax = _left_in_float(judged, model, best, group.layers)
            yield _attempt(judged, first, smaller, amax, kind="float_layers", what=group.what)
    if run.config.fallback.qat_epochs:
        tuned = fine_tune(model, best, draws, run=run)
        # Corrected biases belong to the weights they were computed from; training has changed both.
        amax = replace(best, method=f"{best.method}_qat", biases=None)
        yield _attempt(judged, first, tuned.model, amax, kind="qat", what=tuned.what)


def _left_in_float(
    judged: Judged, model: ModelRecord, best: AmaxRecord, layers: tuple[str, ...]
) -> tuple[ModelRecord, AmaxRecord]:
    """The model without quantizers at these layers, and the amax table that goes with it."""
    run = _skipping(judged.run, layers)
    loaded = prepare_model(judged.data.class_names, judged.data.has_named_classes, run=run)
    smaller = equalized(loaded, judged.loaded, judged.draws, run)
    method = run.config.calibration.labelled(best.method)
    method = method.model_copy(update={"label": f"{method.label}_float{len(layers)}"})
    return smaller, carry_amax(model, smaller, best, judged.draws, method, run=run)


def _skipping(run: RunContext, layers: tuple[str, ...]) -> RunContext:
    """The run with more layers in float."""
    quantization = run.config.quantization
    quantization = quantization.model_copy(update={"skip_layers": (*quantization.skip_layers, *layers)})
    return replace(run, config=run.config.model_copy(update={"quantization": quantization}))


def _attempt(
    judged: Judged, first: RunFindings, model: ModelRecord, amax: AmaxRecord, *, kind: AttemptKind, what: str
) -> tuple[Attempt, RunFindings]:
    """Export, evaluate and judge one more candidate."""
    run = judged.run
    # QAT trains weights within their largest |w|, which is then their amax.
    weight_method: WeightMethod = "max" if kind == "qat" else run.config.quantization.weight_method
    template = exported(model, weight_method, run)
    evaluation = evaluate(model, template, amax, judged.baseline, judged.images, run=run)
    selection = select_candidate([evaluation], [amax], judged.baseline, run=run)
    selection = replace(selection, spreads=(*first.selection.spreads, *selection.spreads))
    findings = judge(judged, model, template, (*first.tables, amax), (*first.candidates, evaluation), selection)
    return Attempt(kind, what, evaluation.candidate, selection.comparison, findings.decision), findings
