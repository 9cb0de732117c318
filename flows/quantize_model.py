"""One checkpoint in, one gated and published INT8 model out: the main flow."""

import sys
from pathlib import Path

from prefect import flow, runtime, unmapped
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from ptq.config import PtqConfig
from ptq.records import Publication, RunFindings, RunResult
from tasks.amax import compute_amax
from tasks.benchmark import benchmark
from tasks.calibration import collect_statistics
from tasks.data import draw_calibration_images, index_images, prepare_split
from tasks.engine import build_engine, list_precisions, resolve_engine
from tasks.evaluation import evaluate, evaluate_baseline, select_candidate
from tasks.export import export_qdq, write_graph
from tasks.modules import replace_modules
from tasks.publication import check_destinations, decide, publish, write_report
from tasks.stage import RunContext, config_digest
from tasks.validation import validate_graph


# One worker: each evaluation uses every core, and two at once would only share them.
@flow(name="quantize-model", task_runner=ThreadPoolTaskRunner(max_workers=1))  # type: ignore[arg-type]
def quantize_model(config: PtqConfig) -> RunResult:
    """Turn one FP32 classifier into a gated, published INT8 model.

    1. index, draw and decode images   2. load the checkpoint, replace modules   3. collect statistics
    4. compute amax per trial and method   5. export the Q/DQ graph   6. evaluate every candidate on the engine
    7. select   8. validate the graphs   9. build engines, benchmark   10. gate   11. publish   12. report
    """
    get_run_logger().info("Config %s: %s", config_digest(config)[:12], config.model_dump_json())
    run = RunContext(store_uri=config.output.store, run_id=runtime.flow_run.name)
    check_destinations(config)
    identity = resolve_engine(config.engine)
    data_config, preprocessing = config.data, config.data.preprocessing
    dialects = config.quantization.dialects_for(identity.name)

    data = index_images(
        data_config.path, calibration_split=data_config.calibration_split, selection_split=data_config.selection_split,
        test_split=data_config.test_split, run=run,
    )  # fmt: skip
    has_selection = any(split.split == data_config.selection_split for split in data.splits)
    selection_split = data_config.selection_split if has_selection else data_config.test_split
    splits = tuple(dict.fromkeys((selection_split, data_config.test_split)))
    input_shape = (preprocessing.channels, preprocessing.crop, preprocessing.crop)
    model = replace_modules(config.model, data, config.quantization, input_shape=input_shape, run=run)
    draws = draw_calibration_images(
        data, config.calibration, preprocessing, split=data_config.calibration_split, evaluated_splits=splits, run=run
    )
    images = {split: prepare_split(data, split, preprocessing, run=run) for split in splits}

    statistics = collect_statistics(
        model, draws, preprocessing, bins=config.calibration.bins, threads=config.engine.threads, run=run
    )
    pairs = [(trial, method) for method in config.calibration.methods for trial in range(config.calibration.trials)]
    tables = compute_amax.map(
        unmapped(statistics), unmapped(model), [trial for trial, _ in pairs], [method for _, method in pairs],
        percentile=config.calibration.percentile, dialect=dialects[0], run=unmapped(run),
    ).result()  # fmt: skip
    template = export_qdq(model, run=run)

    baseline = evaluate_baseline(model, images, preprocessing, engine=config.engine, identity=identity, run=run)
    distinct = {table.table.sha256: table for table in reversed(tables)}
    candidates = evaluate.map(
        unmapped(model), unmapped(template), list(reversed(distinct.values())), unmapped(baseline), unmapped(images),
        unmapped(preprocessing), engine=unmapped(config.engine), identity=unmapped(identity), dialect=dialects[0],
        run=unmapped(run),
    ).result()  # fmt: skip
    selection = select_candidate(
        candidates, tables, baseline, selection_split=selection_split, test_split=data_config.test_split, run=run
    )

    best = next(table for table in tables if (table.method, table.trial) == (selection.method, selection.trial))
    graphs = [
        write_graph(model, template, best, dialect=dialect, name=f"{dialect}.onnx", run=run) for dialect in dialects
    ]
    checks = [validate_graph(model, graph, run=run) for graph in graphs]
    precisions = list_precisions(config.engine, identity)
    engines = [
        build_engine(
            graphs[0].onnx if precision == "int8" else model.fp32_onnx, precision, batch_size,
            threads=config.engine.threads, float_remainder=config.engine.float_remainder, identity=identity, run=run,
        )
        for batch_size in config.benchmark.batch_sizes
        for precision in precisions
    ]  # fmt: skip
    measured = benchmark(
        engines, config.benchmark, threads=config.engine.threads, float_remainder=config.engine.float_remainder,
        input_shape=input_shape, run=run,
    )  # fmt: skip

    decision = decide(selection, measured, checks, config.gate, run=run)
    name = config.model.published_name
    publication = Publication(published=False, model=name, version="", replaced="")
    if decision.accepted:
        publication = publish(model, graphs[0], selection, name=name, config_sha256=config_digest(config), run=run)
    findings = RunFindings(
        model=model, data=data, draws=draws, tables=tuple(tables), baseline=baseline, candidates=tuple(candidates),
        selection=selection, graphs=tuple(graphs), checks=tuple(checks), engines=tuple(engines), benchmark=measured,
        decision=decision, publication=publication,
    )  # fmt: skip
    return write_report(config, findings, run=run)


if __name__ == "__main__":
    quantize_model(PtqConfig.model_validate_json(Path(sys.argv[1]).read_text()))
