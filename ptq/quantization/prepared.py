"""What do later stages get of a prepared network?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ptq.records.base import record_from_json
from ptq.records.plan import Coverage, PlacementPlan


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """The files of a loaded checkpoint, by the record's field names, and what they are.

    `source` is what is quantized: a PyTorch network, or an ONNX file or export.
    """

    checkpoint_sha256: str
    files: Mapping[str, Path]
    num_classes: int
    plan: PlacementPlan
    warnings: tuple[str, ...]
    coverage: Coverage
    source: Literal["torch", "onnx"]


def plan_from_file(path: Path) -> PlacementPlan:
    """Returns the placement plan that `prepare_model` wrote."""
    return record_from_json(PlacementPlan, json.loads(path.read_text()))
