"""What is in somebody else's ONNX file, and can it be quantized?

Reads the file with its external data and refuses what is no FP32 classifier of images, each refusal with its reason.
The graph is brought into one form in `canonical`; where quantizers go is decided in the room `quantization`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from ptq.errors import CheckpointError
from ptq.files import files_sha256
from ptq.wording import first_line, first_names

# Per-channel Q/DQ exists from opset 13 on; older files are brought to the newest opset that TensorRT 8.6 reads.
OLDEST_OPSET, OPSET = 13, 17
_STANDARD_DOMAINS = ("", "ai.onnx")
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_OTHER_FLOATS = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}


@dataclass(frozen=True, slots=True)
class OnnxSource:
    """A classifier of images (n, c, h, w) in float32, weights included.

    `batch_size` is None where the batch is dynamic; `channels_last` tells that the file's own input is (n, h, w, c), so
    that its graph is full of transpositions; `notes` says what of the file was left out or changed.
    """

    model: onnx.ModelProto
    input_name: str
    output_name: str
    batch_size: int | None
    channels_last: bool = False
    notes: tuple[str, ...] = ()


def read_source(path: Path, *, input_shape: tuple[int, int, int], class_count: int | None = None) -> OnnxSource:
    """Returns the FP32 classifier in an ONNX file, in opset 13 or newer, its batch dimension as it was.

    Images with channels last, or in whole numbers of 8 bits, are taken as channels first in float32.

    Args:
        path: the ONNX file, with its external data beside it if it has any.
        input_shape: (c, h, w) of the images; free dimensions of the file's input are set to it.
        class_count: classes of the data, by which the logits are found among several outputs.

    Raises:
        CheckpointError: the file is absent, damaged, or is no FP32 classifier of such images.
    """
    model = _inlined(path, _parsed(path))
    _load_data_(path, model)
    _check_operators(path, model)
    for entry in [each for each in model.opset_import if each.domain not in _STANDARD_DOMAINS]:
        model.opset_import.remove(entry)  # of operators that the file does not have, or no longer has
    _check_types(path, model)
    inputs = _inputs_of(model.graph)
    output = _logits_of(model, class_count)
    if len(inputs) != 1 or output is None:
        names = ", ".join(value.name for value in (*inputs, *model.graph.output))
        raise CheckpointError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs ({names}); expected one of each, "
            "images and their logits. Export the classifier alone."
        )
    notes = []
    others = [value.name for value in model.graph.output if value.name != output.name]
    if others:
        notes.append(f"Of the outputs {output.name} is taken as the logits, and {first_names(others)} is left out.")
        del model.graph.output[:]
        model.graph.output.append(output)
    notes += _read_as_float_(model.graph, inputs[0])
    batch_size, channels_last = _fit_input_(path, model, inputs[0], input_shape)
    if channels_last:
        notes.append(f"The file takes {inputs[0].name} with channels last; the INT8 model takes (n, c, h, w).")
    del model.graph.input[:]
    model.graph.input.append(inputs[0])
    _give_shape_(model, output)
    return OnnxSource(_upgraded(path, model), inputs[0].name, output.name, batch_size, channels_last, tuple(notes))


def reads_pixels(path: Path) -> bool:
    """Whether an ONNX file takes images in whole numbers of 8 bits, 0 to 255, and so normalises them itself.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    inputs = _inputs_of(_parsed(path).graph)
    return len(inputs) == 1 and inputs[0].type.tensor_type.elem_type == TensorProto.UINT8


def _inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are not weights, which older exporters list among them."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _inlined(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions of its own."""
    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError) as error:
        raise _no_model(path, f"its functions contradict themselves ({first_line(error)})") from error


def _logits_of(model: onnx.ModelProto, class_count: int | None) -> onnx.ValueInfoProto | None:
    """The output with the logits: the only one, the one called so, or the only one in float with a number per class."""
    outputs = list(model.graph.output)
    if len(outputs) == 1:
        return outputs[0]
    rows = [value for value in outputs if _is_row_of(value, None)]
    named = [value for value in rows if value.name.lower().split("/")[-1] in ("logits", "logits:0")]
    fitting = [value for value in outputs if _is_row_of(value, class_count)]
    others = [value for value in fitting if "aux" not in value.name.lower()]
    for found in (named, fitting, others):
        if len(found) == 1:
            return found[0]
    return None


def _give_shape_(model: onnx.ModelProto, output: onnx.ValueInfoProto) -> None:
    """Writes down the shape of an output that has none, which the format asks for."""
    if output.type.tensor_type.HasField("shape"):
        return
    found = onnx.shape_inference.infer_shapes(model).graph.output[0].type.tensor_type
    shape = model.graph.output[0].type.tensor_type.shape
    shape.CopyFrom(found.shape)
    if not shape.dim:  # nothing is known: any number of rows of any length
        shape.dim.add()
        shape.dim.add()


def _is_row_of(value: onnx.ValueInfoProto, class_count: int | None) -> bool:
    """Whether an output is a row of so many numbers per image; of any number where that is None."""
    kind = value.type.tensor_type
    sizes = [dimension.dim_value for dimension in kind.shape.dim][1:]
    is_row = bool(sizes) and not any(size > 1 for size in sizes[1:])
    return kind.elem_type == TensorProto.FLOAT and is_row and class_count in (None, sizes[0])


def source_digest(path: Path) -> str:
    """Returns the SHA-256 of an ONNX file; with external data, of the file's and the data files' digests.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    model = _parsed(path)
    locations = _data_files(model)
    _load_data_(path, model)  # an absent file is an error with its reason
    return files_sha256([path, *(path.parent / location for location in locations)])


def _data_files(model: onnx.ModelProto) -> list[str]:
    """The files beside the model that hold its weights."""
    return sorted(
        {
            entry.value
            for tensor in model.graph.initializer
            if uses_external_data(tensor)
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )


def _parsed(path: Path) -> onnx.ModelProto:
    """The model without its external data."""
    if not path.is_file():
        raise CheckpointError(f"Model {path} does not exist. Give the path of an ONNX file.")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError, TypeError) as error:
        raise _no_model(path, first_line(error)) from error
    if not model.graph.node or not model.opset_import:
        raise _no_model(path, f"it holds {len(model.graph.node)} nodes and {len(model.opset_import)} opsets")
    return model


def _load_data_(path: Path, model: onnx.ModelProto) -> None:
    locations = ", ".join(_data_files(model)[:3])
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise CheckpointError(
            f"{path} keeps its weights in {locations}, which cannot be read: {first_line(error)}. Expected the data "
            "files in the folder of the model; copy them there."
        ) from error


def _no_model(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} ({path.stat().st_size:,} bytes) is not an ONNX model: {problem}. Expected a whole ONNX file; this one "
        "is cut off or of another format. Export it again."
    )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches and loops in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for below in (attribute.g, *attribute.graphs):
                yield from _nodes(below)


def _check_operators(path: Path, model: onnx.ModelProto) -> None:
    nodes = list(_nodes(model.graph))
    quantized = [node for node in nodes if node.op_type in _QUANTIZED or node.op_type.startswith("QLinear")]
    if quantized:
        raise CheckpointError(
            f"{path} is quantized already: it has {len(quantized)} nodes such as {quantized[0].op_type} "
            f"{quantized[0].name}. Expected an FP32 classifier; give the file it was made from. `ptq validate` and "
            "`ptq evaluate` take this one."
        )
    foreign = [node for node in nodes if node.domain not in _STANDARD_DOMAINS]
    if foreign:
        raise CheckpointError(
            f"{path} has {len(foreign)} operators that ONNX does not define, such as {foreign[0].domain}."
            f"{foreign[0].op_type}. Expected standard operators; export it again without fusions for one runtime."
        )
    if not any(node.op_type in _LAYERS for node in nodes):
        raise CheckpointError(
            f"{path} has no convolution and no linear layer among its {len(nodes)} nodes; there is nothing to "
            "quantize. Give a classifier of images."
        )


def _check_types(path: Path, model: onnx.ModelProto) -> None:
    """Weights must be float32; what is cast as it is read may be anything."""
    plain = {name for node in _nodes(model.graph) if node.op_type != "Cast" for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.data_type in _OTHER_FLOATS and tensor.name in plain:
            raise CheckpointError(
                f"{path} holds weights in {_OTHER_FLOATS[tensor.data_type]}, such as {tensor.name}. Expected float32: "
                "rounded weights would be rounded twice. Export the model in FP32."
            )


def _fit_input_(
    path: Path, model: onnx.ModelProto, value: onnx.ValueInfoProto, input_shape: tuple[int, int, int]
) -> tuple[int | None, bool]:
    """Checks the image input, makes it (n, c, h, w) and sets its free dimensions.

    Returns:
        its batch size, None for a dynamic one, and whether its channels were last.
    """
    kind = value.type.tensor_type
    dimensions = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim]
    if kind.elem_type != TensorProto.FLOAT or len(dimensions) != 4:
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise CheckpointError(
            f"Input {value.name} of {path} is {name} with {len(dimensions)} dimensions; expected float with four, "
            "(n, c, h, w). Export the classifier without its preprocessing."
        )
    channels, *sides = input_shape
    channels_last = not _fits(dimensions[1:], input_shape)
    if channels_last and not _fits(dimensions[1:], (*sides, channels)):
        raise CheckpointError(
            f"{path} reads images of shape {tuple(dimensions[1:])}, {_what_to_do(dimensions, input_shape)}"
        )
    if channels_last:
        _put_channels_first_(model.graph, value)
    for dimension, size in zip(kind.shape.dim[1:], input_shape, strict=True):
        dimension.dim_value = size
    return dimensions[0], channels_last


def _fits(found: list[int | None], wanted: tuple[int, ...]) -> bool:
    return all(size in (None, expected) for size, expected in zip(found, wanted, strict=True))


def _what_to_do(dimensions: list[int | None], input_shape: tuple[int, int, int]) -> str:
    """The rest of a sentence on images of another shape than the preprocessing gives."""
    given = f"and the preprocessing gives {input_shape}."
    last = dimensions[3] in (1, 3) and dimensions[1] not in (1, 3)
    height, width = dimensions[1:3] if last else dimensions[2:]
    if height != width and None not in (height, width):
        return f"{given} Images here are square; export the classifier for a square, or give squares to its network."
    return f"{given} Set channels, resize and crop to match."


def _read_as_float_(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> list[str]:
    """Gives what casts an input of 8 bits to float the same numbers in float, and says so; else changes nothing."""
    readers = [node for node in _nodes(graph) if value.name in node.input]
    casts = [
        node
        for node in readers
        if node.op_type == "Cast" and {each.name: each.i for each in node.attribute}["to"] == TensorProto.FLOAT
    ]
    if value.type.tensor_type.elem_type != TensorProto.UINT8 or not readers or len(casts) != len(readers):
        return []
    for node in casts:
        node.op_type = "Identity"
        del node.attribute[:]
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    return [
        f"The file takes pixels from 0 to 255 as {value.name} and normalises them itself: mean 0 and std 1/255 give it "
        "these. The INT8 model takes the same numbers in float."
    ]


def _put_channels_first_(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> None:
    """Puts a Transpose behind an input (n, h, w, c), which becomes (n, c, h, w)."""
    last = f"{value.name}#channels_last"
    for node in _nodes(graph):
        for position, name in enumerate(node.input):
            if name == value.name:
                node.input[position] = last
    graph.node.insert(
        0, onnx.helper.make_node("Transpose", [value.name], [last], f"{value.name}.channels_last", perm=[0, 2, 3, 1])
    )


def _upgraded(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in an opset that has per-channel Q/DQ."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in _STANDARD_DOMAINS), default=0)
    try:
        # Older exporters listed weights as inputs too, which the format no longer asks for.
        model.ir_version = max(model.ir_version, 4)
        onnx.checker.check_model(model)
        if opset >= OLDEST_OPSET:
            return model
        upgraded = onnx.version_converter.convert_version(model, OPSET)
        onnx.checker.check_model(upgraded)
        return upgraded
    except (onnx.checker.ValidationError, RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} (opset {opset}) is no valid model of opset {OLDEST_OPSET} or newer, and cannot be made one: "
            f"{first_line(error)}. Export it again with opset {OPSET}."
        ) from error
