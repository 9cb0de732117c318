"""Stages that resolve the engine and build graphs for it."""

from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ptq.config import EngineConfig, Precision
from ptq.engines import int8_share, open_engine
from ptq.engines.isa import play_isa
from ptq.records.base import ArtifactRef, digest
from ptq.records.graph import EngineIdentity, EngineRecord
from ptq.wording import engine_text
from tasks.runtime.context import RunContext
from tasks.runtime.stage import stage


@task(timeout_seconds=120, cache_policy=NO_CACHE)
def resolve_engine(engine: EngineConfig) -> EngineIdentity:
    """Find out which engine, version and device this machine has."""
    if engine.isa not in ("portable", "native"):
        play_isa(engine.isa, engine=engine.name)
    identity = open_engine(engine.name, threads=engine.threads).identity()
    described = engine_text(identity.name, identity.version, identity.device, identity.isa)
    get_run_logger().info("Engine %s", described)
    return identity


@task(timeout_seconds=120, cache_policy=NO_CACHE)
def list_precisions(engine: EngineConfig, identity: EngineIdentity) -> list[Precision]:
    """List the precisions the engine really runs on this device."""
    return list(open_engine(identity.name, threads=engine.threads).precisions())


@stage(
    returns=EngineRecord,
    timeout_seconds=3600,
    uses=("identity", "threads"),
    run_name="build_engine-{precision}-{batch_size}",
)
def build_engine(
    graph: ArtifactRef,
    precision: Precision,
    batch_size: int,
    float_remainder: Literal["fp32", "bf16"],
    *,
    run: RunContext,
) -> EngineRecord:
    """Build a graph for the engine and record what each layer runs in.

    `float_remainder` is the precision of what stays in float in an INT8 graph. The timing cache is no input of the
    stage: it makes the same build quicker.
    """
    store, machine = run.store, digest(run.identity)
    engine = open_engine(run.identity.name, threads=run.threads, timing_cache=store.recall("timing_cache", machine))
    built = engine.build(
        store.get_path(graph), precision=precision, batch_size=batch_size, float_remainder=float_remainder
    )
    if built.timing_cache:
        store.remember("timing_cache", machine, built.timing_cache)
    share = int8_share(built.layers)
    get_run_logger().info(
        "Built %s at batch %d in %.1f s: %.0f %% of %d layers read INT8, %.0f %% write it",
        precision,
        batch_size,
        built.build_s,
        share.int8_input_percent,
        share.layers,
        share.int8_output_percent,
    )
    return EngineRecord(
        engine=run.identity,
        precision=precision,
        batch_size=batch_size,
        onnx_sha256=graph.sha256,
        blob=store.put_bytes(built.blob, f"model_{precision}_batch{batch_size}.engine"),
        int8=share,
        build_s=built.build_s,
        build_settings=built.settings,
    )
