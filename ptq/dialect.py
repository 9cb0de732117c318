"""What does a dialect of Q/DQ graphs ask of a quantizer?

Rules that need nothing but a plan, so that whoever takes a maximum loads no framework.
"""

from ptq.config import Dialect
from ptq.records.plan import PlacementPlan, QuantizerSpec


def is_unsigned(spec: QuantizerSpec, dialect: Dialect) -> bool:
    """Whether a quantizer uses uint8: in the cpu dialect, where the tensor is never negative."""
    return dialect == "cpu" and spec.kind == "activation" and spec.never_negative


def amax_bound(spec: QuantizerSpec, dialect: Dialect) -> int:
    """Returns the integer that amax maps to: 255 for uint8, 127 for int8. The scale is amax / bound."""
    return 255 if is_unsigned(spec, dialect) else 127


def observed_names(plan: PlacementPlan) -> tuple[str, ...]:
    """Returns the names of the activation quantizers, in the order in which their tensors are returned."""
    return tuple(spec.name for spec in plan.activations)
