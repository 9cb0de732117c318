"""How fast is a model?"""

import statistics
from dataclasses import dataclass

from ptq.config import Precision
from ptq.records.graph import EngineIdentity


@dataclass(frozen=True, slots=True)
class Measurement:
    """Latency of one precision at one batch size. `samples_ms` are the raw measurements of every round, in order."""

    precision: Precision
    batch_size: int
    samples_ms: tuple[float, ...]
    median_ms: float
    mean_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    throughput_images_per_s: float
    rounds_median_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Latency of one precision at one batch size with its transfers, where the engine measures compute apart.

    `samples_ms` are upload + compute + download of one inference at a time; throughput is over the clock of the host.
    """

    precision: Precision
    batch_size: int
    samples_ms: tuple[float, ...]
    median_ms: float
    p99_ms: float
    throughput_images_per_s: float
    upload_median_ms: float
    compute_median_ms: float
    download_median_ms: float
    enqueue_median_ms: float


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """The same engine measured by trtexec: its median GPU compute time and what this project measured, in ms."""

    precision: Precision
    batch_size: int
    trtexec_median_ms: float
    own_median_ms: float
    command: str


@dataclass(frozen=True, slots=True)
class BenchmarkRecord:
    """Latency and throughput of every precision and batch size, measured interleaved on one machine.

    `red_flags` are sentences about batch sizes at which INT8 does not pay. `mode` says what a latency covers.
    `end_to_end` is empty where the engine measures only one thing.
    """

    engine: EngineIdentity
    machine: str
    clock_mhz: float | None
    measurements: tuple[Measurement, ...]
    warnings: tuple[str, ...]
    red_flags: tuple[str, ...] = ()
    mode: str = ""
    end_to_end: tuple[EndToEnd, ...] = ()
    cross_checks: tuple[CrossCheck, ...] = ()

    def of(self, precision: str, batch_size: int) -> Measurement | None:
        """Returns the measurement of `precision` at `batch_size` images, None if there is none."""
        for measurement in self.measurements:
            if measurement.precision == precision and measurement.batch_size == batch_size:
                return measurement
        return None


@dataclass(frozen=True, slots=True)
class PublishedLatency:
    """Median latencies in ms of the new graph and of the version in service, measured in turns.

    `turns_ratio` is new over published, turn by turn.
    """

    batch_size: int
    new_median_ms: float
    published_median_ms: float
    turns_ratio: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """New over published, the median of the turns: above 1 the new graph is slower.

        A machine that is busy for a while slows both of a turn, where it may slow most samples of one alone.
        """
        return statistics.median(self.turns_ratio)
