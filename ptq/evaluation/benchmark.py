"""How fast are the built engines on this machine?

Loads engines, feeds them random images and measures them side by side. What a percentile is and how rounds are
interleaved is decided in `latency`.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from ptq.config import Precision
from ptq.engines import int8_share, open_engine, trtexec
from ptq.engines.base import Engine, Runner, SeparatesTransfers
from ptq.engines.isa import processor_name
from ptq.errors import EngineBuildError
from ptq.graph.summary import summarize_onnx
from ptq.numerics.latency import (
    TimedCalls,
    end_to_end,
    interleave,
    latency_warnings,
    measure_interleaved,
    red_flags,
    summarize,
    transfer_warnings,
)
from ptq.records.benchmark import BenchmarkRecord, EndToEnd, Measurement, PublishedLatency
from ptq.records.graph import EngineRecord, Int8Share

COMPUTE_ONLY = "compute alone, in a CUDA graph; with transfers measured apart"
ONE_MODE = "compute of a call on the CPU, where nothing is transferred"
# Enough for a sign test, and each so short that the machine is as busy for the one as for the other.
LEAST_TURNS = 16
# A turn's first call finds the caches full of the other engine; of three it is not the median.
_CALLS_A_TURN = 3


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A built engine and the file that holds it."""

    record: EngineRecord
    blob: Path


def measure_engines(
    engines: Sequence[LoadedEngine],
    *,
    threads: int,
    float_remainder: Literal["fp32", "bf16"],
    input_shape: tuple[int, int, int],
    warmup_ms: float,
    duration_s: float,
    min_iterations: int,
    rounds: int,
) -> BenchmarkRecord:
    """Returns latency and throughput of every engine; those of one batch size are interleaved over rounds.

    Args:
        engines: at least one, all of one engine.
        threads: CPU threads; 0 for all cores.
        float_remainder: precision of what stays in float in an INT8 graph.
        input_shape: (c, h, w).
        warmup_ms: time run before each round's measurement, in milliseconds.
        duration_s: time measured per engine over all rounds, in seconds.
        min_iterations: least number of inferences per engine.
        rounds: rounds over which the engines are interleaved.

    Raises:
        EngineBuildError: an engine cannot be loaded, or was built for another instruction set.
    """
    identity = engines[0].record.engine
    engine = open_engine(identity.name, threads=threads)
    measurements: list[Measurement] = []
    transfers: list[EndToEnd] = []
    for batch_size in sorted({item.record.batch_size for item in engines}):
        images = _random_images(batch_size, *input_shape)
        timed: dict[Precision, TimedCalls] = {}
        runners: dict[Precision, Runner] = {}
        for item in engines:
            if item.record.batch_size != batch_size:
                continue
            runner = _loaded(engine, item, float_remainder)
            runners[item.record.precision] = runner
            timed[item.record.precision] = _timed(runner, images)
        try:
            measurements += measure_interleaved(
                timed,
                batch_size=batch_size,
                rounds=rounds,
                warmup_ms=warmup_ms,
                duration_s=duration_s,
                min_iterations=min_iterations,
            )
            transfers += [
                _with_transfers(runner, precision, images, warmup_ms=warmup_ms, iterations=max(min_iterations, 10))
                for precision, runner in runners.items()
                if isinstance(runner, SeparatesTransfers)
            ]
        finally:
            for runner in runners.values():
                runner.close()
    shares = {item.record.batch_size: item.record.int8 for item in engines if item.record.precision == "int8"}
    checks = (
        trtexec.cross_checks(
            [(item.blob, found) for item in engines if (found := _measured(item, measurements)) is not None],
            version=identity.version,
            warmup_ms=warmup_ms,
            duration_s=duration_s,
        )
        if identity.name == "tensorrt"
        else ()
    )
    return BenchmarkRecord(
        engine=identity,
        machine=machine_description(),
        clock_mhz=_clock_mhz(),
        measurements=tuple(measurements),
        warnings=(*latency_warnings(measurements), *transfer_warnings(transfers), *trtexec.disagreements(checks)),
        red_flags=red_flags(measurements, shares),
        mode=COMPUTE_ONLY if transfers else ONE_MODE,
        end_to_end=tuple(transfers),
        cross_checks=checks,
    )


def measure_against(
    new: Sequence[LoadedEngine],
    published: Sequence[LoadedEngine],
    *,
    threads: int,
    float_remainder: Literal["fp32", "bf16"],
    input_shape: tuple[int, int, int],
    warmup_ms: float,
    duration_s: float,
    min_iterations: int,
    rounds: int,
) -> tuple[PublishedLatency, ...]:
    """Returns the latencies of a new model's engines and of those in service, of each batch size in short turns.

    The other arguments are those of `measure_engines`; there are at least `LEAST_TURNS` rounds, warmed up once.

    Raises:
        EngineBuildError: an engine cannot be loaded, or was built for another instruction set.
        ValueError: the two have engines of other batch sizes.
    """
    sizes = [{item.record.batch_size: item for item in items} for items in (new, published)]
    if sizes[0].keys() != sizes[1].keys():
        raise ValueError(f"The new engines have the batch sizes {list(sizes[0])}, those in service {list(sizes[1])}.")
    engine = open_engine(new[0].record.engine.name, threads=threads)
    found = []
    for batch_size in sorted(sizes[0]):
        images = _random_images(batch_size, *input_shape)
        runners = [_loaded(engine, items[batch_size], float_remainder) for items in sizes]
        timed = {index: _timed(runner, images) for index, runner in enumerate(runners)}
        try:
            interleave(timed, rounds=1, warmup_ms=warmup_ms, duration_s=0.0, min_iterations=1)
            taken = interleave(
                timed,
                rounds=max(rounds, LEAST_TURNS),
                warmup_ms=0.0,
                duration_s=duration_s,
                min_iterations=max(min_iterations, _CALLS_A_TURN * LEAST_TURNS),
            )
        finally:
            for runner in runners:
                runner.close()
        ours, theirs = (
            summarize("int8", batch_size, samples, elapsed_s=elapsed_s) for samples, elapsed_s in taken.values()
        )
        ratios = tuple(a / b for a, b in zip(ours.rounds_median_ms, theirs.rounds_median_ms, strict=True))
        found.append(PublishedLatency(batch_size, ours.median_ms, theirs.median_ms, ratios))
    return tuple(found)


def _measured(item: LoadedEngine, measurements: Sequence[Measurement]) -> Measurement | None:
    wanted = (item.record.precision, item.record.batch_size)
    return next((found for found in measurements if (found.precision, found.batch_size) == wanted), None)


def _with_transfers(
    runner: SeparatesTransfers, precision: Precision, images: np.ndarray, *, warmup_ms: float, iterations: int
) -> EndToEnd:
    found = runner.timed_transfers(images, warmup_ms=warmup_ms, iterations=iterations)
    return end_to_end(
        precision,
        len(images),
        upload_ms=found.upload_ms,
        compute_ms=found.compute_ms,
        download_ms=found.download_ms,
        enqueue_ms=found.enqueue_ms,
        elapsed_s=found.elapsed_s,
    )


def _loaded(engine: Engine, item: LoadedEngine, float_remainder: Literal["fp32", "bf16"]) -> Runner:
    built_for = item.record.engine.isa
    if built_for and built_for != engine.identity().isa:
        raise EngineBuildError(
            f"The engine {item.blob.name} was built for {built_for}, and kernels of this process use "
            f"{engine.identity().isa}. Expected the same instruction set; build it again here from its ONNX file."
        )
    return engine.load(
        item.blob.read_bytes(),
        precision=item.record.precision,
        batch_size=item.record.batch_size,
        float_remainder=float_remainder,
    )


def _random_images(*shape: int) -> np.ndarray:
    """The same images for every engine, (n, c, h, w)."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _timed(runner: Runner, images: np.ndarray) -> TimedCalls:
    return lambda warmup_ms, duration_s, min_iterations: runner.timed_calls(
        images, warmup_ms=warmup_ms, duration_s=duration_s, min_iterations=min_iterations
    )


@dataclass(frozen=True, slots=True)
class FileMeasurement:
    """One ONNX file measured in one precision, and what ran in INT8."""

    file: str
    measurement: Measurement
    int8: Int8Share


def measure_files(
    plan: Sequence[tuple[Path, Precision, int]],
    *,
    engine: Engine,
    duration_s: float,
    rounds: int = 3,
    warmup_ms: float = 200.0,
    min_iterations: int = 10,
) -> list[FileMeasurement]:
    """Returns latency and throughput of ONNX files; those of one batch size are interleaved over rounds.

    Args:
        plan: file, precision and batch size of everything measured.
        engine: what runs them.
        duration_s: time measured per entry over all rounds, in seconds.
        rounds: rounds over which the entries are interleaved.
        warmup_ms: time run before each round's measurement, in milliseconds.
        min_iterations: least number of inferences per entry.

    Raises:
        EngineBuildError: the engine refuses a file.
    """
    results = []
    for batch_size in dict.fromkeys(size for _, _, size in plan):
        entries = [entry for entry in plan if entry[2] == batch_size]
        shares, timed = {}, {}
        for entry in entries:
            path, precision, _ = entry
            built = engine.build(path, precision=precision, batch_size=batch_size, float_remainder="fp32")
            runner = engine.load(built.blob, precision=precision, batch_size=batch_size, float_remainder="fp32")
            images = _random_images(batch_size, *(size or 224 for size in summarize_onnx(path).input_shape[1:]))
            timed[entry] = _timed(runner, images)
            shares[entry] = int8_share(built.layers)
        taken = interleave(
            timed, rounds=rounds, warmup_ms=warmup_ms, duration_s=duration_s, min_iterations=min_iterations
        )
        for entry, (samples, elapsed_s) in taken.items():
            measurement = summarize(entry[1], batch_size, samples, elapsed_s=elapsed_s)
            results.append(FileMeasurement(entry[0].name, measurement, shares[entry]))
    return results


def machine_description() -> str:
    """Returns processor, cores and system of this machine in one line."""
    return f"{processor_name()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _clock_mhz() -> float | None:
    frequency = psutil.cpu_freq()
    return round(frequency.current, 1) if frequency else None
