"""How does TensorRT build, inspect and run a graph on an NVIDIA GPU?

The only importer of `tensorrt`, written for 8.6, 10 and 11. These differ in the names they have, so the
decisions are taken by `build_plan` from a list of names, without the library. From TensorRT 11 each layer's
type comes from the graph (strong typing) and FP16 needs an FP16 graph; before, builder flags ask for it. PyTorch
provides device memory, streams and CUDA graphs.
"""

import ctypes
import importlib.util
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_library
from google.protobuf.message import DecodeError

from ptq.config import Precision
from ptq.engines.base import (
    BuiltEngine,
    Float32Array,
    FloatRemainder,
    OneBatchAtATime,
    TransferSamples,
    pad_batch,
    require_batch_size,
    require_classifier,
)
from ptq.engines.tensorrt_plan import PRECISIONS, ApiSurface, BuildPlan, build_plan, layers_from_inspector
from ptq.errors import EngineBuildError, ExportError
from ptq.graph.half_precision import half_from_float32, is_half
from ptq.records.graph import EngineIdentity

logger = logging.getLogger(__name__)
_CUDA_ERROR_NO_DEVICE = 100


def probe_cuda() -> str:
    """Returns why CUDA cannot be used, or an empty string if it can.

    The driver is asked directly: without one, TensorRT ends the process instead of raising.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver library (libcuda.so.1)"
    status = driver.cuInit(0)
    count = ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status == _CUDA_ERROR_NO_DEVICE or (status == 0 and count.value == 0):
        return "there is no CUDA device"
    return f"the NVIDIA driver fails with CUDA error {status}" if status else ""


def find_problem() -> str:
    """Returns why TensorRT cannot be used on this machine, or an empty string if it can."""
    problem = probe_cuda()
    if problem:
        return problem
    if importlib.util.find_spec("tensorrt") is None:
        return "tensorrt is not installed"
    # Imported here: it takes a second, and is not needed where there is no GPU.
    import torch

    if not torch.cuda.is_available():
        return "the installed torch cannot use CUDA"
    return ""


class TensorRtEngine(OneBatchAtATime):
    """TensorRT on the first CUDA device.

    `timing_cache` is what earlier builds learned about kernels, empty at first; each build reads and replaces it.
    Kept between runs, it makes builds quicker and repeatable.
    """

    def __init__(self, *, timing_cache: bytes = b"") -> None:
        # Imported here: both are unusable on most machines, and the plan and the inspector need neither.
        import tensorrt
        import torch

        self._trt: Any = tensorrt
        self._torch: Any = torch
        self._messages: deque[str] = deque(maxlen=5)
        self._log = _new_logger(self._trt, self._messages)
        self.timing_cache = timing_cache

    def identity(self) -> EngineIdentity:
        """Returns TensorRT's version and the GPU's name."""
        device = self._torch.cuda.get_device_name(0)
        return EngineIdentity(name="tensorrt", version=self._trt.__version__, device=device, threads=0)

    def precisions(self) -> tuple[Precision, ...]:
        """Returns fp32, fp16 and int8."""
        return PRECISIONS

    def surface(self) -> ApiSurface:
        """Returns the names that the installed release has."""
        major, minor = self._trt.__version__.split(".")[:2]
        return ApiSurface(
            version=(int(major), int(minor)),
            network_flags=frozenset(self._trt.NetworkDefinitionCreationFlag.__members__),
            builder_flags=frozenset(self._trt.BuilderFlag.__members__),
        )

    def build(
        self, onnx: Path, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> BuiltEngine:
        """Returns the graph built for exactly `batch_size` images; see `Engine.build`.

        `float_remainder` has no effect. What stays float in an INT8 graph runs in FP16: by flags, or, in a strongly
        typed release, because the graph is converted to FP16 tensors first.
        """
        started = time.perf_counter()
        self._messages.clear()
        plan, graph, notes = self._typed_graph(onnx, precision)
        builder = self._trt.Builder(self._log)
        network = self._parse(builder, onnx.name, graph, plan)
        config = self._configure(builder, network, plan, batch_size)
        known = self.timing_cache
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise self._error(f"cannot build {onnx.name} as {precision} for batches of {batch_size}")
        self.timing_cache = bytes(config.get_timing_cache().serialize())
        build_s = time.perf_counter() - started
        blob = bytes(serialized)
        engine = self._deserialize(blob)
        information = engine.create_engine_inspector().get_engine_information(self._trt.LayerInformationFormat.JSON)
        settings = (*self._settings(plan, config, engine, known, len(blob)), *notes)
        return BuiltEngine(blob, layers_from_inspector(information), build_s, settings, self.timing_cache)

    def load(
        self, blob: bytes, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> "TensorRtRunner":
        """Returns a runner of a plan; see `Engine.load`. The plan fixes the types, so the precision is not read."""
        runner = TensorRtRunner(self._trt, self._torch, self._deserialize(blob))
        require_batch_size(runner.batch_size, asked=batch_size)
        return runner

    def _typed_graph(self, onnx: Path, precision: Precision) -> tuple[BuildPlan, bytes, tuple[str, ...]]:
        """The plan, the graph whose types it needs, and what a reader should know of that graph.

        A strongly typed release takes FP16 from the graph alone. Where an FP32 graph cannot become an FP16 one, flags
        ask for FP16 if the release still has them.
        """
        try:
            graph = onnx.read_bytes()
        except OSError as error:
            raise EngineBuildError(
                f"TensorRT cannot read {onnx}: {error.strerror}. Give the path of an ONNX file."
            ) from error
        plan = build_plan(self.surface(), precision=precision)
        if not plan.strongly_typed or precision == "fp32":
            return plan, graph, ()
        try:
            half, notes = half_bytes(graph)
        except ExportError as error:
            weak = build_plan(self.surface(), precision=precision, weak_typing=True)
            if weak.strongly_typed:
                raise EngineBuildError(
                    f"{onnx.name} cannot become the FP16 graph that TensorRT {self._trt.__version__} needs, since it "
                    f"takes each layer's type from the graph. {error}"
                ) from error
            logger.warning("%s is built from its FP32 graph with flags: %s", onnx.name, error)
            return weak, graph, ("float part: FP32 graph, FP16 by flag",)
        for note in notes:
            logger.warning("%s in FP16: %s", onnx.name, note)
        return plan, half, ("float part: FP16 graph", *notes)

    def _parse(self, builder: Any, name: str, graph: bytes, plan: BuildPlan) -> Any:
        flags = self._trt.NetworkDefinitionCreationFlag
        network = builder.create_network(sum(1 << int(flags.__members__[flag]) for flag in plan.network_flags))
        # Kept until the next build: the parser owns the weights that the network refers to.
        self._parser = self._trt.OnnxParser(network, self._log)
        if not self._parser.parse(graph):
            found = "; ".join(str(self._parser.get_error(index)) for index in range(self._parser.num_errors))
            raise self._error(f"cannot parse {name}: {found[:300]}")
        require_classifier(name, inputs=network.num_inputs, outputs=network.num_outputs)
        return network

    def _settings(self, plan: BuildPlan, config: Any, engine: Any, known: bytes, size_bytes: int) -> tuple[str, ...]:
        """What the build was made with, each as "name: value"."""
        memory = getattr(engine, "device_memory_size_v2", None)
        if memory is None:
            memory = engine.device_memory_size
        hit = bool(known) and self.timing_cache == known
        cache = "none before" if not known else "knew every kernel" if hit else "knew some kernels"
        tactics = self._tactic_sources(config)
        return (
            f"typing: {'strong' if plan.strongly_typed else 'by flags'}",
            f"flags set: {' '.join(plan.set_flags) or 'none'}",
            f"flags cleared: {' '.join(plan.cleared_flags) or 'none'}",
            f"tactic sources: {tactics}",
            f"optimization level: {config.builder_optimization_level}",
            f"timing cache: {cache}",
            f"engine size: {size_bytes} bytes",
            f"device memory: {int(memory)} bytes",
        )

    def _tactic_sources(self, config: Any) -> str:
        """The sources a build takes kernels from; a release that does not say uses its default of those it names."""
        known = self._trt.TacticSource.__members__
        asked = getattr(config, "get_tactic_sources", None)
        if asked is None:
            return f"default of {' '.join(known)}"
        mask = int(asked())
        return " ".join(name for name, bit in known.items() if mask & (1 << int(bit))) or "none"

    def _configure(self, builder: Any, network: Any, plan: BuildPlan, batch_size: int) -> Any:
        config = builder.create_builder_config()
        flags = self._trt.BuilderFlag.__members__
        for name in plan.set_flags:
            config.set_flag(flags[name])
        for name in plan.cleared_flags:
            config.clear_flag(flags[name])
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        if not config.set_timing_cache(config.create_timing_cache(self.timing_cache), ignore_mismatch=False):
            # It was made by another release or on another GPU.
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        images = network.get_input(0)
        if images.shape[0] != -1:
            require_batch_size(images.shape[0], asked=batch_size)
        if -1 in tuple(images.shape):
            shape = (batch_size, *tuple(images.shape)[1:])
            profile = builder.create_optimization_profile()
            # Equal bounds: a range would be tuned for one size and slow at the others.
            profile.set_shape(images.name, shape, shape, shape)
            config.add_optimization_profile(profile)
        return config

    def _deserialize(self, blob: bytes) -> Any:
        engine = self._trt.Runtime(self._log).deserialize_cuda_engine(blob)
        if engine is None:
            raise self._error(f"cannot load an engine of {len(blob)} bytes")
        return engine

    def _error(self, what: str) -> EngineBuildError:
        said = " ".join(self._messages)[:400] or "it gave no reason"
        return EngineBuildError(
            f"TensorRT {self._trt.__version__} {what} ({said}). Expected a graph that passes `ptq validate`, or an "
            "engine built by this release on this kind of GPU. Build the engine again from its ONNX file."
        )


class TensorRtRunner:
    """A loaded plan with its buffers on the GPU. `trt` and `torch` are the imported libraries."""

    def __init__(self, trt: Any, torch: Any, engine: Any) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        (source,) = (name for name in names if modes[name] == trt.TensorIOMode.INPUT)
        (target,) = (name for name in names if modes[name] == trt.TensorIOMode.OUTPUT)
        types = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16}
        self._shape = tuple(engine.get_tensor_shape(source))
        if -1 in self._shape:
            # The profile's bounds are equal, so its optimum is the only shape.
            self._shape = tuple(engine.get_tensor_profile_shape(source, 0)[1])
        self.batch_size: int = self._shape[0]
        self._torch = torch
        self._engine = engine
        self._context = engine.create_execution_context()
        self._context.set_input_shape(source, self._shape)
        self._stream = torch.cuda.Stream()
        self._pinned = torch.zeros(self._shape, dtype=torch.float32).pin_memory()
        self._images = torch.zeros(self._shape, dtype=types[engine.get_tensor_dtype(source)], device="cuda")
        output_shape = tuple(self._context.get_tensor_shape(target))
        self._logits = torch.zeros(output_shape, dtype=types[engine.get_tensor_dtype(target)], device="cuda")
        self._context.set_tensor_address(source, self._images.data_ptr())
        self._context.set_tensor_address(target, self._logits.data_ptr())
        # The buffers were filled on another stream.
        torch.cuda.synchronize()

    def __call__(self, images: Float32Array) -> Float32Array:
        """Returns the logits of `images`; see `Runner`."""
        with self._torch.cuda.stream(self._stream):
            self._upload(images)
            self._enqueue()
            # The copy to pageable memory waits for the stream.
            return np.asarray(self._logits[: len(images)].float().cpu().numpy())

    def timed_calls(
        self, images: Float32Array, *, warmup_ms: float, duration_s: float, min_iterations: int
    ) -> tuple[list[float], float]:
        """Returns the GPU's compute time of each inference in ms, and the time from the first to the last in s.

        Inferences are replays of a CUDA graph between two events. The next is enqueued before the last is waited for,
        as trtexec does, so that the GPU is never idle; no transfer is measured.
        """
        torch = self._torch
        with torch.cuda.stream(self._stream):
            self._upload(images)
            self._enqueue()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._enqueue()
            warm_at = time.perf_counter() + warmup_ms / 1000
            while time.perf_counter() < warm_at:
                graph.replay()
                self._stream.synchronize()
            end_at = time.perf_counter() + duration_s
            events = [self._replay(graph)]
            while time.perf_counter() < end_at or len(events) < min_iterations:
                events.append(self._replay(graph))
                events[-2][1].synchronize()
            events[-1][1].synchronize()
        latencies_ms = [start.elapsed_time(end) for start, end in events]
        return latencies_ms, events[0][0].elapsed_time(events[-1][1]) / 1000

    def timed_transfers(self, images: Float32Array, *, warmup_ms: float, iterations: int) -> TransferSamples:
        """Returns upload, compute and download of each inference, without a CUDA graph and without overlap."""
        torch, batch = self._torch, pad_batch(images, shape=self._shape)
        self._pinned.copy_(torch.from_numpy(batch if batch.flags.writeable else batch.copy()))
        received = torch.zeros(self._logits.shape, dtype=self._logits.dtype).pin_memory()
        rows: list[tuple[float, float, float, float]] = []
        with torch.cuda.stream(self._stream):
            warm_at = time.perf_counter() + warmup_ms / 1000
            self._transfer(received)
            while time.perf_counter() < warm_at:
                self._transfer(received)
            first = time.perf_counter()
            for _ in range(iterations):
                rows.append(self._transfer(received))
            elapsed_s = time.perf_counter() - first
        upload, compute, download, enqueue = zip(*rows, strict=True)
        return TransferSamples(upload, compute, download, enqueue, elapsed_s)

    def _transfer(self, received: Any) -> tuple[float, float, float, float]:
        """One inference from host to host: the device's upload, compute and download, and the host's enqueue, in ms."""
        events = [self._torch.cuda.Event(enable_timing=True) for _ in range(4)]
        events[0].record()
        self._images.copy_(self._pinned, non_blocking=True)
        events[1].record()
        before = time.perf_counter()
        self._enqueue()
        enqueue_ms = 1000 * (time.perf_counter() - before)
        events[2].record()
        received.copy_(self._logits, non_blocking=True)
        events[3].record()
        events[3].synchronize()
        upload, compute, download = (events[i].elapsed_time(events[i + 1]) for i in range(3))
        return upload, compute, download, enqueue_ms

    def close(self) -> None:
        """Frees the GPU's memory."""
        del self._context, self._engine, self._images, self._logits, self._pinned

    def _upload(self, images: Float32Array) -> None:
        batch = pad_batch(images, shape=self._shape)
        self._pinned.copy_(self._torch.from_numpy(batch if batch.flags.writeable else batch.copy()))
        self._images.copy_(self._pinned, non_blocking=True)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._torch.cuda.current_stream().cuda_stream):
            raise EngineBuildError(
                "TensorRT did not accept an inference. Expected an engine built on this GPU. Build it again from its "
                "ONNX file."
            )

    def _replay(self, graph: Any) -> tuple[Any, Any]:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        return start, end


def half_bytes(graph: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Returns an ONNX file as one with FP16 tensors, and its warnings; a file that has FP16 already comes back as is.

    Raises:
        ExportError: the file is no ONNX model, or cannot be converted.
    """
    try:
        model = onnx_library.load_model_from_string(graph)
    except DecodeError as error:
        raise ExportError(f"The graph has {len(graph)} bytes that are no ONNX model. Export it again.") from error
    if is_half(model):
        return graph, ()
    half = half_from_float32(model)
    return half.model.SerializeToString(deterministic=True), half.warnings


def _new_logger(trt: Any, messages: deque[str]) -> Any:
    """A TensorRT logger that keeps the latest errors in `messages`, for the exception that follows them."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)
            logger.debug("TensorRT: %s", message)

    return Log()
