"""Is an engine that computes something else than its file found out, with the layer and the cause?"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from checked_graphs import sound_graph, values_of
from onnx import numpy_helper

from ptq.engines import open_engine
from ptq.engines.isa import playable_isas
from ptq.evaluation.parity import measure_parity
from ptq.graph.prefixes import beginning_of, without_quantizers
from ptq.records.graph import LayerReport

ROOT = Path(__file__).parents[3]
IMAGES = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32)


def changed(model, name, change):
    """The graph with other values of an initializer."""
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    values = np.asarray(change(numpy_helper.to_array(tensor)), dtype=np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


def logits(engine, path, *, precision="int8"):
    found = engine.logits(path, [IMAGES], precision=precision, batch_size=len(IMAGES), float_remainder="fp32")
    return np.concatenate(list(found))


def calibrated(model, path):
    """Writes a graph of which every activation's scale is that of the images."""
    plain = without_quantizers(model)
    reference = open_engine("onnxruntime", threads=1)
    for node in model.graph.node:
        name = node.name.removesuffix("/Q")
        if node.op_type == "QuantizeLinear" and not name.endswith(".weight"):
            onnx.save(beginning_of(plain, node.input[0]), path)
            largest = np.abs(logits(reference, path, precision="fp32")).max()
            scale = largest / (254 if values_of(model, f"{name}.zero_point").dtype == np.uint8 else 127)
            changed(model, f"{name}.scale", lambda _, scale=scale: scale)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return calibrated(sound_graph("cpu"), tmp_path_factory.mktemp("graph") / "model.onnx")


def measured(graph, engine):
    plain = graph.with_name("plain.onnx")
    onnx.save(without_quantizers(onnx.load(graph)), plain)
    return measure_parity(
        graph,
        IMAGES,
        fp32_logits=logits(open_engine("onnxruntime", threads=1), plain, precision="fp32"),
        engine_logits=logits(engine, graph),
        engine=engine,
        threads=1,
        batch_size=len(IMAGES),
        float_remainder="fp32",
    )


class Faulty:
    """ONNX Runtime, which takes what one quantizer holds for more than it is: an engine with a wrong kernel."""

    def __init__(self, folder, quantizer, factor, *, layers=()):
        self._true, self._folder = open_engine("onnxruntime", threads=1), folder
        self._quantizer, self._factor, self._layers = quantizer, factor, layers

    def identity(self):
        return self._true.identity()

    def build(self, path, **options):
        return replace(self._true.build(path, **options), layers=self._layers)

    def logits(self, path, batches, **options):
        model = onnx.load(path)
        for node in model.graph.node:
            if node.name == f"{self._quantizer}/DQ":
                (scale,) = [each for each in model.graph.initializer if each.name == node.input[1]]
                larger = numpy_helper.to_array(scale) * np.float32(self._factor)
                model.graph.initializer.append(numpy_helper.from_array(larger, "wrong"))
                node.input[1] = "wrong"
        path = self._folder / "changed.onnx"
        onnx.save(model, path)
        return self._true.logits(path, batches, **options)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_an_engine_that_computes_what_the_file_says_is_found_to_do_so(graph, name):
    found = measured(graph, open_engine(name, threads=1))
    assert found.parting is None
    assert found.images == len(IMAGES)
    assert found.engine.sqnr_db == pytest.approx(found.file.sqnr_db, abs=0.5)
    assert found.engine_to_file.sqnr_db > found.file.sqnr_db


@pytest.mark.parametrize(
    ("quantizer", "layers"),
    [
        ("stem.weight", {"stem"}),
        ("block1.conv2.weight", {"block1.conv2"}),
        ("block2.conv1.weight", {"block2.conv1"}),
        ("left.weight", {"left"}),
        ("fc.weight", {"fc"}),
        ("block2.inner_q", {"block2.conv1"}),
    ],
)
def test_the_first_layer_that_an_engine_computes_wrongly_is_named(graph, tmp_path, quantizer, layers):
    found = measured(graph, Faulty(tmp_path, quantizer, 1.5)).parting
    assert found.layer in layers
    assert found.cause == "fusion"
    assert f"They part first at {found.layer} (" in found.sentence
    assert "fuses it with its neighbours" in found.sentence


def test_a_layer_that_the_engine_keeps_in_float_is_named_as_such(graph, tmp_path):
    report = LayerReport("stem", "convolution", "bf16", "bf16", "jit")
    found = measured(graph, Faulty(tmp_path, "stem.weight", 1.5, layers=(report,))).parting
    assert (found.layer, found.cause) == ("stem", "float")
    assert "runs it in bf16, not in INT8" in found.sentence


def test_an_engine_above_what_changes_an_answer_is_left_alone(graph, tmp_path):
    # The last layer moves by a thousandth: 60 dB from the file, which is far nearer than INT8 is to FP32.
    assert measured(graph, Faulty(tmp_path, "fc.weight", 1.001)).parting is None


PROGRAM = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_parity import measured
from ptq.engines import open_engine
found = measured(Path(sys.argv[1]), open_engine("openvino", threads=1)).parting
print("FOUND", json.dumps(found and [found.layer, found.cause, found.sentence]))
"""


@pytest.mark.skipif("avx2" not in playable_isas(), reason="this processor has no AVX2")
@pytest.mark.parametrize(
    ("layer", "before"),
    [
        pytest.param("block1.conv2", "block1.conv1", marks=pytest.mark.slow),
        ("block2.conv1", "block1.conv2"),
    ],
)
def test_saturation_is_named_with_the_layer_and_what_to_do(tmp_path, layer, before):
    model = sound_graph("cpu")
    # Inputs near the end of their range meet weights of one sign near the end of theirs.
    changed(model, f"{before}.bias", lambda bias: np.full_like(bias, 200))
    changed(model, f"{layer}.weight", lambda weight: 0.8 + 0.2 * np.abs(weight) / np.abs(weight).max())
    changed(model, f"{layer}.weight.scale", lambda scale: np.full_like(scale, 1 / 127))
    path = calibrated(model, tmp_path / "saturating.onnx")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(Path(__file__).parent), str(ROOT / "tests/support")],
        cwd=ROOT, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("FOUND ")[1])
    assert found[:2] == [layer, "saturation"]
    assert "% of its sums of two products saturate at 16 bits" in found[2]
    assert "`engine.isa: portable`" in found[2]
