"""What does NVIDIA's own trtexec measure for an engine?

Makes the command line that each TensorRT generation understands, reads what the program prints, and holds its median
GPU compute time against this project's. trtexec is in no Python package, so that everything here is optional.
"""

import logging
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq.errors import EngineBuildError
from ptq.records.benchmark import CrossCheck, Measurement

logger = logging.getLogger(__name__)

# Own median and trtexec's should agree this well; beyond it one of them measured something else.
AGREEMENT_PERCENT = 5.0
_METRICS = {"GPU Compute Time": "compute", "Latency": "latency", "Enqueue Time": "enqueue"}
_NUMBER = r"([0-9.eE+-]+)"


@dataclass(frozen=True, slots=True)
class TimeSummary:
    """One of trtexec's metrics, in ms; `percentiles_ms` by percent."""

    median_ms: float
    mean_ms: float
    min_ms: float
    max_ms: float
    percentiles_ms: dict[float, float]


@dataclass(frozen=True, slots=True)
class TrtexecResult:
    """What a run of trtexec printed. Throughput is in inferences per second, not in images."""

    compute: TimeSummary
    latency: TimeSummary | None
    enqueue: TimeSummary | None
    throughput_queries_per_s: float
    warnings: tuple[str, ...]


def command_line(
    engine: Path, *, version: tuple[int, int], warmup_ms: float, duration_s: float, transfers: bool, program: str
) -> tuple[str, ...]:
    """Returns the arguments that measure a built engine.

    Args:
        engine: the serialized engine, static or with one shape.
        version: major and minor of TensorRT.
        warmup_ms: unmeasured time, in ms.
        duration_s: measured time, in s; trtexec takes whole seconds, at least 1.
        transfers: measure with transfers and without a CUDA graph; else compute alone, in a CUDA graph with spin wait.
        program: the path of trtexec.

    Compute alone is asked for by the same three options in every generation: from 11 on they are the default and only
    print a note. Transfers are the default before 11, and must be asked for from 11 on.
    """
    mode = ("--noDataTransfers", "--useSpinWait", "--useCudaGraph")
    if transfers:
        mode = ("--includeDataTransfers", "--noCudaGraph") if version >= (11, 0) else ()  # type: ignore[assignment]
    return (
        program,
        f"--loadEngine={engine}",
        f"--warmUp={round(warmup_ms)}",
        f"--duration={max(round(duration_s), 1)}",
        "--iterations=10",
        "--percentile=90,95,99",
        *mode,
    )


def parse_output(text: str) -> TrtexecResult:
    """Returns the numbers in what trtexec printed, of 8.6 to 11.

    Raises:
        EngineBuildError: the text holds no GPU compute time or no throughput.
    """
    found = {name: _summary(text, title) for title, name in _METRICS.items()}
    throughput = re.search(rf"Throughput: {_NUMBER} qps", text)
    compute = found["compute"]
    if compute is None or throughput is None:
        raise EngineBuildError(
            f"trtexec printed {len(text)} characters without a GPU compute time and a throughput; the last line is "
            f"{text.strip().splitlines()[-1][:200] if text.strip() else 'empty'!r}. Expected a performance summary. "
            "Run the command by hand."
        )
    warnings = tuple(line.strip() for line in re.findall(r"\[W\] (?!\[TRT\])(.+)", text))
    return TrtexecResult(compute, found["latency"], found["enqueue"], float(throughput.group(1)), warnings)


def _summary(text: str, title: str) -> TimeSummary | None:
    line = re.search(rf"\] {re.escape(title)}: (min = .+)", text)
    if line is None:
        return None
    values = {name: float(value) for name, value in re.findall(rf"(min|max|mean|median) = {_NUMBER} ms", line.group(1))}
    if len(values) < 4:
        return None
    percentiles = {
        float(percent): float(value)
        for percent, value in re.findall(rf"percentile\({_NUMBER}%\) = {_NUMBER} ms", line.group(1))
    }
    return TimeSummary(values["median"], values["mean"], values["min"], values["max"], percentiles)


def cross_checks(
    engines: Sequence[tuple[Path, Measurement]], *, version: str, warmup_ms: float, duration_s: float
) -> tuple[CrossCheck, ...]:
    """Returns trtexec's median beside our own for every engine; nothing where there is no trtexec on the PATH.

    Args:
        engines: the serialized engine and what was measured of it.
        version: TensorRT's version, as it spells it.
        warmup_ms: unmeasured time of each run, in ms.
        duration_s: measured time of each run, in s.
    """
    program = shutil.which("trtexec")
    if program is None or not engines:
        return ()
    major, minor = (int(part) for part in version.split(".")[:2])
    checks = []
    for blob, own in engines:
        command = command_line(
            blob, version=(major, minor), warmup_ms=warmup_ms, duration_s=duration_s, transfers=False, program=program
        )
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=120 + 4 * duration_s, check=False, encoding="utf-8"
            )
            found = parse_output(done.stdout + done.stderr)
        except (EngineBuildError, OSError, subprocess.TimeoutExpired) as error:
            # The benchmark has its own numbers; a cross-check that cannot be made must not cost them.
            logger.warning("trtexec could not measure %s: %s", blob.name, error)
            continue
        shown = " ".join(("trtexec", f"--loadEngine={blob.name}", *command[2:]))
        checks.append(CrossCheck(own.precision, own.batch_size, found.compute.median_ms, own.median_ms, shown))
    return tuple(checks)


def disagreements(checks: Sequence[CrossCheck]) -> tuple[str, ...]:
    """Returns a sentence for every engine whose two medians differ by more than `AGREEMENT_PERCENT`.

    >>> disagreements([CrossCheck("int8", 1, 1.0, 1.04, "trtexec")])
    ()
    """
    return tuple(
        f"{check.precision.upper()} at batch size {check.batch_size} takes {check.own_median_ms:.3f} ms here and "
        f"{check.trtexec_median_ms:.3f} ms in trtexec, which is more than {AGREEMENT_PERCENT:g} % apart. Check that "
        f"nothing else runs on the GPU, and repeat: {check.command}"
        for check in checks
        if abs(check.own_median_ms / check.trtexec_median_ms - 1) > AGREEMENT_PERCENT / 100
    )
