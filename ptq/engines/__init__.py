"""Which inference engine runs the model?

`open_engine` turns a name from the configuration into an engine. Building, inspecting and running are
described in `ptq.engines.interface`; each adapter file is the only importer of its library.
"""

import logging
import os
from pathlib import Path

from ptq.config import ENGINES
from ptq.engines.base import ActivationReader, Engine, int8_share
from ptq.errors import EngineBuildError, UsageError

__all__ = ["int8_share", "open_activation_readers", "open_engine", "open_reference"]

logger = logging.getLogger(__name__)


def open_engine(name: str, *, threads: int, timing_cache: bytes = b"") -> Engine:
    """Returns the engine called `name`, ready to build and load graphs.

    Args:
        name: `auto` takes TensorRT where a CUDA device and TensorRT are usable, else OpenVINO.
        threads: CPU threads of an inference; 0 for all cores this process may use. A GPU ignores it.
        timing_cache: what an earlier build of this engine learned; only TensorRT uses it.

    Raises:
        UsageError: there is no engine of that name, or `threads` is negative.
        EngineBuildError: TensorRT was asked for and cannot be used on this machine.
    """
    if name not in ENGINES:
        known = ", ".join(ENGINES)
        raise UsageError(f"engine.name is {name!r}. The engines are {known}. Give one of these with `--engine`.")
    if threads < 0:
        raise UsageError(f"engine.threads is {threads}. Expected 0, for all cores, or a positive number of threads.")
    # Each adapter is imported where it is chosen: an engine may be absent on a machine.
    if name in ("auto", "tensorrt"):
        from ptq.engines import tensorrt

        problem = tensorrt.find_problem()
        if not problem:
            return tensorrt.TensorRtEngine(timing_cache=timing_cache)
        if name == "tensorrt":
            raise EngineBuildError(
                f"Engine tensorrt cannot run here: {problem}. It needs an NVIDIA GPU with its driver, tensorrt, and a "
                "torch with CUDA. Use `--engine openvino`, or install the extra `pip install .[tensorrt]` on a machine "
                "with a GPU."
            )
        logger.info("Engine auto takes openvino: %s.", problem)
    if name == "onnxruntime":
        from ptq.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(threads=threads or _count_usable_cores())
    from ptq.engines.openvino import OpenVinoEngine

    return OpenVinoEngine(threads=threads or _count_usable_cores())


def open_reference(*, threads: int) -> Engine:
    """Returns the numerical reference: ONNX Runtime, which runs an INT8 graph in float, by the letter of ONNX.

    Args:
        threads: CPU threads of an inference; 0 for all cores this process may use.
    """
    from ptq.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(threads=threads or _count_usable_cores(), by_the_letter=True)


def open_activation_readers(observed: Path, *, workers: int) -> list[ActivationReader]:
    """Returns functions that read the observed tensors of an image, one per worker.

    Calibration runs on OpenVINO in FP32 whatever engine the model is for: its activations are those of PyTorch up to
    float rounding, and its forward pass is the fastest on a CPU.

    Args:
        observed: FP32 graph of batch 1 whose outputs are the logits and the observed tensors.
        workers: readers that are called at the same time, one thread each; 0 for all cores.

    Raises:
        EngineBuildError: the graph is refused.
    """
    from ptq.engines.openvino_activations import open_activation_readers as open_readers

    return open_readers(observed, workers=workers or _count_usable_cores())


def _count_usable_cores() -> int:
    """Cores the scheduler gives to this process, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
