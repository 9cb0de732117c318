"""What does the graph compute, by the letter of ONNX?

The only importer of `onnxruntime`. It runs on the CPU and is the numerical reference, in INT8 with every
optimisation off, so that each Q and DQ happens where the graph has it. Such a graph runs in float: its
latency is no INT8 latency. The blob is the ONNX file itself.
"""

import time
from pathlib import Path

import numpy as np
import onnxruntime

from ptq.config import Precision
from ptq.engines.base import (
    BuiltEngine,
    Float32Array,
    FloatRemainder,
    OneBatchAtATime,
    pad_batch,
    require_batch_size,
    require_classifier,
    time_calls,
)
from ptq.errors import EngineBuildError
from ptq.records.graph import EngineIdentity

_PROVIDER = "CPUExecutionProvider"
_PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
# Severities are 0 (verbose) to 4 (fatal). Warnings about graphs that are meant to be so say nothing here.
_ERROR_SEVERITY = 3
# Other libraries open sessions too, onnx-graphsurgeon to fold constants: theirs are as quiet.
onnxruntime.set_default_logger_severity(_ERROR_SEVERITY)


class OnnxRuntimeEngine(OneBatchAtATime):
    """ONNX Runtime on the CPU, with a fixed number of threads."""

    def __init__(self, *, threads: int) -> None:
        self._threads = threads

    def identity(self) -> EngineIdentity:
        """Returns ONNX Runtime's version; the device is the word CPU, its name does not change the numbers."""
        return EngineIdentity(name="onnxruntime", version=onnxruntime.__version__, device="CPU", threads=self._threads)

    def precisions(self) -> tuple[Precision, ...]:
        """Returns fp32 and int8, the latter for its numbers only."""
        return _PRECISIONS

    def build(
        self, onnx: Path, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> BuiltEngine:
        """Returns the file's bytes after a session took them; see `Engine.build`.

        `layers` is empty: ONNX Runtime reports no types, and what it runs of a Q/DQ graph here is float.
        """
        started = time.perf_counter()
        try:
            blob = onnx.read_bytes()
        except OSError as error:
            raise EngineBuildError(
                f"ONNX Runtime cannot read {onnx}: {error.strerror}. Give the path of an ONNX file."
            ) from error
        self._open(blob, precision, batch_size)
        return BuiltEngine(blob, (), time.perf_counter() - started)

    def load(
        self, blob: bytes, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> "OnnxRuntimeRunner":
        """Returns a runner of an ONNX file's bytes; `float_remainder` has no effect."""
        return OnnxRuntimeRunner(self._open(blob, precision, batch_size), batch_size=batch_size)

    def _open(self, blob: bytes, precision: Precision, batch_size: int) -> onnxruntime.InferenceSession:
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
        options.graph_optimization_level = levels.ORT_DISABLE_ALL if precision == "int8" else levels.ORT_ENABLE_ALL
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
