"""What is worth telling about an ONNX file?"""

from dataclasses import dataclass
from pathlib import Path

import onnx

from ptq.errors import ExportError


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """What a file is: its input shape with None for a dynamic dimension, its logits and its Q/DQ pairs."""

    input_name: str
    input_shape: tuple[int | None, ...]
    output_names: tuple[str, ...]
    outputs: int | None
    quantize_nodes: int
    metadata: dict[str, str]


def summarize_onnx(path: Path) -> GraphSummary:
    """Returns what the ONNX file at `path` is.

    Raises:
        ExportError: there is no such file, or it is not an ONNX model with one image input.
    """
    try:
        model = onnx.load(path)
    except FileNotFoundError as error:
        raise ExportError(f"Model {path} does not exist. Give the path of an ONNX file.") from error
    except Exception as error:  # protobuf and onnx raise several kinds, all meaning: not a model
        raise ExportError(
            f"{path} is not an ONNX model: {str(error).splitlines()[0][:160]}. Give an ONNX file."
        ) from error
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise ExportError(f"{path} has {len(inputs)} inputs; expected one, of images with shape (n, c, h, w).")
    dimensions = inputs[0].type.tensor_type.shape.dim
    return GraphSummary(
        input_name=inputs[0].name,
        input_shape=tuple(d.dim_value if d.HasField("dim_value") else None for d in dimensions),
        output_names=tuple(value.name for value in model.graph.output),
        outputs=_last_dimension(model.graph.output[0]) if model.graph.output else None,
        quantize_nodes=sum(node.op_type == "QuantizeLinear" for node in model.graph.node),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _last_dimension(value: onnx.ValueInfoProto) -> int | None:
    dimensions = value.type.tensor_type.shape.dim
    return dimensions[-1].dim_value if dimensions and dimensions[-1].HasField("dim_value") else None
