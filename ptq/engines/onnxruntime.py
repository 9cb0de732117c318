"""What does ONNX Runtime compute, as an engine and by the letter of ONNX?

The only importer of `onnxruntime`, which runs on the CPU here. As an engine it optimises the graph: DQ -> operator -> Q
becomes one operator on integers, where the graph has the quantizers of the dialect `onnxruntime`. As the numerical
reference it optimises no INT8 graph, so that each Q and DQ happens where the graph has it, in float. The blob is the
ONNX file itself.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from ptq.config import Precision
from ptq.engines.base import (
    CONVOLUTION,
    LINEAR,
    REFORMAT,
    BuiltEngine,
    Float32Array,
    FloatRemainder,
    OneBatchAtATime,
    pad_batch,
    require_batch_size,
    require_classifier,
    time_calls,
)
from ptq.engines.isa import playable_isas, processor_name
from ptq.errors import EngineBuildError
from ptq.records.graph import EngineIdentity, LayerReport

onnxruntime.disable_telemetry_events()  # nothing phones home
_PROVIDER = "CPUExecutionProvider"
_PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
# Severities are 0 (verbose) to 4 (fatal). Warnings about graphs that are meant to be so say nothing here.
_ERROR_SEVERITY = 3
# Operators on integers, by the position of the zero points of what they read and write; those without write float.
_INTEGER_KINDS = {
    "QLinearConv": (CONVOLUTION, 2, 7),
    "ConvInteger": (CONVOLUTION, 2, None),
    "QLinearMatMul": (LINEAR, 2, 7),
    "QGemm": (LINEAR, 2, 8),
    "MatMulInteger": (LINEAR, 2, None),
    "MatMulIntegerToFloat": (LINEAR, 4, None),
    "DynamicQuantizeMatMul": (LINEAR, None, None),
    "QLinearAdd": ("QLinearAdd", 2, 7),
    "QLinearMul": ("QLinearMul", 2, 7),
    "QLinearConcat": ("QLinearConcat", 4, 1),
    "QLinearGlobalAveragePool": ("QLinearGlobalAveragePool", 2, 4),
    "QLinearAveragePool": ("QLinearAveragePool", 2, 4),
    "QLinearSigmoid": ("QLinearSigmoid", 2, 4),
    "QLinearLeakyRelu": ("QLinearLeakyRelu", 2, 4),
}
_FLOAT_KINDS = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvTranspose", "NhwcFusedConv"), CONVOLUTION),
    **dict.fromkeys(("Gemm", "FusedGemm", "MatMul", "FusedMatMul"), LINEAR),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput"), REFORMAT),
}
# Other libraries open sessions too, onnx-graphsurgeon to fold constants: theirs are as quiet.
onnxruntime.set_default_logger_severity(_ERROR_SEVERITY)


class OnnxRuntimeEngine(OneBatchAtATime):
    """ONNX Runtime on the CPU, with a fixed number of threads.

    Args:
        threads: of an inference.
        by_the_letter: run an INT8 graph in float, every Q and DQ where it stands: the numerical reference.
    """

    def __init__(self, *, threads: int, by_the_letter: bool = False) -> None:
        self._threads = threads
        self._by_the_letter = by_the_letter

    def identity(self) -> EngineIdentity:
        """Returns ONNX Runtime's version, the processor's name and its instruction set, all of which it uses.

        By the letter the numbers do not depend on the processor, and the device is the word CPU.
        """
        if self._by_the_letter:
            return EngineIdentity("onnxruntime", onnxruntime.__version__, "CPU", self._threads)
        isas = playable_isas()
        return EngineIdentity(
            "onnxruntime", onnxruntime.__version__, processor_name(), self._threads, isa=isas[-1] if isas else ""
        )

    def precisions(self) -> tuple[Precision, ...]:
        """Returns fp32 and int8."""
        return _PRECISIONS

    def build(
        self, onnx: Path, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> BuiltEngine:
        """Returns the file's bytes after a session took them, and the operators of its graph; see `Engine.build`."""
        started = time.perf_counter()
        try:
            blob = onnx.read_bytes()
        except OSError as error:
            raise EngineBuildError(
                f"ONNX Runtime cannot read {onnx}: {error.strerror}. Give the path of an ONNX file."
            ) from error
        with tempfile.TemporaryDirectory() as directory:
            optimised = Path(directory) / "optimised.onnx"
            self._open(blob, precision, batch_size, optimised=optimised)
            layers = report_layers(optimised)
        return BuiltEngine(blob, layers, time.perf_counter() - started)

    def load(
        self, blob: bytes, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> "OnnxRuntimeRunner":
        """Returns a runner of an ONNX file's bytes; `float_remainder` has no effect."""
        return OnnxRuntimeRunner(self._open(blob, precision, batch_size), batch_size=batch_size)

    def _open(
        self, blob: bytes, precision: Precision, batch_size: int, *, optimised: Path | None = None
    ) -> onnxruntime.InferenceSession:
        """A session of a file; the graph that it runs is written to `optimised`."""
        if precision not in _PRECISIONS:
            raise EngineBuildError(
                f"precision is {precision}, which ONNX Runtime does not run on a CPU. It runs "
                f"{', '.join(_PRECISIONS)}. Choose one of these."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERROR_SEVERITY
        levels = onnxruntime.GraphOptimizationLevel
        is_plain = self._by_the_letter and precision == "int8"
        options.graph_optimization_level = levels.ORT_DISABLE_ALL if is_plain else levels.ORT_ENABLE_ALL
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        try:
            session = onnxruntime.InferenceSession(blob, options, providers=[_PROVIDER])
        # The library's exceptions share no base class but Exception.
        except Exception as error:
            raise EngineBuildError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load a graph of {len(blob)} bytes: {error}. "
                "Expected an ONNX file. Check it with `ptq validate`."
            ) from error
        inputs = session.get_inputs()
        require_classifier("The graph", inputs=len(inputs), outputs=len(session.get_outputs()))
        if isinstance(inputs[0].shape[0], int):
            require_batch_size(inputs[0].shape[0], asked=batch_size)
        return session


def without_transpositions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a graph as ONNX Runtime's basic optimisation leaves it, in ONNX's own operators.

    It moves transpositions through what does not mind them until they meet, and folds what is constant.

    Raises:
        EngineBuildError: the graph cannot be loaded.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR_SEVERITY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[_PROVIDER])
        except Exception as error:  # the library's exceptions share no base class
            raise EngineBuildError(f"ONNX Runtime {onnxruntime.__version__} cannot load the graph: {error}.") from error
        found = onnx.load(path)
    used = {node.domain for node in found.graph.node}
    for entry in [each for each in found.opset_import if each.domain and each.domain not in used]:
        found.opset_import.remove(entry)
    return found


def report_layers(optimised: Path) -> tuple[LayerReport, ...]:
    """Returns the operators of a graph that ONNX Runtime has optimised, and the types that they read and write.

    What reads and writes no integers is `fp32`, whatever else it may be: pools and others that move numbers too.
    """
    model = onnx.load(optimised)
    types = {
        tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name for tensor in model.graph.initializer
    }
    return tuple(_report(node, types) for node in model.graph.node)


def _report(node: onnx.NodeProto, types: Mapping[str, str]) -> LayerReport:
    def type_at(position: int | None) -> str:
        if position is None or position >= len(node.input):
            return "fp32"
        return types.get(node.input[position], "int8")

    name = node.name or node.output[0]
    if node.op_type in _INTEGER_KINDS:
        kind, read, written = _INTEGER_KINDS[node.op_type]
        return LayerReport(name, kind, type_at(read), type_at(written), node.op_type)
    kind = _FLOAT_KINDS.get(node.op_type, node.op_type)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        integers = types.get(node.input[2] if len(node.input) > 2 else node.input[0], "int8")
        pair = ("fp32", integers) if node.op_type == "QuantizeLinear" else (integers, "fp32")
        return LayerReport(name, kind, *pair, node.op_type)
    return LayerReport(name, kind, "fp32", "fp32", node.op_type)


class OnnxRuntimeRunner:
    """A loaded ONNX Runtime session."""

    def __init__(self, session: onnxruntime.InferenceSession, *, batch_size: int) -> None:
        self._session = session
        self._input = session.get_inputs()[0]
        self.batch_size = batch_size

    def __call__(self, images: Float32Array) -> Float32Array:
        """Returns the logits of `images`; see `Runner`."""
        logits = self._session.run(None, {self._input.name: self._pad(images)})[0]
        return np.asarray(logits[: len(images)], dtype=np.float32)

    def timed_calls(
        self, images: Float32Array, *, warmup_ms: float, duration_s: float, min_iterations: int
    ) -> tuple[list[float], float]:
        """Returns latencies and the time they took; on a CPU nothing is copied to a device."""
        feed = {self._input.name: self._pad(images)}
        return time_calls(
            lambda: self._session.run(None, feed),
            warmup_ms=warmup_ms,
            duration_s=duration_s,
            min_iterations=min_iterations,
        )

    def close(self) -> None:
        """Frees the session."""
        del self._session

    def _pad(self, images: Float32Array) -> Float32Array:
        """`images` as a full batch; a dimension that the graph leaves free takes the images' own."""
        declared = self._input.shape[1:]
        sizes = [size if isinstance(size, int) else own for size, own in zip(declared, images.shape[1:], strict=False)]
        return pad_batch(images, shape=(self.batch_size, *sizes))
