"""The stage that tells whether the engine computes what the INT8 file says."""

from collections.abc import Mapping

import numpy as np
from prefect.logging import get_run_logger

from ptq.data.images import network_input
from ptq.data.sampling import evenly_spaced
from ptq.engines import open_engine
from ptq.evaluation.parity import IMAGES, measure_parity
from ptq.files import arrays_from_npz
from ptq.records.data import PreparedImages
from ptq.records.evaluation import EvaluationRecord
from ptq.records.graph import GraphRecord
from ptq.records.parity import ParityRecord
from tasks.runtime.context import RunContext
from tasks.runtime.stage import stage


@stage(
    returns=ParityRecord,
    timeout_seconds=4 * 3600,
    uses=(
        "config.engine.evaluation_batch_size", "config.engine.float_remainder", "identity", "normalization",
        "selection_split", "threads",
    ),
    machine="shared",
)  # fmt: skip
def compare_with_file(
    graph: GraphRecord,
    evaluation: EvaluationRecord,
    baseline: EvaluationRecord,
    splits: Mapping[str, PreparedImages],
    *,
    run: RunContext,
) -> ParityRecord:
    """Compare FP32, the INT8 model on the engine and its file in float on images of the selection split."""
    store, split = run.store, run.selection_split
    pixels = np.load(store.get_path(splits[split].pixels), mmap_mode="r", allow_pickle=False)
    # A split is in the order of the data: class after class.
    chosen = evenly_spaced(range(len(pixels)), count=IMAGES)
    fp32, int8 = (arrays_from_npz(store.get_path(each.logits))[split][chosen] for each in (baseline, evaluation))
    found = measure_parity(
        store.get_path(graph.onnx),
        network_input(pixels[chosen], mean=run.normalization.mean, std=run.normalization.std),
        fp32_logits=fp32,
        engine_logits=int8,
        engine=open_engine(run.identity.name, threads=run.threads),
        threads=run.threads,
        batch_size=min(run.config.engine.evaluation_batch_size, len(chosen)),
        float_remainder=run.config.engine.float_remainder,
    )
    log = get_run_logger().info if found.parting is None else get_run_logger().warning
    log("SQNR on the engine %.1f dB, of the file in float %.1f dB", found.engine.sqnr_db, found.file.sqnr_db)
    return found
