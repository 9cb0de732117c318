"""What can every inference engine do?

Build a graph for one precision and batch size, say which layers run in which type, and run images. The
protocols are here, with the few rules that no engine may interpret its own way: how a short batch is
padded, how synchronous calls are timed and how the share of INT8 is counted. No engine is imported here.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ptq.config import Precision
from ptq.errors import EngineBuildError
from ptq.records.graph import EngineIdentity, Int8Share, LayerReport

FloatRemainder = Literal["fp32", "bf16"]
Float32Array = npt.NDArray[np.float32]

# From one normalized image (1, c, h, w) to the observed tensors.
ActivationReader = Callable[[Float32Array], list[Float32Array]]
# Takes the position of an observed tensor and its values, which hold until it returns.
Observe = Callable[[int, Float32Array], None]


@runtime_checkable
class StreamingReader(Protocol):
    """An activation reader that can hand over each tensor as soon as it is computed, so that none is kept."""

    def __call__(self, image: Float32Array) -> list[Float32Array]:
        """Returns copies of the observed tensors of one normalized image (1, c, h, w)."""

    def stream(self, image: Float32Array, observe: Observe) -> None:
        """Hands every observed tensor of an image to `observe` once; raises what `observe` raised first."""


CONVOLUTION = "convolution"
LINEAR = "linear"
REFORMAT = "reformat"
_WEIGHTED_KINDS = (CONVOLUTION, LINEAR)
_INT8_TYPES = ("int8", "uint8")


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A graph compiled for one engine, precision and batch size.

    `blob` is what `Engine.load` takes; `layers` are in order of execution; `build_s` is the time of the build in
    seconds; `settings` is what the build was made with, each as "name: value"; `timing_cache` is what the engine wants
    to know at the next build, empty where it keeps nothing.
    """

    blob: bytes
    layers: tuple[LayerReport, ...]
    build_s: float
    settings: tuple[str, ...] = ()
    timing_cache: bytes = b""


class Runner(Protocol):
    """A loaded engine that runs batches of at most `batch_size` images. One thread uses it at a time."""

    batch_size: int

    def __call__(self, images: Float32Array) -> Float32Array:
        """Returns the logits (n, k) of `images` (n, c, h, w), with n in [1, batch_size].

        A short batch is padded with zeros and the padding's logits are cut off. More images than `batch_size`,
        another shape or another type than float32 is a ValueError.
        """
        ...

    def timed_calls(
        self, images: Float32Array, *, warmup_ms: float, duration_s: float, min_iterations: int
    ) -> tuple[list[float], float]:
        """Returns the latency of each inference in ms, and the time they took together in s.

        Runs `images` for `warmup_ms` unmeasured, then for at least `duration_s` and `min_iterations`. Only compute is
        measured where the engine can tell it from the transfer of data.
        """
        ...

    def close(self) -> None:
        """Frees the engine's memory. The runner cannot be used any more."""
        ...


@dataclass(frozen=True, slots=True)
class TransferSamples:
    """Times of inferences with their transfers, in ms, one per inference, and the time they took together in s.

    `enqueue_ms` is the host's time to hand an inference over; the others are the device's.
    """

    upload_ms: tuple[float, ...]
    compute_ms: tuple[float, ...]
    download_ms: tuple[float, ...]
    enqueue_ms: tuple[float, ...]
    elapsed_s: float


@runtime_checkable
class SeparatesTransfers(Protocol):
    """A runner whose `timed_calls` measures compute alone, and which can measure transfers as well."""

    def timed_transfers(self, images: Float32Array, *, warmup_ms: float, iterations: int) -> TransferSamples:
        """Returns times of `iterations` inferences, one after the other, each with upload and download."""
        ...


class Engine(Protocol):
    """An inference engine on this machine."""

    def identity(self) -> EngineIdentity:
        """Returns name, version, device and threads, as recorded with every result."""
        ...

    def precisions(self) -> tuple[Precision, ...]:
        """Returns the precisions that this engine runs on this hardware, fp32 first and int8 last."""
        ...

    def build(
        self, onnx: Path, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder
    ) -> BuiltEngine:
        """Returns the ONNX file at `onnx` compiled for exactly `batch_size` images.

        Args:
            onnx: a float graph, or the Q/DQ graph for `int8`; one input (n, c, h, w), one output (n, k).
            precision: one of `precisions()`.
            batch_size: images per inference, at least 1.
            float_remainder: type of what stays in float in an INT8 graph on a CPU.

        Raises:
            EngineBuildError: the engine does not have the precision, or refuses the graph.
        """
        ...

    def load(self, blob: bytes, *, precision: Precision, batch_size: int, float_remainder: FloatRemainder) -> Runner:
        """Returns a runner of `blob`, which `build` made with the same settings.

        Raises:
            EngineBuildError: the blob is damaged, or was built for another version or device.
        """
        ...

    def logits(
        self,
        onnx: Path,
        batches: Iterable[Float32Array],
        *,
        precision: Precision,
        batch_size: int,
        float_remainder: FloatRemainder,
    ) -> Iterator[Float32Array]:
        """Yields the logits (n, k) of every batch (n, c, h, w), in order, with n in [1, batch_size].

        For many images, of which only the results matter: the engine may run several batches at once. The other
        arguments and the errors are those of `build`.
        """
        ...


class OneBatchAtATime:
    """`Engine.logits` of an engine that runs one batch after the other."""

    def logits(
        self: Engine,
        onnx: Path,
        batches: Iterable[Float32Array],
        *,
        precision: Precision,
        batch_size: int,
        float_remainder: FloatRemainder,
    ) -> Iterator[Float32Array]:
        """Yields the logits of every batch; see `Engine.logits`."""
        built = self.build(onnx, precision=precision, batch_size=batch_size, float_remainder=float_remainder)
        runner = self.load(built.blob, precision=precision, batch_size=batch_size, float_remainder=float_remainder)
        try:
            for batch in batches:
                yield runner(batch)
        finally:
            runner.close()


def require_classifier(source: str, *, inputs: int, outputs: int) -> None:
    """EngineBuildError unless the graph called `source` has one input and one output."""
    if (inputs, outputs) != (1, 1):
        raise EngineBuildError(
            f"{source} has {inputs} inputs and {outputs} outputs; expected one of each. Export the classifier with its "
            "logits as the only output."
        )


def require_batch_size(found: int, *, asked: int) -> None:
    """EngineBuildError unless a graph or engine for batches of `found` images is for the `asked` ones."""
    if found != asked:
        raise EngineBuildError(
            f"The batch size of the graph or engine is {found}, and {asked} was asked for. Export the graph with a "
            f"free batch dimension or with batch size {asked}, and build the engine again."
        )


def pad_batch(images: Float32Array, *, shape: tuple[int, ...]) -> Float32Array:
    """Returns `images` with zero images added until they have `shape`; `images` itself if none is missing.

    Args:
        images: (n, c, h, w), float32.
        shape: (batch_size, c, h, w), what the engine was built for.

    Raises:
        ValueError: no image, more images than the batch size, another shape of image, or not float32.

    >>> pad_batch(np.ones((1, 1, 1, 2), np.float32), shape=(2, 1, 1, 2)).ravel().tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    if images.dtype != np.float32:
        raise ValueError(f"images are {images.dtype}, expected float32.")
    if images.ndim != len(shape) or images.shape[1:] != shape[1:]:
        raise ValueError(f"images have shape {images.shape}, expected (n, {', '.join(map(str, shape[1:]))}).")
    if not 1 <= len(images) <= shape[0]:
        raise ValueError(f"got {len(images)} images, expected 1 to {shape[0]}, the batch size of the engine.")
    if len(images) == shape[0]:
        return np.ascontiguousarray(images)
    batch = np.zeros(shape, np.float32)
    batch[: len(images)] = images
    return batch


def time_calls(
    run: Callable[[], object], *, warmup_ms: float, duration_s: float, min_iterations: int
) -> tuple[list[float], float]:
    """Returns the latency of each call of `run` in ms, and the time from the first to the last in s.

    `run` is called unmeasured until `warmup_ms` have passed, at least once; then until both `duration_s` have
    passed and `min_iterations` calls were made.
    """
    clock = time.perf_counter_ns
    warm_at = clock() + int(warmup_ms * 1e6)
    run()
    while clock() < warm_at:
        run()
    latencies_ms: list[float] = []
    first = before = clock()
    end_at = first + int(duration_s * 1e9)
    while before < end_at or len(latencies_ms) < min_iterations:
        run()
        after = clock()
        latencies_ms.append((after - before) / 1e6)
        before = after
    return latencies_ms, (before - first) / 1e9


def int8_share(layers: Sequence[LayerReport]) -> Int8Share:
    """Returns how much of the convolutions and linear layers ran in INT8, in percent of their number.

    A layer counts as INT8 on a side whose type is int8 or uint8. `float_layers` names those whose input is neither,
    `reformat_layers` the conversions between types.
    Without any such layer both shares are 0.

    >>> conv = LayerReport("conv", "convolution", "uint8", "fp32", "kernel")
    >>> share = int8_share([conv, LayerReport("fc", "linear", "fp32", "fp32", "kernel")])
    >>> share.layers, share.int8_input_percent, share.int8_output_percent, share.reformats, share.float_layers
    (2, 50.0, 0.0, 0, ('fc',))
    """
    weighted = [layer for layer in layers if layer.kind in _WEIGHTED_KINDS]
    count = max(len(weighted), 1)
    return Int8Share(
        layers=len(weighted),
        int8_input_percent=100 * sum(layer.input_type in _INT8_TYPES for layer in weighted) / count,
        int8_output_percent=100 * sum(layer.output_type in _INT8_TYPES for layer in weighted) / count,
        reformats=sum(layer.kind == REFORMAT for layer in layers),
        float_layers=tuple(layer.name for layer in weighted if layer.input_type not in _INT8_TYPES),
        reformat_layers=tuple(layer.name for layer in layers if layer.kind == REFORMAT),
    )
