"""The stage that checks a Q/DQ graph."""

from dataclasses import replace

from prefect.logging import get_run_logger

from ptq.checks.run import check_graph
from ptq.quantization.prepared import plan_from_file
from ptq.records.graph import GraphChecks, GraphRecord
from ptq.records.plan import ModelRecord
from tasks.runtime.context import StageContext
from tasks.runtime.stage import stage


@stage(returns=GraphChecks, timeout_seconds=600, run_name="validate_graph-{graph.dialect}")
def validate_graph(model: ModelRecord, graph: GraphRecord, *, run: StageContext) -> GraphChecks:
    """Check coverage, scales, placement and interface of a Q/DQ graph."""
    store = run.store
    plan = plan_from_file(store.get_path(model.plan))
    checks = check_graph(
        store.get_path(graph.onnx),
        dialect=graph.dialect,
        allowed_float_layers=(*plan.float_layers, *plan.float_operators),
        input_shape=model.input_shape,
        num_classes=model.num_classes,
    )
    get_run_logger().info("%d checks: %d errors, %d warnings", len(checks.checks_run), checks.errors, checks.warnings)
    # In the store a file is named by its digest; a person wants the name it was written under.
    return replace(checks, graph=graph.onnx.name)
