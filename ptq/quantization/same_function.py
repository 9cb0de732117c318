"""Is the network behind the quantizers still the network that was given?

A template is written from a changed copy of a network: traced, folded, equalized, its modules replaced. Without its
quantizers it must compute what the FP32 graph computes; otherwise every candidate made from it is another network.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from ptq.engines import open_reference
from ptq.errors import ExportError
from ptq.graph.operations import DEQUANTIZE, QUANTIZE
from ptq.wording import first_line

# Folding and equalization move float results by rounding.
_TOLERANCE = 1e-3
_IMAGES = 2


def without_quantizers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy of a Q/DQ graph whose readers read what each Q reads; a DQ of stored integers stays."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    sources = {node.output[0]: node.input[0] for node in copy.graph.node if node.op_type == QUANTIZE}
    bare: dict[str, str] = {}
    kept = []
    for node in copy.graph.node:
        if node.op_type == QUANTIZE:
            continue
        if node.op_type == DEQUANTIZE and node.input[0] in sources:
            source = sources[node.input[0]]
            bare[node.output[0]] = bare.get(source, source)
        else:
            kept.append(node)
    for node in kept:
        for position, name in enumerate(node.input):
            node.input[position] = bare.get(name, name)
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return copy


def require_same_function(template: Path, network: Path | nn.Module, *, input_shape: tuple[int, int, int]) -> None:
    """Runs random images through a template without its quantizers, and through the network it was written from.

    That is the network with the weights that the template has: channels scaled against each other keep the logits of
    calibration images, and through a ReLU6 those of no others.

    Args:
        template: a Q/DQ template.
        network: its float graph, or the network in `eval()`.
        input_shape: (c, h, w).

    Raises:
        ExportError: they give different logits.
    """
    images = random_images(input_shape)
    if isinstance(network, nn.Module):
        with torch.no_grad():
            expected = torch.cat([network(torch.from_numpy(image[None])) for image in images]).numpy()
    else:
        expected = _logits(network, images)
    with tempfile.TemporaryDirectory() as directory:
        bare = Path(directory) / "bare.onnx"
        bare.write_bytes(without_quantizers(onnx.load(template)).SerializeToString())
        found = _logits(bare, images)
    difference = _difference(found, expected)
    if difference:
        raise ExportError(
            f"The quantized graph is not the network that was given: without its quantizers {difference}. Something "
            "that the network does in place, or depends on its own state, was lost. Export it to ONNX and give that "
            "file."
        )


def require_same_export(
    network: nn.Module, path: Path, *, input_shape: tuple[int, int, int], batch_size: int | None = None
) -> None:
    """Runs random images through a network and through its ONNX export.

    A network that gives other logits each time, or cannot run, is not asked.

    Args:
        network: in `eval()`.
        path: its export.
        input_shape: (c, h, w).
        batch_size: of the export, in images; None where it is free.

    Raises:
        ExportError: they give different logits, or the export cannot run.
    """
    images = random_images(input_shape)
    try:
        with torch.no_grad():
            expected, again = (network(torch.from_numpy(images)) for _ in range(2))
    except Exception:  # `check_runs` says what is wrong
        return
    if not isinstance(expected, torch.Tensor) or not torch.equal(expected, again):
        return
    try:
        found = _logits(path, images, batch_size)
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise ExportError(
            f"The ONNX export of {type(network).__name__} cannot run {_IMAGES} images: {first_line(error)}. Expected a "
            "forward() that takes any number of images."
        ) from error
    difference = _difference(found, expected.numpy())
    if difference:
        raise ExportError(
            f"The ONNX export of {type(network).__name__} is another network: {difference}. An export holds what "
            "forward() did for one image; one that decides by the image, or keeps something between calls, cannot be "
            "exported so. Take that out of forward()."
        )


def random_images(input_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the same few images every time, float32 (n, c, h, w) in -1 to 1."""
    return np.random.default_rng(0).uniform(-1, 1, (_IMAGES, *input_shape)).astype(np.float32)


def _logits(graph: Path, images: np.ndarray, batch_size: int | None = None) -> np.ndarray:
    size = batch_size or len(images)
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    found = open_reference(threads=1).logits(graph, batches, precision="fp32", batch_size=size, float_remainder="fp32")
    return np.concatenate(list(found))


def _difference(found: np.ndarray, expected: np.ndarray) -> str:
    """By how much logits differ, empty where they do not beyond rounding, or are not finite."""
    if not np.isfinite(expected).all():
        return ""
    if found.shape != expected.shape:
        return f"its logits are {found.shape} for {len(expected)} random images, and the network's {expected.shape}"
    largest, difference = float(np.abs(expected).max()), float(np.abs(found - expected).max())
    if difference <= _TOLERANCE * max(largest, 1e-6):
        return ""
    return f"its logits differ by {difference:.3g} for a random image, where the network's go up to {largest:.3g}"
