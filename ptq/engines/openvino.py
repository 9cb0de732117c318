"""How does OpenVINO build, inspect and run a graph on the CPU?

The only importer of `openvino`. It reads the FP32 or the Q/DQ ONNX file as it is. The blob is what OpenVINO
exports: the graph after its own transformations, which an import turns into the same layers in a fraction of the
build's time. OpenVINO refuses a blob of another release or another instruction set. The blob does not carry the
precision hint, so it is given again at import; without it OpenVINO runs floats in BF16 wherever the CPU can. Node
names in the blob hold a counter that runs on through the process, so two builds in one process differ in bytes
though not in results.

OpenVINO generates code for chains of elementwise operations ("snippets"). It takes residual adds in before
convolutions can, and each of these then writes floats. Where that concerns many layers, INT8 graphs are compiled
without it: ResNet-50 at batch 32 takes 84 ms instead of 126 (AMX, 2 cores), DenseNet-121, which has none, 143 instead
of 126. An application that runs our graph on its own sets the same property, `SNIPPETS_MODE`.
"""

import hashlib
import io
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from ptq.config import Precision
from ptq.engines.base import (
    CONVOLUTION,
    LINEAR,
    REFORMAT,
    BuiltEngine,
    Float32Array,
    FloatRemainder,
    int8_share,
    pad_batch,
    require_batch_size,
    require_classifier,
    time_calls,
)
from ptq.engines.isa import current_isa
from ptq.errors import EngineBuildError
from ptq.records.graph import EngineIdentity, LayerReport

# The import of OpenVINO forks a process that sends an event home: beside other threads the fork can hang, and with it
# the end of the program. Without this package OpenVINO has a stub of its own.
_has_telemetry = "openvino_telemetry" in sys.modules
try:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
finally:
    if not _has_telemetry:
        del sys.modules["openvino_telemetry"]

DEVICE = "CPU"
_WITHOUT_SNIPPETS = {"SNIPPETS_MODE": "DISABLE"}
# Layers that must gain an INT8 output, in percentage points: below, the elementwise operations that lose their
# generated code cost as much (RegNet-Y 400MF gains 14 and takes 5 % longer, MobileNetV3 gains 16 and takes 5 % less).
_WORTH_PP = 15.0
# Batches that run at once where only results matter; each holds the activations of a batch.
_MOST_STREAMS = 4
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

    # Candidates differ in their scales alone, and each is evaluated with an engine object of its own.
    _drops_snippets: ClassVar[dict[str, bool]] = {}

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._core = openvino.Core()

    def identity(self) -> EngineIdentity:
        """Returns OpenVINO's release, the name of the CPU and the instruction set that its kernels use."""
        return EngineIdentity(
            name="openvino",
            version=openvino.__version__.split("-")[0],
            device=str(self._core.get_property(DEVICE, "FULL_DEVICE_NAME")),
            threads=self._threads,
            isa=current_isa(),
        )

    def precisions(self) -> tuple[Precision, ...]:
        """Returns fp32, bf16 if the CPU has instructions for it, and int8."""
        if "BF16" in self._core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"):
            return ("fp32", "bf16", "int8")
        return ("fp32", "int8")

    def build(
        self, onnx: Path, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> BuiltEngine:
        """Returns the graph compiled for `batch_size` images; see `Engine.build`."""
        started = time.perf_counter()
        compiled = self._compile(onnx, batch_size, precision, self._settings(precision, float_remainder))
        build_s = time.perf_counter() - started
        return BuiltEngine(compiled.export_model().getvalue(), report_layers(compiled), build_s)

    def logits(
        self,
        onnx: Path,
        batches: Iterable[Float32Array],
        *,
        precision: Precision,
        batch_size: int,
        float_remainder: FloatRemainder,
    ) -> Iterator[Float32Array]:
        """Yields the logits of every batch, several at a time; see `Engine.logits`."""
        streams = min(self._threads, _MOST_STREAMS)
        settings = {
            **self._settings(precision, float_remainder),
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "THROUGHPUT",
        }
        compiled = self._compile(onnx, batch_size, precision, settings)
        free = [compiled.create_infer_request() for _ in range(streams)]
        shape = tuple(compiled.inputs[0].shape)
        # A request holds the address of its batch, not the batch.
        running: deque[tuple[openvino.InferRequest, Float32Array, int]] = deque()
        for batch in batches:
            if not free:
                yield _finished(running, free)
            request, padded = free.pop(), pad_batch(batch, shape=shape)
            request.set_input_tensor(0, openvino.Tensor(padded, shared_memory=padded.flags.writeable))
            request.start_async()
            running.append((request, padded, len(batch)))
        while running:
            yield _finished(running, free)

    def _compile(
        self, onnx: Path, batch_size: int, precision: Precision, settings: dict[str, Any]
    ) -> openvino.CompiledModel:
        try:
            model = self._core.read_model(onnx)
            require_classifier(onnx.name, inputs=len(model.inputs), outputs=len(model.outputs))
            model.reshape({0: [batch_size, *list(model.inputs[0].partial_shape)[1:]]})
            return self._best_compiled(
                lambda chosen: self._core.compile_model(model, DEVICE, chosen), settings, precision, _structure(model)
            )
        except RuntimeError as error:
            raise EngineBuildError(
                f"OpenVINO {openvino.__version__.split('-')[0]} cannot build {onnx.name} as {precision} for batches of "
                f"{batch_size}: {cause(error)}. Expected an ONNX file with one input (n, c, h, w) and a free batch "
                f"dimension. Check it with `ptq validate {onnx.name}`."
            ) from error

    def _best_compiled(
        self,
        compiled_with: Callable[[dict[str, Any]], openvino.CompiledModel],
        settings: dict[str, Any],
        precision: Precision,
        structure: str,
    ) -> openvino.CompiledModel:
        """Returns the graph compiled with or without snippets, whichever leaves enough more layers writing INT8.

        `structure` is known by what was decided for it before; empty where it is not to be remembered.
        """
        if precision != "int8":
            return compiled_with(settings)
        without = {**settings, **_WITHOUT_SNIPPETS}
        if structure in self._drops_snippets:
            return compiled_with(without if self._drops_snippets[structure] else settings)
        usual = compiled_with(settings)
        try:
            other = compiled_with(without)
        except RuntimeError:  # a release that does not know the property
            return usual
        gained_pp = _int8_output_percent(other) - _int8_output_percent(usual)
        if structure:
            self._drops_snippets[structure] = gained_pp >= _WORTH_PP
        return other if gained_pp >= _WORTH_PP else usual

    def load(
        self, blob: bytes, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> "OpenVinoRunner":
        """Returns a runner of an exported graph; see `Engine.load`."""
        settings = self._settings(precision, float_remainder)
        try:
            compiled = self._best_compiled(
                lambda chosen: self._core.import_model(io.BytesIO(blob), DEVICE, chosen), settings, precision, ""
            )
        except RuntimeError as error:
            raise EngineBuildError(
                f"OpenVINO {openvino.__version__.split('-')[0]} cannot load an engine of {len(blob)} bytes: "
                f"{cause(error)}. Expected one that this version exported on a CPU of this kind. Build it again "
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


def _structure(model: openvino.Model) -> str:
    """A digest of the operations' types, names and element types: of what does not differ between candidates."""
    operations = [
        (op.get_type_name(), op.get_friendly_name(), *(str(output.get_element_type()) for output in op.outputs()))
        for op in model.get_ordered_ops()
    ]
    return hashlib.sha256(repr(operations).encode()).hexdigest()


def _int8_output_percent(compiled: openvino.CompiledModel) -> float:
    return int8_share(report_layers(compiled)).int8_output_percent


def _finished(
    running: "deque[tuple[openvino.InferRequest, Float32Array, int]]", free: list[openvino.InferRequest]
) -> Float32Array:
    """Waits for the batch that was started first, sets its request free and returns its logits."""
    request, _, count = running.popleft()
    request.wait()
    free.append(request)
    return request.get_output_tensor(0).data[:count].copy()


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


def cause(error: RuntimeError) -> str:
    """What OpenVINO's message says after the places in its source, on one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [index for index, line in enumerate(lines) if "Exception from" in line or "failed at" in line]
    said = lines[places[-1] + 1 if places else 0 :] or lines or [type(error).__name__]
    return " ".join(said)[:300].rstrip(". ")
