"""The stage that chooses amax: one task per trial and method."""

import json

from ptq.calibration.amax_tables import amax_table
from ptq.config import LabelledMethod
from ptq.numerics.histogram import trials_from_bytes
from ptq.quantization.prepared import plan_from_file
from ptq.records.base import ArtifactRef
from ptq.records.calibration import AmaxRecord
from ptq.records.plan import ModelRecord
from tasks.runtime.context import RunContext
from tasks.runtime.stage import stage


@stage(returns=AmaxRecord, timeout_seconds=None, uses=("dialect",), run_name="compute_amax-{method.label}-{trial}")
def compute_amax(
    histograms: ArtifactRef,
    model: ModelRecord,
    trial: int,
    method: LabelledMethod,
    biases: ArtifactRef | None = None,
    *,
    run: RunContext,
) -> AmaxRecord:
    """Compute the amax of every activation quantizer for one trial by one method; biases go with the candidate."""
    trials = trials_from_bytes(run.store.get_bytes(histograms))
    table = amax_table(
        trials[trial],
        plan=plan_from_file(run.store.get_path(model.plan)),
        dialect=run.dialect,
        method=method.method,
        percentile=method.percentile,
    )
    data = json.dumps(table, indent=1, sort_keys=True).encode()
    return AmaxRecord(trial=trial, method=method.label, table=run.store.put_bytes(data, "amax.json"), biases=biases)
