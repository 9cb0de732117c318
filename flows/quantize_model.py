"""One checkpoint in, one gated and published INT8 model out: the main flow."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefect import flow, runtime, unmapped
from prefect.logging import get_run_logger

from flows.fallback_attempts import fall_back
from flows.judging import Judged, compare_with_version_in_service, equalized, exported, judge
from ptq.config import PtqConfig
from ptq.records.base import ArtifactRef, digest
from ptq.records.calibration import AmaxRecord, CalibrationDraws, StatisticsRecord
from ptq.records.data import DataRecord
from ptq.records.decision import RunResult
from ptq.records.evaluation import EvaluationRecord
from ptq.records.plan import ModelRecord
from tasks.runtime.context import RunContext
from tasks.runtime.runners import StageRunner, spread_stages
from tasks.service.model_lock import model_lock
from tasks.stages.amax import compute_amax
from tasks.stages.calibration import collect_shard, collect_statistics, correct_biases, merge_statistics
from tasks.stages.data import draw_calibration_images, index_images, prepare_split
from tasks.stages.engine import list_precisions, resolve_engine
from tasks.stages.evaluation import check_fp32_accuracy, evaluate, evaluate_baseline, select_candidate
from tasks.stages.fallback import is_worth_trying
from tasks.stages.model import check_coverage, prepare_model, take_own_preprocessing
from tasks.stages.publication import check_destinations, publish, write_report


# One thread: each evaluation uses every core, and two at once would only share them.
@flow(name="quantize-model", task_runner=StageRunner(threads=1))
def quantize_model(config: PtqConfig) -> RunResult:
    """Turn one FP32 classifier into a gated, published INT8 model, while no other run does it for the same model.

    1. index, draw and decode images   2. load the checkpoint, place quantizers, equalize channels
    3. collect statistics
    4. compute amax per trial and method   5. export the Q/DQ graph   6. evaluate every candidate on the engine
    7. select   8. judge: validate the graphs, build engines, benchmark, gate   9. if accuracy alone was rejected, try
    what is configured and judge it   10. compare with the version in service   11. publish   12. report
    """
    data, stated_percent = take_own_preprocessing(config.model, config.data, config.output.store)
    config = config.model_copy(update={"data": data})
    get_run_logger().info("Config %s: %s", digest(config)[:12], config.model_dump_json())
    check_destinations(config)
    with model_lock(config.model.published_name, config.output.store) as waited_s:
        return replace(_quantize_model(config, stated_percent), waited_s=round(waited_s, 1))


def _quantize_model(config: PtqConfig, stated_percent: float | None) -> RunResult:
    """The stages, in order; `stated_percent` is the top-1 that is stated for the FP32 weights."""
    run = _context(config)
    data = index_images(config.data.path, config.data.splits, run=run)
    run = replace(run, selection_split=_selection_split(config, data))
    loaded = prepare_model(data.class_names, data.has_named_classes, run=run)
    check_coverage(loaded, run)
    draws = draw_calibration_images(data, run=run)
    model = equalized(loaded, loaded, draws, run)
    images = {split: prepare_split(data, split, run.decoding, run=run) for split in run.evaluated_splits}

    statistics = _statistics(model, draws, run)
    template = exported(model, config.quantization.weight_method, run)
    tables = _amax_tables(statistics, model, template, run)
    baseline = evaluate_baseline(model.fp32_onnx, images, run=run)
    check_fp32_accuracy(baseline, model, stated_percent, run)
    judged = Judged(run, data, loaded, statistics.draws, images, baseline)
    candidates = _evaluations(judged, model, template, tables)
    selection = select_candidate(candidates, tables, baseline, run=run)

    findings = judge(judged, model, template, tables, candidates, selection)
    if is_worth_trying(findings, loaded, run):
        findings = fall_back(judged, findings)
    if findings.decision.accepted:
        findings = compare_with_version_in_service(judged, findings)
    if findings.decision.accepted:
        findings = replace(findings, publication=publish(findings, run=run))
    return write_report(findings, run=run)


def _context(config: PtqConfig) -> RunContext:
    """Settings and engine of this run, whose mapped stages go where the config says from here on."""
    identity = resolve_engine(config.engine)
    spread_stages(config, identity)
    precisions = tuple(list_precisions(config.engine, identity))
    return RunContext(config.output.store, runtime.flow_run.name, config, identity, precisions)


def _selection_split(config: PtqConfig, data: DataRecord) -> str:
    has_selection = any(split.split == config.data.selection_split for split in data.splits)
    return config.data.selection_split if has_selection else config.data.test_split


def _statistics(model: ModelRecord, draws: CalibrationDraws, run: RunContext) -> StatisticsRecord:
    """Collect over the drawn images in one piece, or in shards where there are workers and no draw stops early."""
    config = run.config
    if config.runner.name == "threads" or config.calibration.is_adaptive:
        return collect_statistics(model, draws, run=run)
    shards = min(config.runner.shards, draws.prepared.images)
    parts = collect_shard.map(unmapped(model), unmapped(draws), range(shards), shards, run=unmapped(run)).result()
    return merge_statistics(parts, model, draws, run=run)


def _amax_tables(
    statistics: StatisticsRecord, model: ModelRecord, template: ArtifactRef, run: RunContext
) -> list[AmaxRecord]:
    """One amax table per trial and method."""
    trials, methods = range(run.config.calibration.trials), run.config.calibration.labelled_methods
    biases = [
        correct_biases(statistics.channel_means, model, template, trial, run=run)
        if run.config.quantization.bias_correction
        else None
        for trial in trials
    ]
    pairs = [(trial, method) for method in methods for trial in trials]
    of_pairs = [trial for trial, _ in pairs], [method for _, method in pairs], [biases[trial] for trial, _ in pairs]
    histograms = unmapped(statistics.histograms)
    return compute_amax.map(histograms, unmapped(model), *of_pairs, run=unmapped(run)).result()


def _evaluations(
    judged: Judged, model: ModelRecord, template: ArtifactRef, tables: Sequence[AmaxRecord]
) -> list[EvaluationRecord]:
    """One evaluation per distinct amax table."""
    distinct = {table.identity: table for table in reversed(tables)}
    found = list(reversed(distinct.values()))
    same = unmapped(judged.baseline), unmapped(judged.images)
    return evaluate.map(unmapped(model), unmapped(template), found, *same, run=unmapped(judged.run)).result()


if __name__ == "__main__":
    quantize_model(PtqConfig.model_validate_json(Path(sys.argv[1]).read_text()))
