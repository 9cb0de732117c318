"""Which amax does every quantizer get by one method?"""

import numpy as np
from jaxtyping import Int

from ptq.config import Dialect, LabelledMethod, Method
from ptq.dialect import amax_bound, observed_names
from ptq.numerics.amax import amax_from_histograms
from ptq.numerics.histogram import Histograms
from ptq.records.plan import PlacementPlan


def bounds(plan: PlacementPlan, dialect: Dialect) -> Int[np.ndarray, " tensors"]:
    """Returns the largest integer of each activation quantizer in that dialect."""
    return np.array([amax_bound(spec, dialect) for spec in plan.activations], dtype=np.int64)


def amax_table(
    histograms: Histograms,
    *,
    plan: PlacementPlan,
    dialect: Dialect,
    method: Method,
    percentile: float | None = None,
) -> dict[str, float]:
    """Returns the amax of every activation quantizer by one method, by name, in activation units.

    `percentile`, in (0, 100], is needed for the method of that name; the others do not read it.

    The `mse` and `entropy` methods count the integers a quantizer has, so a table belongs to a dialect.

    Raises:
        CalibrationError: a quantizer has seen no value, or only zeros.
    """
    names = observed_names(plan)
    asked = LabelledMethod(label=method, method=method, percentile=percentile if method == "percentile" else None)
    found = amax_from_histograms(histograms, methods=[asked], bounds=bounds(plan, dialect), names=names)
    return {name: float(value) for name, value in zip(names, found[method], strict=True)}
