"""How does OpenVINO build, inspect and run a graph on the CPU?

The only importer of `openvino`. It reads the FP32 or the Q/DQ ONNX file as it is. The blob is what OpenVINO
exports: the graph after its own transformations, which an import turns into the same layers in a fraction of the
build's time. OpenVINO refuses a blob of another release or another instruction set. The blob does not carry the
precision hint, so it is given again at import; without it OpenVINO runs floats in BF16 wherever the CPU can. Node
names in the blob hold a counter that runs on through the process, so two builds in one process differ in bytes
though not in results.
"""

import io
import time
from pathlib import Path
from typing import Any

import openvino

from ptq.config import Precision
from ptq.engines.interface import (
    CONVOLUTION,
    LINEAR,
    REFORMAT,
    ActivationReader,
    BuiltEngine,
    Float32Array,
    FloatRemainder,
    pad_batch,
    require_batch_size,
    require_classifier,
    time_calls,
)
from ptq.errors import EngineBuildError
from ptq.records import EngineIdentity, LayerReport

_DEVICE = "CPU"
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_KINDS = {
    "Convolution": CONVOLUTION,
    "GroupConvolution": CONVOLUTION,
    "Deconvolution": CONVOLUTION,
    "FullyConnected": LINEAR,
    "Reorder": REFORMAT,
    "Convert": REFORMAT,
}
_TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "uint8"}
# These hold or hand over data and run nothing.
_NOT_RUN = ("Const", "Input", "Output")


class OpenVinoEngine:
    """OpenVINO on the CPU, with a fixed number of threads and one inference at a time."""

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._core = openvino.Core()

    def identity(self) -> EngineIdentity:
        """Returns OpenVINO's release and the name of the CPU."""
        return EngineIdentity(
            name="openvino",
            version=openvino.__version__.split("-")[0],
            device=str(self._core.get_property(_DEVICE, "FULL_DEVICE_NAME")),
            threads=self._threads,
        )

    def precisions(self) -> tuple[Precision, ...]:
        """Returns fp32, bf16 if the CPU has instructions for it, and int8."""
        if "BF16" in self._core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
            return ("fp32", "bf16", "int8")
        return ("fp32", "int8")

    def build(
        self, onnx: Path, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> BuiltEngine:
        """Returns the graph compiled for `batch_size` images; see `Engine.build`."""
        settings = self._settings(precision, float_remainder)
        started = time.perf_counter()
        try:
            model = self._core.read_model(onnx)
            require_classifier(onnx.name, inputs=len(model.inputs), outputs=len(model.outputs))
            model.reshape({0: [batch_size, *list(model.inputs[0].partial_shape)[1:]]})
            compiled = self._core.compile_model(model, _DEVICE, settings)
            build_s = time.perf_counter() - started
            return BuiltEngine(compiled.export_model().getvalue(), report_layers(compiled), build_s)
        except RuntimeError as error:
            raise EngineBuildError(
                f"OpenVINO {openvino.__version__.split('-')[0]} cannot build {onnx.name} as {precision} for batches of "
                f"{batch_size}: {_cause(error)}. Expected an ONNX file with one input (n, c, h, w) and a free batch "
                f"dimension. Check it with `ptq validate {onnx.name}`."
            ) from error

    def load(
        self, blob: bytes, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> "OpenVinoRunner":
        """Returns a runner of an exported graph; see `Engine.load`."""
        settings = self._settings(precision, float_remainder)
        try:
            compiled = self._core.import_model(io.BytesIO(blob), _DEVICE, settings)
        except RuntimeError as error:
            raise EngineBuildError(
                f"OpenVINO {openvino.__version__.split('-')[0]} cannot load an engine of {len(blob)} bytes: "
                f"{_cause(error)}. Expected one that this version exported on a CPU of this kind. Build it again "
                "from its ONNX file."
            ) from error
        require_batch_size(compiled.inputs[0].shape[0], asked=batch_size)
        return OpenVinoRunner(compiled)

    def _settings(self, precision: Precision, float_remainder: FloatRemainder) -> dict[str, Any]:
        """Properties that fix the types, the threads and the latency mode, the same for a build and an import."""
        floats = float_remainder if precision == "int8" else precision
        available = self.precisions()
        for setting, value in (("precision", precision), ("engine.float_remainder", floats)):
            if value not in available:
                raise EngineBuildError(
                    f"{setting} is {value}, which OpenVINO does not run on {self.identity().device}. It runs "
                    f"{', '.join(available)}. Choose one of these."
                )
        return {
            "INFERENCE_PRECISION_HINT": _HINTS[floats],
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }


class OpenVinoRunner:
    """A loaded OpenVINO engine."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        self._shape = tuple(compiled.inputs[0].shape)
        self.batch_size: int = self._shape[0]

    def __call__(self, images: Float32Array) -> Float32Array:
        """Returns the logits of `images`; see `Runner`."""
        self._bind(images)
        self._request.infer()
        return self._request.get_output_tensor(0).data[: len(images)].copy()

    def timed_calls(
        self, images: Float32Array, *, warmup_ms: float, duration_s: float, min_iterations: int
    ) -> tuple[list[float], float]:
        """Returns latencies and the time they took; the input is bound once, so no copy is measured."""
        self._bind(images)
        return time_calls(
            self._request.infer, warmup_ms=warmup_ms, duration_s=duration_s, min_iterations=min_iterations
        )

    def close(self) -> None:
        """Frees the compiled graph."""
        del self._request

    def _bind(self, images: Float32Array) -> None:
        """Lets the request read `images` where they lie, unless they must be padded or are read-only."""
        # Kept as an attribute: the request holds the address of the array, not the array.
        self._batch = pad_batch(images, shape=self._shape)
        self._request.set_input_tensor(0, openvino.Tensor(self._batch, shared_memory=self._batch.flags.writeable))


def report_layers(compiled: openvino.CompiledModel) -> tuple[LayerReport, ...]:
    """Returns what the engine runs, in order, with the types that it recorded in its runtime graph."""
    operations = [op for op in compiled.get_runtime_model().get_ordered_ops() if _info(op, "layerType") not in _NOT_RUN]
    return tuple(
        LayerReport(
            # OpenVINO adds the ending when it splits a bias off; without it the name is the ONNX node's.
            name=op.get_friendly_name().removesuffix("/WithoutBiases"),
            kind=_kind_of(op),
            input_type=_input_type(op),
            output_type=_output_type(op, 0),
            kernel=_info(op, "primitiveType"),
        )
        for op in operations
    )


def _kind_of(op: openvino.Node) -> str:
    layer_type = _info(op, "layerType")
    if layer_type == "MatMul":
        # A product of two activations, as in attention, has no weights and is no linear layer.
        weights = op.input(1).get_source_output().get_node()
        return LINEAR if _info(weights, "layerType") == "Const" else "matmul"
    return _KINDS.get(layer_type, layer_type.lower())


def _input_type(op: openvino.Node) -> str:
    """Type of the first operand, as its producer writes it."""
    if op.get_input_size() == 0:
        return _output_type(op, 0)
    source = op.input(0).get_source_output()
    return _output_type(source.get_node(), source.get_index())


def _output_type(op: openvino.Node, index: int) -> str:
    types = _info(op, "outputPrecisions").split(",")
    word = types[min(index, len(types) - 1)]
    return _TYPES.get(word, word)


def _info(op: openvino.Node, key: str) -> str:
    """One entry of an operation's runtime information, empty if it has none."""
    info = op.get_rt_info()
    return str(info[key].value) if key in info else ""


def _cause(error: RuntimeError) -> str:
    """What OpenVINO's message says after the places in its source, on one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [index for index, line in enumerate(lines) if "Exception from" in line or "failed at" in line]
    said = lines[places[-1] + 1 if places else 0 :] or lines or [type(error).__name__]
    return " ".join(said)[:300].rstrip(". ")


def open_activation_readers(observed: Path, *, workers: int) -> list[ActivationReader]:
    """Returns one reader of activations per worker; together they use one thread each.

    Args:
        observed: FP32 graph of batch 1 whose outputs are the logits and the observed tensors.
        workers: number of readers that will be called at the same time, at least 1.

    Raises:
        EngineBuildError: OpenVINO refuses the graph.
    """
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": workers, "NUM_STREAMS": workers}
    try:
        compiled = core.compile_model(observed, _DEVICE, settings)
    except RuntimeError as error:
        raise EngineBuildError(
            f"OpenVINO cannot build the calibration graph {observed.name}: {_cause(error)}. Expected an FP32 graph; "
            "check it with `ptq validate`."
        ) from error
    return [_activation_reader(compiled) for _ in range(workers)]


def _activation_reader(compiled: openvino.CompiledModel) -> ActivationReader:
    request = compiled.create_infer_request()
    outputs = range(1, len(compiled.outputs))

    def read(image: Float32Array) -> list[Float32Array]:
        request.set_input_tensor(0, openvino.Tensor(image, shared_memory=True))
        request.infer()
        # Views into the request: valid until its next inference, and no copy of tens of megabytes an image.
        return [request.get_output_tensor(index).data for index in outputs]

    return read
