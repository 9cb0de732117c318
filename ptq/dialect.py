"""What does a dialect of Q/DQ graphs ask of a quantizer?

Rules that need nothing but a plan, so that whoever takes a maximum loads no framework.
"""

import numpy as np
from numpy.typing import NDArray

from ptq.config import Dialect
from ptq.records.plan import PlacementPlan, QuantizerSpec


def is_unsigned(spec: QuantizerSpec, dialect: Dialect) -> bool:
    """Whether a quantizer uses uint8: in the dialects of CPUs, where the tensor is never negative."""
    return dialect != "tensorrt" and spec.kind == "activation" and spec.never_negative


def amax_bound(spec: QuantizerSpec, dialect: Dialect) -> int:
    """Returns the integer that amax maps to: 255 for uint8, 127 for int8. The scale is amax / bound."""
    return 255 if is_unsigned(spec, dialect) else 127


def zero_point_of(spec: QuantizerSpec, dialect: Dialect) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Returns the zero point of an activation quantizer, of the type that its integers have.

    Operators of ONNX Runtime read and write one type, so that its signed tensors are uint8 around 128.
    """
    if is_unsigned(spec, dialect):
        return np.zeros((), np.uint8)
    return np.full((), 128, np.uint8) if dialect == "onnxruntime" else np.zeros((), np.int8)


def observed_names(plan: PlacementPlan) -> tuple[str, ...]:
    """Returns the names of the activation quantizers, in the order in which their tensors are returned."""
    return tuple(spec.name for spec in plan.activations)
