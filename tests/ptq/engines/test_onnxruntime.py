import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptq.engines import isa
from ptq.engines.onnxruntime import OnnxRuntimeEngine
from ptq.errors import EngineBuildError
from ptq.numerics.saturation import neighbours

ENGINE = OnnxRuntimeEngine(threads=1)
REFERENCE = OnnxRuntimeEngine(threads=1, by_the_letter=True)
WEIGHT = np.array([[[[2.0]]]], np.float32)


def save(
    path: Path, *, batch: int | str = "n", quantized: bool = False, outputs: tuple[str, ...] = ("logits",)
) -> Path:
    """Writes a 1 x 1 convolution by 2 over images of (1, 2, 2), with Q/DQ of scale 0.5 before it if `quantized`."""
    pair = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
    ]
    nodes = [
        *(pair if quantized else []),
        helper.make_node("Conv", ["dq" if quantized else "images", "weight"], ["a"]),
        helper.make_node("Flatten", ["a"], ["logits"]),
        helper.make_node("Relu", ["logits"], ["positive"]),
    ]
    constants = {"weight": WEIGHT, "scale": np.array(0.5, np.float32), "zero": np.array(0, np.int8)}
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, 2, 2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 4]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def runner_of(path: Path, precision: str, batch_size: int, engine: OnnxRuntimeEngine = ENGINE):
    built = engine.build(path, precision=precision, batch_size=batch_size, float_remainder="fp32")
    return engine.load(built.blob, precision=precision, batch_size=batch_size, float_remainder="fp32")


def test_fp32_gives_the_product_computed_by_hand(tmp_path):
    images = np.array([[[[1.25, -2.0], [0.0, 3.0]]]], np.float32)

    logits = runner_of(save(tmp_path / "a.onnx"), "fp32", 1)(images)

    assert logits.dtype == np.float32
    assert logits.tolist() == [[2.5, -4.0, 0.0, 6.0]]


@pytest.mark.parametrize("engine", [ENGINE, REFERENCE], ids=["engine", "reference"])
def test_int8_rounds_and_clips_where_the_graph_says(tmp_path, engine):
    images = np.array([[[[0.2, 0.9], [-1.6, 100.0]]]], np.float32)

    logits = runner_of(save(tmp_path / "a.onnx", quantized=True), "int8", 1, engine)(images)

    # Codes 0, 2, -3 and 127, times the scale 0.5 and the weight 2.
    assert logits.tolist() == [[0.0, 2.0, -3.0, 127.0]]


def test_a_short_batch_is_padded_and_cut(tmp_path):
    runner = runner_of(save(tmp_path / "a.onnx", batch=4), "fp32", 4)

    logits = runner(np.ones((3, 1, 2, 2), np.float32))

    assert logits.tolist() == [[2.0] * 4] * 3


def test_too_many_images_are_refused(tmp_path):
    runner = runner_of(save(tmp_path / "a.onnx"), "fp32", 2)

    with pytest.raises(ValueError, match="got 3 images, expected 1 to 2"):
        runner(np.ones((3, 1, 2, 2), np.float32))


def test_the_blob_is_the_file_and_the_layers_are_those_of_the_optimised_graph(tmp_path):
    path = save(tmp_path / "a.onnx", quantized=True)

    built = ENGINE.build(path, precision="int8", batch_size=1, float_remainder="fp32")

    assert built.blob == path.read_bytes()
    assert built.build_s > 0
    by_kind = {layer.kernel: (layer.kind, layer.input_type, layer.output_type) for layer in built.layers}
    # On some processors it makes uint8 of int8.
    integers = by_kind["QuantizeLinear"][2]
    assert integers in ("int8", "uint8")
    assert by_kind["QuantizeLinear"] == ("reformat", "fp32", integers)
    assert by_kind["DequantizeLinear"] == ("reformat", integers, "fp32")
    assert by_kind["Conv"] == ("convolution", "fp32", "fp32")


def test_timed_calls_return_one_latency_per_inference(tmp_path):
    runner = runner_of(save(tmp_path / "a.onnx"), "fp32", 1)

    latencies_ms, elapsed_s = runner.timed_calls(
        np.ones((1, 1, 2, 2), np.float32), warmup_ms=0, duration_s=1e-6, min_iterations=5
    )

    assert len(latencies_ms) >= 5
    assert sum(latencies_ms) / 1000 == pytest.approx(elapsed_s)


def test_a_closed_runner_cannot_run(tmp_path):
    runner = runner_of(save(tmp_path / "a.onnx"), "fp32", 1)
    runner.close()

    with pytest.raises(AttributeError):
        runner(np.ones((1, 1, 2, 2), np.float32))


def test_identity_names_the_version_and_what_the_numbers_depend_on():
    assert ENGINE.identity().version == REFERENCE.identity().version == onnxruntime.__version__
    assert ENGINE.identity().device == isa.processor_name()
    assert ENGINE.identity().isa == (isa.playable_isas() or ("",))[-1]
    assert (REFERENCE.identity().device, REFERENCE.identity().isa) == ("CPU", "")


def saturating(inputs: int, size: int, groups: int) -> set[tuple[int, int]]:
    """Every pair of elements of a kernel in an output channel of its own, both 127: those whose sum is cut off."""
    pairs = list(itertools.combinations(range(inputs * size * size), 2))
    weight = np.zeros((groups * len(pairs), inputs * size * size), np.int8)
    for out, pair in enumerate(pairs):
        weight[out :: len(pairs), pair] = 127
    constants = {
        "scale": np.array(1, np.float32), "zero": np.array(0, np.uint8), "no": np.array(0, np.int8),
        "steps": weight.reshape(-1, inputs, size, size), "written": np.array(512, np.float32),
    }  # fmt: skip
    operands = ["images", "scale", "zero", "steps", "scale", "no", "written", "zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", operands, ["codes"], group=groups)],
        "pairs",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, inputs * groups, 6, 6])],
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (codes,) = session.run(None, {"images": np.full((1, inputs * groups, 6, 6), 255, np.uint8)})
    whole = round(2 * 127 * 255 / 512)
    return {pairs[out] for out in np.flatnonzero(codes[0, : len(pairs), 1, 1] != whole)}


@pytest.mark.skipif(not isa.adds_in_16_bits((isa.playable_isas() or ("",))[-1]), reason="needs x86 without VNNI")
@pytest.mark.parametrize(("inputs", "size", "groups"), [(3, 3, 1), (5, 1, 1), (4, 2, 1), (3, 3, 2), (1, 3, 4)])
def test_without_vnni_sums_saturate_at_the_neighbours_and_nowhere_else(inputs, size, groups):
    expected = neighbours(inputs, size**2, outputs=2, groups=groups, runtimes=["onnxruntime"])
    assert saturating(inputs, size, groups) == {tuple(sorted(pair)) for pair in expected.tolist()}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_other_precisions_are_refused_with_those_there_are(tmp_path, precision):
    with pytest.raises(EngineBuildError, match=f"precision is {precision}.* It runs fp32, int8"):
        ENGINE.build(save(tmp_path / "a.onnx"), precision=precision, batch_size=1, float_remainder="fp32")


def test_bytes_that_are_no_graph_are_refused():
    with pytest.raises(EngineBuildError, match="cannot load a graph of 8 bytes.*Expected an ONNX file"):
        ENGINE.load(b"no graph", precision="fp32", batch_size=1, float_remainder="fp32")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(EngineBuildError, match="absent.onnx: No such file or directory"):
        ENGINE.build(tmp_path / "absent.onnx", precision="fp32", batch_size=1, float_remainder="fp32")


def test_a_static_graph_of_another_batch_size_is_refused(tmp_path):
    with pytest.raises(EngineBuildError, match="is 4, and 1 was asked for"):
        ENGINE.build(save(tmp_path / "a.onnx", batch=4), precision="fp32", batch_size=1, float_remainder="fp32")


def test_a_graph_with_two_outputs_is_refused(tmp_path):
    path = save(tmp_path / "a.onnx", outputs=("logits", "positive"))

    with pytest.raises(EngineBuildError, match="1 inputs and 2 outputs"):
        ENGINE.build(path, precision="fp32", batch_size=1, float_remainder="fp32")
