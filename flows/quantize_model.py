"""One checkpoint in, one gated and published INT8 model out: the main flow."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prefect import flow, runtime, unmapped
from prefect.logging import get_run_logger

from ptq.config import Dialect, EngineConfig, Precision, PtqConfig
from ptq.records.base import ArtifactRef, digest
from ptq.records.benchmark import PublishedLatency
from ptq.records.calibration import AmaxRecord, CalibrationDraws, StatisticsRecord
from ptq.records.data import DataRecord, PreparedImages
from ptq.records.decision import Attempt, AttemptKind, Publication, RunFindings, RunResult
from ptq.records.evaluation import EvaluationRecord, Selection
from ptq.records.graph import EngineIdentity
from ptq.records.plan import ModelRecord
from tasks.runtime.runners import StageRunner, spread_stages
from tasks.runtime.stage import RunContext
from tasks.service.model_lock import model_lock
from tasks.stages.amax import compute_amax
from tasks.stages.benchmark import benchmark
from tasks.stages.calibration import collect_shard, collect_statistics, correct_biases, merge_statistics
from tasks.stages.data import draw_calibration_images, index_images, prepare_split
from tasks.stages.engine import build_engine, list_precisions, resolve_engine
from tasks.stages.evaluation import evaluate, evaluate_baseline, evaluate_published, select_candidate
from tasks.stages.export import export_qdq, write_graph
from tasks.stages.fallback import (
    carry_amax,
    choose_methods,
    fine_tune,
    is_worth_trying,
    rank_layers,
    summarize_attempts,
)
from tasks.stages.graph_checks import validate_graph
from tasks.stages.model import equalize_channels, prepare_model
from tasks.stages.publication import check_destinations, decide, publish, write_report
from tasks.stages.versus_published import (
    benchmark_published,
    compare_with_published,
    decide_on_published,
    find_published,
)


@dataclass(frozen=True, slots=True)
class _Setting:
    """What every candidate of a run is judged with."""

    config: PtqConfig
    run: RunContext
    identity: EngineIdentity
    engine: EngineConfig
    dialects: tuple[Dialect, ...]
    precisions: Sequence[Precision]
    data: DataRecord
    loaded: ModelRecord
    draws: CalibrationDraws
    images: dict[str, PreparedImages]
    selection_split: str
    fp32_onnx: ArtifactRef
    baseline: EvaluationRecord


# One thread: each evaluation uses every core, and two at once would only share them.
@flow(name="quantize-model", task_runner=StageRunner(threads=1))
def quantize_model(config: PtqConfig) -> RunResult:
    """Turn one FP32 classifier into a gated, published INT8 model, while no other run does it for the same model.

    1. index, draw and decode images   2. load the checkpoint, replace modules, equalize channels
    3. collect statistics
    4. compute amax per trial and method   5. export the Q/DQ graph   6. evaluate every candidate on the engine
    7. select   8. judge: validate the graphs, build engines, benchmark, gate   9. if accuracy alone was rejected, try
    what is configured and judge it   10. compare with the version in service   11. publish   12. report
    """
    get_run_logger().info("Config %s: %s", digest(config)[:12], config.model_dump_json())
    check_destinations(config)
    with model_lock(config.model.published_name, config.output.store) as waited_s:
        return replace(_quantize_model(config), waited_s=round(waited_s, 1))


def _quantize_model(config: PtqConfig) -> RunResult:
    """The stages, in order."""
    run = RunContext(store_uri=config.output.store, run_id=runtime.flow_run.name)
    identity = resolve_engine(config.engine)
    spread_stages(config, identity)
    precisions = list_precisions(config.engine, identity)
    engine = config.engine.model_copy(update={"name": identity.name})
    data_config, preprocessing, calibration = config.data, config.data.preprocessing, config.calibration
    normalization = preprocessing.normalization
    dialects = config.quantization.dialects_for(identity.name)

    data = index_images(
        data_config.path, calibration_split=data_config.calibration_split, selection_split=data_config.selection_split,
        test_split=data_config.test_split, run=run,
    )  # fmt: skip
    has_selection = any(split.split == data_config.selection_split for split in data.splits)
    selection_split = data_config.selection_split if has_selection else data_config.test_split
    splits = tuple(dict.fromkeys((selection_split, data_config.test_split)))
    loaded = prepare_model(
        config.model, config.quantization.placement, class_names=data.class_names,
        has_named_classes=data.has_named_classes, input_shape=_input_shape(config), run=run,
    )  # fmt: skip
    draws = draw_calibration_images(
        data, preprocessing.decoding, images=calibration.images, trials=calibration.trials, seed=calibration.seed,
        is_ordered=calibration.tolerance_percent > 0, split=data_config.calibration_split, evaluated_splits=splits,
        run=run,
    )  # fmt: skip
    model = _equalized(config, loaded, loaded, draws, run)
    images = {split: prepare_split(data, split, preprocessing.decoding, run=run) for split in splits}

    statistics = _statistics(config, model, draws, identity, dialects[0], run)
    draws = statistics.draws
    template = export_qdq(model, weight_method=config.quantization.weight_method, run=run)
    biases = [
        correct_biases(statistics.channel_means, model, template, trial, run=run)
        if config.quantization.bias_correction
        else None
        for trial in range(calibration.trials)
    ]
    pairs = [(trial, method) for method in calibration.labelled_methods for trial in range(calibration.trials)]
    tables = compute_amax.map(
        unmapped(statistics.histograms), unmapped(model), [trial for trial, _ in pairs],
        [method for _, method in pairs], [biases[trial] for trial, _ in pairs], dialect=dialects[0], run=unmapped(run),
    ).result()  # fmt: skip

    baseline = evaluate_baseline(
        model.fp32_onnx, images, normalization, engine=_float_engine(engine), identity=identity, run=run
    )  # fmt: skip
    distinct = {table.identity: table for table in reversed(tables)}
    candidates = evaluate.map(
        unmapped(model), unmapped(template), list(reversed(distinct.values())), unmapped(baseline), unmapped(images),
        unmapped(normalization), engine=unmapped(engine), identity=unmapped(identity), dialect=dialects[0],
        run=unmapped(run),
    ).result()  # fmt: skip
    selection = select_candidate(
        candidates, tables, baseline, selection_split=selection_split, test_split=data_config.test_split, run=run
    )

    setting = _Setting(
        config, run, identity, engine, dialects, precisions, data, loaded, draws, images, selection_split,
        model.fp32_onnx, baseline,
    )  # fmt: skip
    findings = _judge(setting, model, template, tables, candidates, selection)
    if is_worth_trying(findings, config.fallback, config.gate):
        findings = _fall_back(setting, findings)
    if findings.decision.accepted:
        findings = _compare_with_published(setting, findings)
    if findings.decision.accepted:
        findings = replace(findings, publication=publish(findings, config, run=run))
    return write_report(config, findings, run=run)


def _equalized(
    config: PtqConfig, model: ModelRecord, reference: ModelRecord, draws: CalibrationDraws, run: RunContext
) -> ModelRecord:
    if not config.quantization.equalization:
        return model
    normalization, threads = config.data.preprocessing.normalization, config.engine.threads
    return equalize_channels(model, reference, draws, normalization, threads=threads, run=run)


def _statistics(
    config: PtqConfig,
    model: ModelRecord,
    draws: CalibrationDraws,
    identity: EngineIdentity,
    dialect: Dialect,
    run: RunContext,
) -> StatisticsRecord:
    """Collect over the drawn images in one piece, or in shards where there are workers and no draw stops early."""
    normalization, calibration = config.data.preprocessing.normalization, config.calibration
    threads, device = config.engine.threads, "cuda" if identity.name == "tensorrt" else ""
    if config.runner.name == "threads" or calibration.tolerance_percent:
        return collect_statistics(
            model, draws, normalization, bins=calibration.bins, stopping=calibration.stopping_rule(dialect),
            threads=threads, device=device, run=run,
        )  # fmt: skip
    shards = min(config.runner.shards, draws.prepared.images)
    parts = collect_shard.map(
        unmapped(model), unmapped(draws), unmapped(normalization), range(shards), shards=shards, bins=calibration.bins,
        threads=threads, device=device, run=unmapped(run),
    ).result()  # fmt: skip
    return merge_statistics(parts, model, draws, run=run)


def _float_engine(engine: EngineConfig) -> EngineConfig:
    """The engine for a float graph, to which the remainder of INT8 graphs means nothing."""
    return engine.model_copy(update={"float_remainder": "fp32"})


def _input_shape(config: PtqConfig) -> tuple[int, int, int]:
    preprocessing = config.data.preprocessing
    return preprocessing.channels, preprocessing.crop, preprocessing.crop


def _table_of(selection: Selection, tables: Sequence[AmaxRecord]) -> AmaxRecord:
    return next(table for table in tables if (table.method, table.trial) == (selection.method, selection.trial))


def _judge(
    setting: _Setting,
    model: ModelRecord,
    template: ArtifactRef,
    tables: Sequence[AmaxRecord],
    candidates: Sequence[EvaluationRecord],
    selection: Selection,
) -> RunFindings:
    """Write the graphs of the selected candidate, validate them, build engines, benchmark them and decide."""
    config, run, threads = setting.config, setting.run, setting.config.engine.threads
    remainder = config.engine.float_remainder
    best = _table_of(selection, tables)
    graphs = [
        write_graph(model, template, best, dialect=dialect, name=f"{dialect}.onnx", run=run)
        for dialect in setting.dialects
    ]
    checks = [validate_graph(model, graph, run=run) for graph in graphs]
    engines = [
        build_engine(
            graphs[0].onnx if precision == "int8" else setting.fp32_onnx, precision, batch_size,
            threads=threads, float_remainder=remainder if precision == "int8" else "fp32", identity=setting.identity,
            run=run,
        )
        for batch_size in config.benchmark.batch_sizes
        for precision in setting.precisions
    ]  # fmt: skip
    measured = benchmark(
        engines, config.benchmark, threads=threads, float_remainder=remainder, input_shape=model.input_shape, run=run
    )
    return RunFindings(
        model=model, data=setting.data, draws=setting.draws, tables=tuple(tables), baseline=setting.baseline,
        candidates=tuple(candidates), selection=selection, graphs=tuple(graphs), checks=tuple(checks),
        engines=tuple(engines), benchmark=measured,
        decision=decide(selection, measured, checks, config.gate, run=run),
        publication=Publication(published=False, model=config.model.published_name, version="", replaced=""),
    )  # fmt: skip


def _compare_with_published(setting: _Setting, findings: RunFindings) -> RunFindings:
    """Compare an accepted model with the version that it would replace, on the same images and in turns."""
    config, run, threads = setting.config, setting.run, setting.config.engine.threads
    remainder, test = config.engine.float_remainder, config.data.test_split
    model, selection = findings.model, findings.selection
    published = find_published(config.model.published_name, model, findings.graphs[0], run=run)
    if published is None:
        return findings
    evaluations: dict[Literal["new", "published"], EvaluationRecord] = {}
    latencies: Sequence[PublishedLatency] = ()
    if published.onnx is not None:
        evaluations["new"] = next(item for item in findings.candidates if item.candidate == selection.candidate)
        evaluations["published"] = evaluate_published(
            published.onnx, setting.baseline, {test: setting.images[test]}, config.data.preprocessing.normalization,
            engine=setting.engine, identity=setting.identity, run=run,
        )  # fmt: skip
        new = [engine for engine in findings.engines if engine.precision == "int8"]
        old = [
            build_engine(
                published.onnx, "int8", engine.batch_size, threads=threads, float_remainder=remainder,
                identity=setting.identity, run=run,
            )
            for engine in new
        ]  # fmt: skip
        latencies = benchmark_published(
            new, old, config.benchmark, threads=threads, float_remainder=remainder, input_shape=model.input_shape,
            run=run,
        )  # fmt: skip
    best = next(
        table for table in findings.tables if (table.method, table.trial) == (selection.method, selection.trial)
    )
    comparison = compare_with_published(published, best, evaluations, latencies, config.gate, test_split=test, run=run)
    decision = decide_on_published(
        findings.decision, comparison, publish_inconclusive=config.gate.publish_inconclusive, run=run
    )
    return replace(findings, decision=decision, versus_published=comparison)


def _fall_back(setting: _Setting, first: RunFindings) -> RunFindings:
    """Try what is configured until something is accepted; the first findings stay where nothing is."""
    attempts: list[Attempt] = []
    found = first
    for attempt, findings in _attempts(setting, first):
        attempts.append(attempt)
        if attempt.decision.accepted:
            found = findings
            break
    decision = summarize_attempts(first.decision, first.selection.candidate, attempts, run=setting.run)
    return replace(found, decision=decision, attempts=tuple(attempts))


def _attempts(setting: _Setting, first: RunFindings) -> Iterator[tuple[Attempt, RunFindings]]:
    """Yield each configured attempt with its findings, in order: method per layer, layers left in float, QAT."""
    config, run, draws, fallback = setting.config, setting.run, setting.draws, setting.config.fallback
    normalization, threads, dialect = (
        config.data.preprocessing.normalization,
        config.engine.threads,
        setting.dialects[0],
    )
    of_trial = [table for table in first.tables if table.trial == first.selection.trial]
    best = next(table for table in of_trial if table.method == first.selection.method)
    if fallback.per_layer_method:
        chosen = choose_methods(
            first.model, of_trial, draws, normalization, images=fallback.images, dialect=dialect,
            weight_method=config.quantization.weight_method, threads=threads, run=run,
        )  # fmt: skip
        yield _attempt(setting, first, first.model, chosen.amax, kind="per_layer_method", what=chosen.what)
    if fallback.float_layers:
        ranking = rank_layers(
            first.model, best, draws, normalization, images=fallback.images, limit=fallback.float_layers,
            dialect=dialect, weight_method=config.quantization.weight_method, threads=threads, run=run,
        )  # fmt: skip
        for group in ranking.groups:
            skipped = (*config.quantization.skip_layers, *group.layers)
            quantization = config.quantization.model_copy(update={"skip_layers": skipped})
            model = prepare_model(
                config.model, quantization.placement, class_names=setting.data.class_names,
                has_named_classes=setting.data.has_named_classes, input_shape=first.model.input_shape, run=run,
            )  # fmt: skip
            model = _equalized(config, model, setting.loaded, draws, run)
            amax = carry_amax(
                first.model, model, best, draws, normalization, method=config.calibration.labelled(best.method),
                bins=config.calibration.bins, label=f"float{len(group.layers)}", dialect=dialect, threads=threads,
                run=run,
            )  # fmt: skip
            yield _attempt(setting, first, model, amax, kind="float_layers", what=group.what)
    if fallback.qat_epochs:
        tuned = fine_tune(
            first.model, best, draws, normalization, epochs=fallback.qat_epochs,
            learning_rate=fallback.qat_learning_rate, seed=config.calibration.seed, dialect=dialect, threads=threads,
            run=run,
        )  # fmt: skip
        # Corrected biases belong to the weights they were computed from; training has changed both.
        amax = replace(best, method=f"{best.method}_qat", biases=None)
        yield _attempt(setting, first, tuned.model, amax, kind="qat", what=tuned.what)


def _attempt(
    setting: _Setting, first: RunFindings, model: ModelRecord, amax: AmaxRecord, *, kind: AttemptKind, what: str
) -> tuple[Attempt, RunFindings]:
    """Export, evaluate and judge one more candidate."""
    config, run = setting.config, setting.run
    # QAT trains weights within their largest |w|, which is then their amax.
    weight_method = "max" if kind == "qat" else config.quantization.weight_method
    template = export_qdq(model, weight_method=weight_method, run=run)
    evaluation = evaluate(
        model, template, amax, setting.baseline, setting.images, config.data.preprocessing.normalization,
        engine=setting.engine,
        identity=setting.identity, dialect=setting.dialects[0], run=run,
    )  # fmt: skip
    selection = select_candidate(
        [evaluation], [amax], setting.baseline, selection_split=setting.selection_split,
        test_split=config.data.test_split, run=run,
    )  # fmt: skip
    selection = replace(selection, spreads=(*first.selection.spreads, *selection.spreads))
    findings = _judge(setting, model, template, (*first.tables, amax), (*first.candidates, evaluation), selection)
    return Attempt(kind, what, evaluation.candidate, selection.comparison, findings.decision), findings


if __name__ == "__main__":
    quantize_model(PtqConfig.model_validate_json(Path(sys.argv[1]).read_text()))
