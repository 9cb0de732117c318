"""Is it a whole ONNX file of an image classifier, which says where it comes from?

The checks of structure and interface fit a float file as well.
"""

import onnx

from ptq.checks.subject import Found, Subject, check, computes_on_integers
from ptq.graph.nodes import constant, input_at, label, producer

OPSET_MINIMUM = 13
OPSET_TENSORRT_8 = 17
METADATA_KEYS = ("checkpoint_sha256", "method", "trial", "dialect")


@check("onnx-checker", "error", "Export the model again with a current exporter.", needs_qdq=False)
def _checker(subject: Subject) -> Found:
    if subject.checker_problem:
        yield None, f"onnx.checker refuses the model: {subject.checker_problem}"


@check("shape-inference", "error", "Correct the shapes at the node it names.", needs_qdq=False)
def _shape_inference(subject: Subject) -> Found:
    if subject.inference_problem:
        yield None, f"Strict shape inference fails: {subject.inference_problem}"


@check("opset-minimum", "error", "Export with opset 17.", needs_qdq=False)
def _opset_minimum(subject: Subject) -> Found:
    if subject.opset < OPSET_MINIMUM:
        yield None, f"The opset is {subject.opset}; per-channel Q/DQ exists from opset {OPSET_MINIMUM} on."


@check("domain-known", "error", "Export without runtime-specific fusions.", needs_qdq=False)
def _domain(subject: Subject) -> Found:
    for node in subject.graph.nodes:
        if node.domain not in (None, "", "ai.onnx"):
            yield node, f"Operator {node.op} is of domain {node.domain}; expected standard ONNX operators only."


@check("node-names-unique", "error", "Give every node a name of its own.", needs_qdq=False)
def _node_names(subject: Subject) -> Found:
    seen: dict[str, int] = {}
    for node in subject.graph.nodes:
        seen[node.name] = seen.get(node.name, 0) + 1
        if node.name and seen[node.name] == 2:
            yield node, f"Several nodes are called {node.name}."


@check("initializer-not-input", "error", "Remove it from the graph's inputs.", needs_qdq=False)
def _initializer_inputs(subject: Subject) -> Found:
    initializers = {tensor.name for tensor in subject.model.graph.initializer}
    for entry in subject.model.graph.input:
        if entry.name in initializers:
            yield None, f"Initializer {entry.name} is listed as an input, so that it is no constant."


@check("image-input", "error", "Export the classifier alone, from images to logits.", needs_qdq=False)
def _image_input(subject: Subject) -> Found:
    names = [tensor.name for tensor in subject.graph.inputs]
    if len(names) != 1:
        yield None, f"The graph has {len(names)} inputs {names}; expected one, the images."
        return
    entry = next(entry.type.tensor_type for entry in subject.model.graph.input if entry.name == names[0])
    kind = onnx.TensorProto.DataType.Name(entry.elem_type)
    if entry.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) or len(entry.shape.dim) != 4:
        yield None, f"Input {names[0]} is {kind} with {len(entry.shape.dim)} dimensions; expected FLOAT (n, c, h, w)."


@check("input-shape", "error", "Export with the preprocessing's channels and crop.", needs_qdq=False)
def _input_shape(subject: Subject) -> Found:
    for tensor in subject.graph.inputs[:1]:
        found = tuple(tensor.shape or ())[1:]
        if len(found) != 3:
            continue
        if not all(isinstance(length, int) and length > 0 for length in found):
            yield None, f"Input {tensor.name} has channels, height and width {found}; only the batch may be dynamic."
        elif subject.input_shape is not None and found != tuple(subject.input_shape):
            yield None, f"Input {tensor.name} has channels, height and width {found}; expected {subject.input_shape}."


@check("batch-dimension", "info", "Nothing needs to be done.", needs_qdq=False)
def _batch_dimension(subject: Subject) -> Found:
    for tensor in subject.graph.inputs[:1]:
        batch = tensor.shape[0] if tensor.shape else None
        kind = f"static, {batch} images" if isinstance(batch, int) else f"dynamic, called {batch or 'nothing'}"
        yield None, f"The batch dimension of {tensor.name} is {kind}."


@check("class-output", "error", "Export the classifier with its last layer.", needs_qdq=False)
def _class_output(subject: Subject) -> Found:
    outputs = subject.graph.outputs
    if len(outputs) != 1:
        yield None, f"The graph has {len(outputs)} outputs {[t.name for t in outputs]}; expected one, the logits."
        return
    shape = tuple(outputs[0].shape or ())
    if len(shape) != 2 or not isinstance(shape[1], int):
        yield (
            None,
            f"Output {outputs[0].name} has shape {shape}; expected (n, classes) with a static number of classes.",
        )
    elif subject.num_classes is not None and shape[1] != subject.num_classes:
        yield None, f"Output {outputs[0].name} has {shape[1]} classes; expected {subject.num_classes}."


@check("batchnorm-foldable", "warning", "Fold it before calibration.", needs_qdq=False)
def _batchnorm_foldable(subject: Subject) -> Found:
    for node in subject.graph.nodes:
        before = producer(node.inputs[0]) if node.op == "BatchNormalization" and node.inputs else None
        if before is not None and before.op in ("Conv", "ConvTranspose") and subject.graph.is_private(node.inputs[0]):
            yield node, f"This BatchNormalization follows {label(before)} and could be part of its weights."


@check("training-mode", "error", "Call `eval()` on the model before exporting it.", needs_qdq=False)
def _training_mode(subject: Subject) -> Found:
    for node in subject.graph.nodes:
        in_training = node.op == "BatchNormalization" and node.attrs.get("training_mode", 0)
        flag = constant(input_at(node, 2)) if node.op == "Dropout" else None
        if in_training or (flag is not None and flag.any()):
            yield node, f"This {node.op} is in training mode."


@check("integer-operators", "error", "Quantize in the Q/DQ format, not as QOperator.", needs_qdq=False)
def _integer_operators(subject: Subject) -> Found:
    found = [node for node in subject.graph.nodes if computes_on_integers(node)]
    if found:
        kinds = ", ".join(sorted({node.op for node in found}))
        yield (
            found[0],
            f"{len(found)} nodes compute on integers ({kinds}); expected float operators between Q/DQ pairs.",
        )


def _metadata_values(subject: Subject) -> tuple[set[str], bool]:
    """Which of our keys the file has, with or without prefix, and whether the file is ours."""
    keys = {entry.key for entry in subject.model.metadata_props}
    present = {key for key in METADATA_KEYS if key in keys or f"ptq.{key}" in keys}
    # A float export of ours names its checkpoint too, and another maker's quantizer keeps that entry.
    return present, any(f"ptq.{key}" in keys for key in METADATA_KEYS if key != "checkpoint_sha256")


@check("metadata-absent", "info", "`ptq quantize` writes it.", needs_qdq=False)
def _metadata_absent(subject: Subject) -> Found:
    present, is_ours = _metadata_values(subject)
    if not is_ours and len(present) < len(METADATA_KEYS):
        yield None, "The file does not say where it comes from: it has no metadata of this pipeline."


@check("qdq-absent", "info", "Quantize it with `ptq quantize`.", needs_qdq=False)
def _qdq_absent(subject: Subject) -> Found:
    graph = subject.graph
    if not graph.quantizes and not graph.dequantizes and not any(computes_on_integers(node) for node in graph.nodes):
        yield None, "The graph has no QuantizeLinear and no DequantizeLinear: it is a float model."


@check("opset-tensorrt-8", "warning", "Export with opset 17, or use TensorRT 10 or later.")
def _opset_tensorrt_8(subject: Subject) -> Found:
    if subject.dialect == "tensorrt" and subject.opset > OPSET_TENSORRT_8:
        yield None, f"The opset is {subject.opset}; TensorRT 8.6 reads opsets {OPSET_MINIMUM} to {OPSET_TENSORRT_8}."


@check("metadata-complete", "warning", "Write the file with `ptq quantize`.")
def _metadata_complete(subject: Subject) -> Found:
    present, is_ours = _metadata_values(subject)
    missing = [key for key in METADATA_KEYS if key not in present]
    if is_ours and missing:
        yield None, f"The metadata lacks {', '.join(missing)}."
