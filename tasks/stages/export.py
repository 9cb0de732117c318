"""Stages that export the Q/DQ graph once and write candidates from it."""

import json
import tempfile
from pathlib import Path

from prefect.logging import get_run_logger

from ptq.config import Dialect, WeightMethod
from ptq.files import arrays_from_npz
from ptq.graph import pair_sums
from ptq.graph.candidate import write_candidate
from ptq.graph.insertion import write_qdq_template
from ptq.networks.network import NetworkKind, network_from_weights
from ptq.quantization.prepare_torch import write_template
from ptq.quantization.prepared import plan_from_file
from ptq.quantization.same_function import require_same_function
from ptq.records.base import ArtifactRef
from ptq.records.calibration import AmaxRecord
from ptq.records.graph import GraphRecord
from ptq.records.plan import ModelRecord
from tasks.runtime.context import RunContext, StageContext
from tasks.runtime.stage import stage


@stage(returns=ArtifactRef, timeout_seconds=1800)
def export_qdq(model: ModelRecord, weight_method: WeightMethod, *, run: StageContext) -> ArtifactRef:
    """Write the Q/DQ template of every candidate: the fake-quantized model, or an ONNX file's graph with pairs."""
    store = run.store
    weights, plan = store.get_path(model.weights), plan_from_file(store.get_path(model.plan))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "template.onnx"
        if model.source == "onnx":
            write_qdq_template(weights, path, plan=plan, weight_method=weight_method)
        else:
            write_template(
                path,
                weights=weights,
                plan=plan,
                name=model.name,
                num_classes=model.num_classes,
                input_shape=model.input_shape,
                weight_method=weight_method,
            )
        if not model.is_trained:
            kind = NetworkKind(model.name, model.num_classes, model.input_shape)
            network = weights if model.source == "onnx" else network_from_weights(weights, kind).original
            require_same_function(path, network, input_shape=model.input_shape)
        template = store.put_file(path)
    get_run_logger().info("Exported the Q/DQ template, %d bytes", template.size_bytes)
    return template


@stage(returns=ArtifactRef, timeout_seconds=600, uses=("cpu_runtimes",))
def limit_pair_sums(template: ArtifactRef, model: ModelRecord, *, run: RunContext) -> ArtifactRef:
    """Write the template with weight scales at which no processor without VNNI saturates."""
    store = run.store
    plan = plan_from_file(store.get_path(model.plan))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "template.onnx"
        found = pair_sums.limit_pair_sums(store.get_path(template), path, plan=plan, runtimes=run.cpu_runtimes)
        get_run_logger().info(
            "Right on every CPU: %d of %d weight scales in %d layers grew, by up to %.2f",
            found.grown,
            found.scales,
            found.layers,
            found.largest_factor,
        )
        return store.put_file(path)


@stage(returns=GraphRecord, timeout_seconds=600, run_name="write_graph-{dialect}")
def write_graph(
    model: ModelRecord, template: ArtifactRef, amax: AmaxRecord, dialect: Dialect, *, run: StageContext
) -> GraphRecord:
    """Write the Q/DQ graph of one amax table in one dialect, under the dialect's name."""
    store = run.store
    plan = plan_from_file(store.get_path(model.plan))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{dialect}.onnx"
        write_candidate(
            store.get_path(template),
            path,
            plan=plan,
            dialect=dialect,
            activation_amax=json.loads(store.get_bytes(amax.table)),
            biases=arrays_from_npz(store.get_path(amax.biases)) if amax.biases else None,
            metadata={"checkpoint_sha256": model.checkpoint_sha256, "method": amax.method, "trial": str(amax.trial)},
        )
        return GraphRecord(
            onnx=store.put_file(path), dialect=dialect, quantizers=len(plan.of_dialect(dialect).quantizers)
        )
