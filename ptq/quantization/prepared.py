"""What do later stages get of a prepared network?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

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


def output_note(fp32: Path) -> str:
    """Returns what a person should know of what an FP32 graph ends in; empty where it returns logits."""
    graph = onnx.load(fp32).graph
    (last,) = [node for node in graph.node if graph.output[0].name in node.output]
    if last.op_type not in ("Softmax", "Sigmoid"):
        return ""
    return (
        f"The model ends in a {last.op_type}, which stays in float: its outputs are probabilities, and the loss is "
        "computed from them as if they were logits."
    )


def plan_from_file(path: Path) -> PlacementPlan:
    """Returns the placement plan that `prepare_model` wrote."""
    return record_from_json(PlacementPlan, json.loads(path.read_text()))
