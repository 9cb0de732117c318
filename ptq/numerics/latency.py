"""How fast is a model, and can the number be trusted?

Summaries of latency samples with trtexec's own definitions, the schedule that measures precisions in turns so
that a drifting clock meets all of them, and the warnings that a reader needs. Nothing here runs a model: what is
measured comes in as functions.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from ptq.config import Precision
from ptq.records.benchmark import EndToEnd, Measurement
from ptq.records.graph import Int8Share
from ptq.wording import first_names

Key = TypeVar("Key", bound=Hashable)
TimedCalls = Callable[[float, float, int], tuple[list[float], float]]

# trtexec warns of unstable clocks above this coefficient of variation of the compute time.
UNSTABLE_PERCENT = 2.5
# trtexec calls a run host-bound where enqueueing takes more than this share of the compute time.
HOST_BOUND_SHARE = 0.8
NAMES_IN_A_SENTENCE = 10


def percentile_ms(samples: Sequence[float], percent: float) -> float:
    """Returns the sample that `percent` percent of the samples do not exceed.

    Args:
        samples: latencies in ms, in any order, at least one.
        percent: in [0, 100].

    Returns:
        The sample, in ms, at index max(n - 1 - int((1 - percent / 100) * n), 0) of the n sorted ones, computed in
        single precision; never a value between two samples.

    Raises:
        ValueError: there is no sample, or `percent` is outside [0, 100].

    Source: `samples/common/sampleReporting.cpp` of TensorRT.

    >>> percentile_ms([4.0, 1.0, 3.0, 2.0], 75.0)
    3.0
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in [0, 100], got {percent}.")
    ordered = _sorted(samples)
    count = len(ordered)
    # In single precision, as trtexec: doubles leave out another number of samples, for example 0 of 10 at 90 %.
    left_out = int((np.float32(1) - np.float32(percent) / np.float32(100)) * np.float32(count))
    return ordered[max(count - 1 - left_out, 0)]


def median_ms(samples: Sequence[float]) -> float:
    """Returns the middle sample in ms, or the mean of the two middle ones; ValueError without samples.

    >>> median_ms([3.0, 1.0, 2.0, 10.0])
    2.5
    """
    ordered = _sorted(samples)
    count = len(ordered)
    if count % 2:
        return ordered[count // 2]
    return (ordered[count // 2 - 1] + ordered[count // 2]) / 2


def coefficient_of_variation(samples: Sequence[float]) -> float:
    """Returns the standard deviation of the samples in percent of their mean; ValueError without samples.

    The deviation is the population's, with n in the denominator, as trtexec computes it.

    >>> coefficient_of_variation([1.0, 3.0])
    50.0
    """
    count = len(_sorted(samples))
    mean = math.fsum(samples) / count
    return 100 * math.sqrt(math.fsum((sample - mean) ** 2 for sample in samples) / count) / mean


def summarize(
    precision: Precision, batch_size: int, rounds: Sequence[Sequence[float]], *, elapsed_s: float | None = None
) -> Measurement:
    """Returns the summary of the latencies of one precision at one batch size.

    Args:
        precision: what was run.
        batch_size: images per inference, at least 1.
        rounds: latencies in ms, one sequence per round, none empty.
        elapsed_s: time that the inferences of all rounds took together, in s. None: the sum of the latencies, which
            is the same where one inference starts when the one before has ended.

    Returns:
        Median, mean and percentiles over the samples of all rounds; throughput is all images over `elapsed_s`.

    Raises:
        ValueError: there is no round, or one without samples; a sample or `elapsed_s` is not positive.

    >>> summarize("int8", 2, [[1.0, 3.0], [4.0]]).throughput_images_per_s
    750.0
    """
    if not rounds or any(len(samples) == 0 for samples in rounds):
        raise ValueError(f"{precision} at batch {batch_size} has {len(rounds)} rounds, and each needs a sample.")
    samples = tuple(float(sample) for part in rounds for sample in part)
    total_s = math.fsum(samples) / 1000 if elapsed_s is None else elapsed_s
    if min(samples) <= 0 or total_s <= 0:
        raise ValueError(f"latencies must be positive, got {min(samples)} ms as the least, in {total_s} s.")
    return Measurement(
        precision=precision,
        batch_size=batch_size,
        samples_ms=samples,
        median_ms=median_ms(samples),
        mean_ms=math.fsum(samples) / len(samples),
        p90_ms=percentile_ms(samples, 90),
        p95_ms=percentile_ms(samples, 95),
        p99_ms=percentile_ms(samples, 99),
        throughput_images_per_s=batch_size * len(samples) / total_s,
        rounds_median_ms=tuple(median_ms(part) for part in rounds),
    )


def measure_interleaved(
    timed: Mapping[Precision, TimedCalls],
    *,
    batch_size: int,
    rounds: int,
    warmup_ms: float,
    duration_s: float,
    min_iterations: int,
) -> tuple[Measurement, ...]:
    """Returns one measurement per precision, in the order of `timed`, taken in turns.

    The order is A B C A B C: a machine that slows down meets every precision. Each turn warms up again, since the
    one before left the caches to another model.

    Args:
        timed: per precision, a function of (warmup_ms, duration_s, min_iterations) that returns latencies in ms and
            the time they took together in s, such as a runner's `timed_calls`.
        batch_size: images per inference.
        rounds: number of turns of each precision, at least 1.
        warmup_ms: unmeasured time at the start of each turn.
        duration_s: measured time of each precision over all rounds.
        min_iterations: least number of measured inferences of each precision over all rounds.

    Raises:
        ValueError: `rounds` is less than 1.
    """
    taken = interleave(timed, rounds=rounds, warmup_ms=warmup_ms, duration_s=duration_s, min_iterations=min_iterations)
    return tuple(
        summarize(precision, batch_size, latencies, elapsed_s=elapsed_s)
        for precision, (latencies, elapsed_s) in taken.items()
    )


def interleave(
    timed: Mapping[Key, TimedCalls], *, rounds: int, warmup_ms: float, duration_s: float, min_iterations: int
) -> dict[Key, tuple[list[list[float]], float]]:
    """Returns, for every function, its latencies in ms by round and the time they took together in s.

    The arguments are those of `measure_interleaved`, with any key in place of the precision.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    samples: dict[Key, list[list[float]]] = {key: [] for key in timed}
    elapsed_s = dict.fromkeys(timed, 0.0)
    for _ in range(rounds):
        for key, run in timed.items():
            latencies, seconds = run(warmup_ms, duration_s / rounds, math.ceil(min_iterations / rounds))
            samples[key].append(latencies)
            elapsed_s[key] += seconds
    return {key: (samples[key], elapsed_s[key]) for key in timed}


def latency_warnings(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """Returns a sentence for every measurement whose coefficient of variation is above `UNSTABLE_PERCENT`."""
    return tuple(
        f"{_title(measurement)} is unstable: the coefficient of variation of its latency is {variation:.1f} %, more "
        f"than {UNSTABLE_PERCENT} %. Compare medians, and run nothing else on the machine."
        for measurement in measurements
        if (variation := coefficient_of_variation(measurement.samples_ms)) > UNSTABLE_PERCENT
    )


def red_flags(measurements: Sequence[Measurement], shares: Mapping[int, Int8Share]) -> tuple[str, ...]:
    """Returns a sentence for each batch size at which INT8's median is not below that of the best float precision.

    Args:
        measurements: every precision and batch size measured.
        shares: by batch size, what the INT8 engine ran; the sentence names its float layers and its reformats.
    """
    flags = []
    for int8 in measurements:
        floats = [other for other in measurements if other.precision != "int8" and other.batch_size == int8.batch_size]
        if int8.precision != "int8" or not floats:
            continue
        best = min(floats, key=lambda measurement: measurement.median_ms)
        if int8.median_ms >= best.median_ms:
            flags.append(
                f"{_title(int8)} is not faster than the best float precision: its median is {int8.median_ms:.3f} ms, "
                f"and {best.precision.upper()}'s is {best.median_ms:.3f} ms. {_at_fault(shares.get(int8.batch_size))}"
            )
    return tuple(flags)


def _at_fault(share: Int8Share | None) -> str:
    """What kept the INT8 engine from being fast, by name."""
    if share is None or share.layers == 0:
        return "The engine does not say which layers ran in INT8."
    parts = [
        f"{len(share.float_layers)} of {share.layers} convolutions and linear layers ran in float"
        f"{_named(share.float_layers)}",
        f"the engine converts between types {share.reformats} times{_named(share.reformat_layers)}",
    ]
    return f"{'; '.join(parts)}."


def _named(names: Sequence[str]) -> str:
    return f" ({first_names(names, NAMES_IN_A_SENTENCE)})" if names else ""


def end_to_end(
    precision: Precision,
    batch_size: int,
    *,
    upload_ms: Sequence[float],
    compute_ms: Sequence[float],
    download_ms: Sequence[float],
    enqueue_ms: Sequence[float],
    elapsed_s: float,
) -> EndToEnd:
    """Returns the summary of inferences with their transfers; latency is upload + compute + download, as in trtexec.

    Args:
        precision: what was run.
        batch_size: images per inference.
        upload_ms: copies to the device, one per inference, in ms.
        compute_ms: the device's work, in ms.
        download_ms: copies back, in ms.
        enqueue_ms: the host's time to hand an inference over, in ms.
        elapsed_s: time that all inferences took together, in s, positive.

    Raises:
        ValueError: there is no sample, or the sequences differ in length.

    >>> found = end_to_end(
    ...     "int8", 2, upload_ms=[1.0], compute_ms=[2.0], download_ms=[0.5], enqueue_ms=[0.1], elapsed_s=0.004
    ... )
    >>> found.median_ms, found.throughput_images_per_s
    (3.5, 500.0)
    """
    samples = tuple(math.fsum(parts) for parts in zip(upload_ms, compute_ms, download_ms, strict=True))
    return EndToEnd(
        precision=precision,
        batch_size=batch_size,
        samples_ms=samples,
        median_ms=median_ms(samples),
        p99_ms=percentile_ms(samples, 99),
        throughput_images_per_s=batch_size * len(samples) / elapsed_s,
        upload_median_ms=median_ms(upload_ms),
        compute_median_ms=median_ms(compute_ms),
        download_median_ms=median_ms(download_ms),
        enqueue_median_ms=median_ms(enqueue_ms),
    )


def transfer_warnings(found: Sequence[EndToEnd]) -> tuple[str, ...]:
    """Returns trtexec's warnings: the host enqueues too slowly, or the upload takes as long as the compute."""
    sentences = []
    for item in found:
        title = f"{item.precision.upper()} at batch size {item.batch_size}"
        if item.enqueue_median_ms > HOST_BOUND_SHARE * item.compute_median_ms:
            sentences.append(
                f"{title} is bound by the host: enqueueing takes {item.enqueue_median_ms:.3f} ms, more than "
                f"{HOST_BOUND_SHARE} of the {item.compute_median_ms:.3f} ms of compute. Its compute-only latency is "
                "that of a CUDA graph; without one it is higher. Use a CUDA graph, or a larger batch."
            )
        if item.upload_median_ms >= item.compute_median_ms:
            sentences.append(
                f"{title} is bound by transfers: the upload takes {item.upload_median_ms:.3f} ms, and the compute "
                f"{item.compute_median_ms:.3f} ms. Send uint8 pixels, or overlap the upload with the batch before."
            )
    return tuple(sentences)


def _sorted(samples: Sequence[float]) -> list[float]:
    if len(samples) == 0:
        raise ValueError("latencies cannot be summarized: there is no sample.")
    return sorted(samples)


def _title(measurement: Measurement) -> str:
    return f"{measurement.precision.upper()} at batch size {measurement.batch_size}"
