"""How does a graph do under each instruction set that this processor has?

oneDNN reads its limit once, so each instruction set has a process of its own: `python -m
ptq.evaluation.instruction_sets FOLDER`, which reads what to do in the folder and writes there what it found.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
from jaxtyping import Float

from ptq.data.images import network_input
from ptq.engines import open_engine, open_reference
from ptq.engines.base import Engine, FloatRemainder
from ptq.engines.isa import current_isa, limited_environment, require_isa
from ptq.errors import EngineBuildError
from ptq.evaluation.evaluate import SplitImages, logits_of
from ptq.numerics.metrics import split_metrics
from ptq.records.evaluation import IsaEvaluation

_WARMUP_MS, _DURATION_S, _ITERATIONS = 100.0, 0.5, 10


def evaluate_under_isas(
    graph: Path,
    isas: Sequence[str],
    images: SplitImages,
    *,
    precision: Literal["fp32", "int8"],
    batch_size: int,
    threads: int,
    float_remainder: FloatRemainder,
    mean: Sequence[float],
    std: Sequence[float],
    reference_logits: Float[np.ndarray, "n k"] | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[IsaEvaluation, ...]:
    """Returns metrics and latency of a graph on OpenVINO under each instruction set, one after the other.

    Args:
        graph: ONNX file.
        isas: names that `play_isa` takes, or `native` for all that the processor has.
        images: those to evaluate on.
        precision: the precision that the graph is built in.
        batch_size: images per inference.
        threads: CPU threads; 0 for all cores.
        float_remainder: precision of what stays in float in an INT8 graph.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
        reference_logits: what SQNR and agreement refer to; those of the graph in float (ONNX Runtime) where None.
        progress: called with (instruction sets done, instruction sets in all).

    Raises:
        UsageError: there is no instruction set of that name.
        EngineBuildError: this processor lacks it, or its process failed.
    """
    for name in isas:
        if name != "native":
            require_isa(name)
    found: list[IsaEvaluation] = []
    if not isas:
        return ()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        np.save(folder / "pixels.npy", images.pixels)
        settings = {"graph": str(graph.absolute()), "precision": precision, "batch_size": batch_size}
        settings |= {"threads": threads, "float_remainder": float_remainder, "mean": list(mean), "std": list(std)}
        (folder / "settings.json").write_text(json.dumps(settings))
        if reference_logits is None:
            reference_logits = _logits(folder, settings, open_reference(threads=threads))
        for done, name in enumerate(isas, start=1):
            isa, median_ms = _run(folder, name)
            logits = np.load(folder / "logits.npy", allow_pickle=False)
            metrics = split_metrics(logits, images.labels, split=images.split, reference_logits=reference_logits)
            found.append(IsaEvaluation(isa=isa, metrics=metrics, median_ms=median_ms))
            if progress:
                progress(done, len(isas))
    return tuple(found)


def _run(folder: Path, name: str) -> tuple[str, float]:
    """The instruction set that a process limited to `name` used, and its median latency at batch 1 in ms."""
    # By the function's name, so that the code of the other process belongs to the key of the stage that starts it.
    command = [sys.executable, "-m", _main.__module__, str(folder)]
    done = subprocess.run(command, env=limited_environment(name), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EngineBuildError(
            f"The process that runs the graph under {name} ended with status {done.returncode}: {last}. Expected its "
            "logits. Evaluate without --isa to see whether the graph runs at all."
        )
    found = json.loads((folder / "found.json").read_text())
    return str(found["isa"]), float(found["median_ms"])


def _logits(folder: Path, settings: dict[str, object], engine: Engine) -> Float[np.ndarray, "n k"]:
    batch_size = cast("int", settings["batch_size"])
    (logits,) = logits_of(
        lambda batches: engine.logits(
            Path(str(settings["graph"])),
            batches,
            precision=cast('Literal["fp32", "int8"]', settings["precision"]),
            batch_size=batch_size,
            float_remainder=cast("FloatRemainder", settings["float_remainder"]),
        ),
        [np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)],
        batch_size=batch_size,
        mean=cast("list[float]", settings["mean"]),
        std=cast("list[float]", settings["std"]),
    )
    return logits


def _main(folder: Path) -> None:
    """What the process of one instruction set does."""
    settings = json.loads((folder / "settings.json").read_text())
    options = {name: settings[name] for name in ("precision", "float_remainder")}
    engine = open_engine("openvino", threads=settings["threads"])
    np.save(folder / "logits.npy", _logits(folder, settings, engine))
    first = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)[:1]
    image = network_input(first, mean=settings["mean"], std=settings["std"])
    built = engine.build(Path(settings["graph"]), batch_size=1, **options)
    runner = engine.load(built.blob, batch_size=1, **options)
    samples, _ = runner.timed_calls(image, warmup_ms=_WARMUP_MS, duration_s=_DURATION_S, min_iterations=_ITERATIONS)
    found = {"isa": current_isa(), "median_ms": float(np.median(samples))}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
