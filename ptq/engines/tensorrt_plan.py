"""What is asked of TensorRT, and what does its inspector say, in each of its generations?

Nothing here imports TensorRT.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from ptq.config import Precision
from ptq.engines.base import CONVOLUTION, LINEAR, REFORMAT
from ptq.errors import EngineBuildError
from ptq.records.graph import LayerReport

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
# First release whose precision flags are deprecated in favour of types in the graph.
_STRONG_TYPING_SINCE = (10, 12)
# The words of both generations of the inspector, the longer before those they contain.
_TYPE_WORDS = (
    ("bf16", r"bfloat16|bf16"),
    ("fp16", r"float16|fp16|half"),
    ("fp8", r"float8|fp8"),
    ("uint8", r"uint8"),
    ("int8", r"int8"),
    ("int32", r"int32"),
    ("int64", r"int64"),
    ("bool", r"bool"),
    ("fp32", r"float|fp32"),
)
_KIND_WORDS = (
    (REFORMAT, r"reformat"),
    (CONVOLUTION, r"conv"),
    (LINEAR, r"gemm|matrix_?multiply|matmul|fully_?connected"),
)


@dataclass(frozen=True, slots=True)
class ApiSurface:
    """What a TensorRT release offers: its version, and the names of two of its enumerations."""

    version: tuple[int, int]
    network_flags: frozenset[str]
    builder_flags: frozenset[str]


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Which flags a build sets and clears, by name. `strongly_typed`: layers take their types from the graph."""

    strongly_typed: bool
    network_flags: tuple[str, ...]
    set_flags: tuple[str, ...]
    cleared_flags: tuple[str, ...]


def build_plan(surface: ApiSurface, *, precision: Precision, weak_typing: bool = False) -> BuildPlan:
    """Returns the flags that make `surface` build a graph in `precision`.

    Args:
        surface: the names that the installed release has.
        precision: fp32, fp16 or int8. INT8 lets FP16 run what is not quantized, else that would run in FP32.
        weak_typing: take types from flags where the release still can, as an FP32 graph needs for FP16 layers.

    Raises:
        EngineBuildError: TensorRT does not run `precision`, or the release has no flag for it.

    TF32 is cleared for FP32, whose baseline then is true FP32, and set otherwise.
    """
    if precision not in PRECISIONS:
        raise EngineBuildError(
            f"precision is {precision}, which this project does not build with TensorRT. It builds "
            f"{', '.join(PRECISIONS)}. Choose one of these."
        )
    can_be_strong = "STRONGLY_TYPED" in surface.network_flags
    always_strong = can_be_strong and "FP16" not in surface.builder_flags
    strong = always_strong or (can_be_strong and surface.version >= _STRONG_TYPING_SINCE and not weak_typing)
    network = ["EXPLICIT_BATCH"] if "EXPLICIT_BATCH" in surface.network_flags and surface.version < (10, 0) else []
    wanted: tuple[str, ...] = ()
    if strong:
        network.append("STRONGLY_TYPED")
    else:
        wanted = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}[precision]
    missing = [flag for flag in wanted if flag not in surface.builder_flags]
    if missing:
        raise EngineBuildError(
            f"TensorRT {surface.version[0]}.{surface.version[1]} has no builder flag {' or '.join(missing)}, and no "
            "strongly typed networks. Expected release 8.6, 10 or 11. Install one of these."
        )
    tf32 = ("TF32",) if "TF32" in surface.builder_flags else ()
    return BuildPlan(
        strongly_typed=strong,
        network_flags=tuple(network),
        set_flags=wanted if precision == "fp32" else (*wanted, *tf32),
        cleared_flags=tf32 if precision == "fp32" else (),
    )


def layers_from_inspector(text: str) -> tuple[LayerReport, ...]:
    """Returns the layers of an engine from its inspector's JSON, of TensorRT 8 and 10 or of 11.

    Before 11 a tensor has one field "Format/Datatype" whose sentence holds the type; from 11 two fields. A layer
    without details, as an engine built with less than detailed verbosity reports it, keeps its name and has empty
    types.

    Raises:
        EngineBuildError: the text is not the inspector's JSON.
    """
    try:
        entries = json.loads(text)["Layers"]
        return tuple(_report_layer(entry) for entry in entries)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineBuildError(
            f"TensorRT's engine inspector returned {text[:80]!r}, which holds no list of layers. Expected JSON with "
            "the key Layers. This release may use a new schema; see `layers_from_inspector`."
        ) from error


def _report_layer(entry: dict[str, Any] | str) -> LayerReport:
    if isinstance(entry, str):
        return LayerReport(name=entry, kind="", input_type="", output_type="", kernel="")
    return LayerReport(
        name=entry["Name"],
        kind=_kind_of(entry),
        input_type=_type_of(entry.get("Inputs", [])),
        output_type=_type_of(entry.get("Outputs", [])),
        kernel=str(entry.get("TacticName") or entry.get("TacticValue") or ""),
    )


def _kind_of(entry: dict[str, Any]) -> str:
    """By parameter type, then layer type; by name only for a fused layer that has weights."""
    weighted = isinstance(entry.get("Weights"), dict) and entry["Weights"].get("Count", 0) > 0
    layer_type = str(entry.get("LayerType", ""))
    for words in (str(entry.get("ParameterType", "")), layer_type, entry["Name"] if weighted else ""):
        for kind, pattern in _KIND_WORDS:
            if re.search(pattern, words, re.IGNORECASE):
                return kind
    return layer_type.lower()


def _type_of(tensors: list[dict[str, Any]]) -> str:
    """Type of the first tensor, "" without tensors, the inspector's own words if none is known."""
    if not tensors:
        return ""
    fields = {key.lower().replace(" ", ""): str(value) for key, value in tensors[0].items()}
    said = fields.get("datatype") or fields.get("format/datatype") or fields.get("format", "")
    for name, pattern in _TYPE_WORDS:
        if re.search(pattern, said, re.IGNORECASE):
            return name
    return said
