"""Does an engine compute what the INT8 file says?"""

from dataclasses import dataclass
from typing import Literal

# The engine is to blame for the first three, and the file for the others.
Cause = Literal["saturation", "float", "fusion", "scale", "zero point", "axis", "weight", "bias", "placement"]


@dataclass(frozen=True, slots=True)
class Likeness:
    """Logits of two models on the same images: SQNR in dB, and the share of images with the same top-1."""

    sqnr_db: float
    agreement_percent: float


@dataclass(frozen=True, slots=True)
class Parting:
    """The first layer at which engine and file, or file and what was decided, part, and why.

    `layer` is empty where none could be found. `in_file` says that the file is not what was decided.
    """

    layer: str
    cause: Cause
    sentence: str
    in_file: bool = False


@dataclass(frozen=True, slots=True)
class ParityRecord:
    """FP32, the INT8 model on its engine, and the same file with every Q and DQ computed in float, on `images` images.

    The first two likenesses have FP32 as the reference, the last one the file in float. `parting` is None where the
    file holds what was decided and the engine does what the file says.
    """

    images: int
    engine: Likeness
    file: Likeness
    engine_to_file: Likeness
    parting: Parting | None
