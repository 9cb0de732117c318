"""Does the engine compute what the INT8 file says, and if not, where do they part and why?

Three models see the same images: FP32, the INT8 model on the engine, and its file as ONNX Runtime computes it in float
with every Q and DQ where the file has it. Quantization moves the last two away from FP32, and by the same; what the
engine loses beyond that is a fault of its kernels on this processor, or of how it fuses the graph. Whether the file is
what was decided is `graph.against_plan`'s question.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from jaxtyping import Float

from ptq.config import Precision
from ptq.engines import open_reference
from ptq.engines.base import Engine, FloatRemainder
from ptq.engines.isa import adds_in_16_bits
from ptq.graph.pair_sums import integer_layer
from ptq.graph.prefixes import Cut, beginning_of, cuts_of, without_quantizers
from ptq.numerics.metrics import sqnr_db, top1_predictions
from ptq.numerics.saturation import Runtime
from ptq.records.parity import Cause, Likeness, ParityRecord, Parting

# Images on which the three are compared, and those on which the layer is sought.
IMAGES = 64
_IMAGES_TO_SEARCH = 8
# What an engine may lose against its file: twice what other fusions of sound graphs were seen to cost.
LARGEST_LOSS_DB = 1.0
# Above it the noise is too small to change an answer, and rounding alone moves it by more than `LARGEST_LOSS_DB`.
_GOOD_ENOUGH_DB = 35.0
_FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class _Runs:
    """An INT8 graph on the engine, and in float."""

    engine: Engine
    threads: int
    batch_size: int
    float_remainder: FloatRemainder

    def of_engine(self, graph: Path, images: Float[np.ndarray, "n c h w"]) -> np.ndarray:
        return self._run(self.engine, graph, images, "int8", self.float_remainder)

    def in_float(
        self, graph: Path, images: Float[np.ndarray, "n c h w"], *, precision: Precision = "int8"
    ) -> np.ndarray:
        return self._run(open_reference(threads=self.threads), graph, images, precision, "fp32")

    def _run(
        self,
        engine: Engine,
        graph: Path,
        images: Float[np.ndarray, "n c h w"],
        precision: Precision,
        remainder: FloatRemainder,
    ) -> np.ndarray:
        size = self.batch_size
        batches = [images[start : start + size] for start in range(0, len(images), size)]
        found = engine.logits(graph, batches, precision=precision, batch_size=size, float_remainder=remainder)
        return np.concatenate(list(found))


def measure_parity(
    graph: Path,
    images: Float[np.ndarray, "n c h w"],
    *,
    fp32_logits: Float[np.ndarray, "n k"],
    engine_logits: Float[np.ndarray, "n k"],
    engine: Engine,
    threads: int,
    batch_size: int,
    float_remainder: FloatRemainder,
    difference: Parting | None = None,
) -> ParityRecord:
    """Returns how alike FP32, the engine and the file are, and where engine and file part.

    Args:
        graph: the Q/DQ graph.
        images: the network's input.
        fp32_logits: FP32's logits of these images.
        engine_logits: those of the graph on the engine.
        engine: what the graph ran on.
        threads: CPU threads; 0 for all cores.
        batch_size: images per inference.
        float_remainder: precision of what stays in float in the engine.
        difference: where the file is not what was decided; nothing further is looked for then.

    Raises:
        EngineBuildError: ONNX Runtime, or the engine when it is given the beginning of the graph, refuses it.
    """
    runs = _Runs(engine, threads, batch_size, float_remainder)
    file_logits = runs.in_float(graph, images)
    record = ParityRecord(
        images=len(images),
        engine=_likeness(fp32_logits, engine_logits),
        file=_likeness(fp32_logits, file_logits),
        engine_to_file=_likeness(file_logits, engine_logits),
        parting=difference,
    )
    if difference is not None or not _parts(record.engine.sqnr_db, record.file.sqnr_db):
        return record
    with tempfile.TemporaryDirectory() as directory:
        parting = _find(onnx.load(graph), images[:_IMAGES_TO_SEARCH], runs, Path(directory))
    return ParityRecord(record.images, record.engine, record.file, record.engine_to_file, parting)


def _likeness(reference: Float[np.ndarray, "n k"], logits: Float[np.ndarray, "n k"]) -> Likeness:
    same = top1_predictions(reference) == top1_predictions(logits)
    return Likeness(sqnr_db=sqnr_db(reference, logits), agreement_percent=100 * float(np.mean(same)))


def _parts(engine_db: float, file_db: float) -> bool:
    return file_db - engine_db > LARGEST_LOSS_DB and engine_db < _GOOD_ENOUGH_DB


def _find(model: onnx.ModelProto, images: Float[np.ndarray, "n c h w"], runs: _Runs, directory: Path) -> Parting:
    """The first cut behind which the engine is worse than the file, halving the graph, and what causes it there."""
    cuts, plain = cuts_of(model), without_quantizers(model)

    def saved(part: onnx.ModelProto) -> Path:
        path = directory / "beginning.onnx"
        path.write_bytes(part.SerializeToString(deterministic=True))
        return path

    def loss_at(cut: Cut) -> tuple[float, float]:
        exact = runs.in_float(saved(beginning_of(plain, cut.tensor)), images, precision="fp32")
        beginning = saved(beginning_of(model, cut.tensor))
        return sqnr_db(exact, runs.of_engine(beginning, images)), sqnr_db(exact, runs.in_float(beginning, images))

    sound, parted = -1, len(cuts) - 1
    found = loss_at(cuts[parted]) if cuts else (0.0, 0.0)
    if not cuts or not _parts(*found):
        return Parting("", "fusion", "No single layer explains it: up to each, engine and file agree.")
    while parted - sound > 1:
        middle = (sound + parted) // 2
        if _parts(*(there := loss_at(cuts[middle]))):
            parted, found = middle, there
        else:
            sound = middle
    cut = cuts[parted]
    # Of branches side by side, one may have been sound and another not.
    places = {each.tensor: each for each in cuts}
    pending = [cut.before]
    while pending:
        for tensor in sorted(pending.pop() & places.keys()):
            if _parts(*(there := loss_at(places[tensor]))):
                cut, found, pending = places[tensor], there, [places[tensor].before]
                break
    layer, cause, why = _cause(model, cut, images, runs, saved)
    return Parting(layer, cause, f"They part first at {layer} ({found[0]:.1f} against {found[1]:.1f} dB): {why}")


def _cause(
    model: onnx.ModelProto,
    cut: Cut,
    images: Float[np.ndarray, "n c h w"],
    runs: _Runs,
    saved: Callable[[onnx.ModelProto], Path],
) -> tuple[str, Cause, str]:
    """The layer among those before a cut that is to blame, the cause, and a sentence about it."""
    identity = runs.engine.identity()
    isa = identity.isa
    if adds_in_16_bits(isa):
        runtime: Runtime = "onnxruntime" if identity.name == "onnxruntime" else "openvino"
        shares: dict[str, float] = {}
        for tensor, name in cut.layers.items():
            layer = integer_layer(model, tensor)
            if layer is not None:
                beginning = saved(beginning_of(model, layer.activation, as_vector=False))
                saturated, sums = layer.saturated_sums(runs.in_float(beginning, images), runtime=runtime)
                shares[name] = saturated / max(sums, 1)
        worst = max(shares, key=shares.__getitem__, default="")
        if worst and shares[worst] > 0:
            why = f"{100 * shares[worst]:.2g} % of its sums of two products saturate at 16 bits, as they do on"
            why += f" processors without VNNI ({isa}). Quantize with `engine.isa: portable`."
            return worst, "saturation", why
    built = runs.engine.build(
        saved(beginning_of(model, cut.tensor)),
        precision="int8",
        batch_size=runs.batch_size,
        float_remainder=runs.float_remainder,
    )
    types = {report.name: report.input_type for report in built.layers}
    for tensor, name in cut.layers.items():
        kept = types.get(name) or types.get(tensor)
        if kept in _FLOATS:
            return name, "float", f"the engine runs it in {kept}, not in INT8. Check the graph with `ptq validate`."
    why = "no sum saturates there and the layer runs in INT8, so the engine fuses it with its neighbours in another way"
    why += " than the file says. Leave it in float with `quantization.skip_layers`."
    return list(cut.layers.values())[-1], "fusion", why
