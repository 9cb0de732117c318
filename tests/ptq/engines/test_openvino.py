import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptq.engines.base import BuiltEngine, int8_share
from ptq.engines.openvino import OpenVinoEngine, report_layers
from ptq.errors import EngineBuildError

IMAGE = (3, 8, 8)
ENGINE = OpenVinoEngine(threads=1)
needs_bf16 = pytest.mark.skipif("bf16" not in ENGINE.precisions(), reason="this CPU has no BF16 instructions")


def save(path: Path, nodes: list, constants: dict[str, np.ndarray], *, image: tuple[int, ...] = IMAGE) -> Path:
    """Writes a graph from `images`, with a free batch dimension, to `logits`."""
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", *image])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "k"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "first.weight": generator.normal(size=(16, 3, 3, 3)).astype(np.float32) / 5,
        "second.weight": generator.normal(size=(16, 16, 3, 3)).astype(np.float32) / 12,
        "fc.weight": generator.normal(size=(10, 16)).astype(np.float32) / 4,
    }


def classifier_nodes(operands: dict[str, str]) -> list:
    """Convolution, ReLU, convolution, ReLU, pool, linear layer; `operands` renames what each layer reads."""

    def read(name: str) -> str:
        return operands.get(name, name)

    return [
        helper.make_node("Conv", [read("images"), read("first.weight")], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="first.relu"),
        helper.make_node("Conv", [read("b"), read("second.weight")], ["c"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"], name="second.relu"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], name="pool"),
        helper.make_node("Flatten", ["e"], ["f"], name="flatten"),
        # OpenVINO calls the last layer by the name of the graph's output.
        helper.make_node("Gemm", [read("f"), read("fc.weight")], ["logits"], name="logits", transB=1),
    ]


def float_classifier(folder: Path) -> Path:
    return save(folder / "fp32.onnx", classifier_nodes({}), weights())


def quantized_classifier(folder: Path, *, unsigned: bool) -> Path:
    """The same graph with Q/DQ on every operand; tensors after a ReLU are uint8 if `unsigned`."""
    constants, pairs, operands = weights(), {}, {}
    for name in ("first.weight", "second.weight", "fc.weight"):
        rows = np.abs(constants[name]).reshape(len(constants[name]), -1)
        constants[f"{name}.scale"] = (rows.max(axis=1) / 127).astype(np.float32)
        constants[f"{name}.zero"] = np.zeros(len(rows), np.int8)
    for name, amax in (("images", 4.0), ("b", 5.0), ("f", 2.0)):
        is_uint8 = unsigned and name != "images"
        constants[f"{name}.scale"] = np.array(amax / (255 if is_uint8 else 127), np.float32)
        constants[f"{name}.zero"] = np.array(0, np.uint8 if is_uint8 else np.int8)
    for name in ("images", "b", "f", "first.weight", "second.weight", "fc.weight"):
        attributes = {"axis": 0} if name.endswith("weight") else {}
        scale = [f"{name}.scale", f"{name}.zero"]
        pairs[name] = [
            helper.make_node("QuantizeLinear", [name, *scale], [f"{name}.q"], name=f"{name}.Q", **attributes),
            helper.make_node(
                "DequantizeLinear", [f"{name}.q", *scale], [f"{name}.dq"], name=f"{name}.DQ", **attributes
            ),
        ]
        operands[name] = f"{name}.dq"
    nodes = [*pairs["images"], *pairs["first.weight"], *pairs["second.weight"], *pairs["fc.weight"]]
    for node in classifier_nodes(operands):
        nodes += [node, *pairs.get(node.output[0], [])]
    return save(folder / f"int8_{unsigned}.onnx", nodes, constants)


def some_images(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, *IMAGE)).astype(np.float32)


def build(path: Path, precision: str, *, batch_size: int = 4, float_remainder: str = "fp32") -> BuiltEngine:
    return ENGINE.build(path, precision=precision, batch_size=batch_size, float_remainder=float_remainder)


def run(blob: bytes, images: np.ndarray, precision: str, *, batch_size: int = 4) -> np.ndarray:
    runner = ENGINE.load(blob, precision=precision, batch_size=batch_size, float_remainder="fp32")
    logits = runner(images)
    runner.close()
    return logits


def weighted_types(built: BuiltEngine) -> dict[str, str]:
    return {layer.name: layer.input_type for layer in built.layers if layer.kind in ("convolution", "linear")}


def test_fp32_runs_in_fp32_even_where_the_cpu_prefers_bf16(tmp_path):
    built = build(float_classifier(tmp_path), "fp32")

    assert weighted_types(built) == {"first": "fp32", "second": "fp32", "logits": "fp32"}


def test_fp32_agrees_with_onnxruntime(tmp_path):
    path, images = float_classifier(tmp_path), some_images(4)
    expected = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]

    logits = run(build(path, "fp32").blob, images, "fp32")

    # Sums of at most 144 products in another order: some units in the last place.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_an_imported_fp32_engine_does_not_round_to_bf16(tmp_path):
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["a"]),
        helper.make_node("Flatten", ["a"], ["logits"]),
    ]
    path = save(tmp_path / "copy.onnx", nodes, {"weight": np.ones((1, 1, 1, 1), np.float32)}, image=(1, 2, 2))
    images = np.array([[[[1.0009765625, -3.0009765625], [0.3330078125, 7.001953125]]]], np.float32)

    logits = run(build(path, "fp32", batch_size=1).blob, images, "fp32", batch_size=1)

    assert logits.tolist() == [[1.0009765625, -3.0009765625, 0.3330078125, 7.001953125]]


def test_a_quantized_convolution_rounds_and_clips_to_the_codes_computed_by_hand(tmp_path):
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("QuantizeLinear", ["weight", "weight.scale", "weight.zero"], ["wq"], axis=0),
        helper.make_node("DequantizeLinear", ["wq", "weight.scale", "weight.zero"], ["wdq"], axis=0),
        helper.make_node("Conv", ["dq", "wdq"], ["a"]),
        helper.make_node("Flatten", ["a"], ["logits"]),
    ]
    constants = {
        "scale": np.array(0.5, np.float32),
        "zero": np.array(0, np.int8),
        "weight": np.full((1, 1, 1, 1), 127, np.float32),
        "weight.scale": np.ones(1, np.float32),
        "weight.zero": np.zeros(1, np.int8),
    }
    path = save(tmp_path / "codes.onnx", nodes, constants, image=(1, 2, 2))
    images = np.array([[[[0.2, 0.9], [-1.6, 100.0]]]], np.float32)

    logits = run(build(path, "int8", batch_size=1).blob, images, "int8", batch_size=1)

    # Codes 0, 2, -3 and 127, times the scale 0.5 and the weight 127.
    assert logits.tolist() == [[0.0, 127.0, -190.5, 8064.5]]


@pytest.mark.parametrize("unsigned", [True, False], ids=["cpu dialect", "tensorrt dialect"])
def test_every_layer_of_a_quantized_graph_reads_int8(tmp_path, unsigned):
    built = build(quantized_classifier(tmp_path, unsigned=unsigned), "int8")

    assert int8_share(built.layers).int8_input_percent == 100.0
    assert set(weighted_types(built)) == {"first", "second", "logits"}


def test_a_convolution_before_a_quantizer_writes_int8(tmp_path):
    built = build(quantized_classifier(tmp_path, unsigned=True), "int8")

    (first,) = (layer for layer in built.layers if layer.name == "first")
    assert (first.kind, first.output_type) == ("convolution", "uint8")


@pytest.mark.parametrize("unsigned", [True, False], ids=["cpu dialect", "tensorrt dialect"])
def test_an_imported_engine_has_the_types_of_the_built_one(tmp_path, unsigned):
    built = build(quantized_classifier(tmp_path, unsigned=unsigned), "int8")
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}

    imported = report_layers(openvino.Core().import_model(built.blob, "CPU", hints))

    assert imported == built.layers


def test_two_loads_of_one_blob_give_the_same_bits(tmp_path):
    blob, images = build(quantized_classifier(tmp_path, unsigned=True), "int8").blob, some_images(4)

    np.testing.assert_array_equal(run(blob, images, "int8"), run(blob, images, "int8"))


def test_two_builds_give_the_same_bits(tmp_path):
    path, images = quantized_classifier(tmp_path, unsigned=True), some_images(4)

    first, second = (run(build(path, "int8").blob, images, "int8") for _ in range(2))

    np.testing.assert_array_equal(first, second)


def test_int8_logits_are_close_to_fp32_and_not_equal(tmp_path):
    images = some_images(4)

    fp32 = run(build(float_classifier(tmp_path), "fp32").blob, images, "fp32")
    int8 = run(build(quantized_classifier(tmp_path, unsigned=True), "int8").blob, images, "int8")

    error = np.linalg.norm(int8 - fp32) / np.linalg.norm(fp32)
    # Eight bits leave a relative error of the order of 1 %.
    assert 1e-4 < error < 0.1


@needs_bf16
def test_bf16_runs_convolutions_in_bf16(tmp_path):
    built = build(float_classifier(tmp_path), "bf16")

    assert weighted_types(built)["second"] == "bf16"


@needs_bf16
def test_the_remainder_in_bf16_leaves_the_quantized_layers_in_int8(tmp_path):
    built = build(quantized_classifier(tmp_path, unsigned=True), "int8", float_remainder="bf16")

    assert int8_share(built.layers).int8_input_percent == 100.0
    assert "bf16" in {layer.output_type for layer in built.layers}


def test_a_short_batch_gives_the_logits_of_its_images_alone(tmp_path):
    blob, images = build(float_classifier(tmp_path), "fp32").blob, some_images(4)

    logits = run(blob, images[:3], "fp32")

    assert logits.shape == (3, 10)
    np.testing.assert_array_equal(logits, run(blob, images, "fp32")[:3])


def test_a_result_is_not_overwritten_by_the_next_inference(tmp_path):
    built = build(float_classifier(tmp_path), "fp32", batch_size=1)
    runner = ENGINE.load(built.blob, precision="fp32", batch_size=1, float_remainder="fp32")
    images = some_images(2)

    first = runner(images[:1])
    kept = first.copy()
    runner(images[1:])

    np.testing.assert_array_equal(first, kept)


def test_read_only_images_are_accepted(tmp_path):
    images = some_images(4)
    images.flags.writeable = False

    assert run(build(float_classifier(tmp_path), "fp32").blob, images, "fp32").shape == (4, 10)


def test_too_many_images_are_refused(tmp_path):
    blob = build(float_classifier(tmp_path), "fp32", batch_size=2).blob

    with pytest.raises(ValueError, match="got 3 images, expected 1 to 2"):
        run(blob, some_images(3), "fp32", batch_size=2)


def test_timed_calls_return_one_latency_per_inference(tmp_path):
    built = build(float_classifier(tmp_path), "fp32", batch_size=2)
    runner = ENGINE.load(built.blob, precision="fp32", batch_size=2, float_remainder="fp32")

    latencies_ms, elapsed_s = runner.timed_calls(some_images(2), warmup_ms=1, duration_s=0.01, min_iterations=5)

    assert len(latencies_ms) >= 5
    assert min(latencies_ms) > 0
    assert sum(latencies_ms) / 1000 == pytest.approx(elapsed_s)


def test_the_graph_file_may_be_deleted_after_the_build(tmp_path):
    path = float_classifier(tmp_path)
    built = build(path, "fp32")
    path.unlink()

    assert run(built.blob, some_images(4), "fp32").shape == (4, 10)


def test_identity_names_the_release_the_cpu_and_the_threads():
    identity = ENGINE.identity()

    assert (identity.name, identity.threads) == ("openvino", 1)
    assert openvino.__version__.startswith(identity.version)
    assert identity.device


def test_fp16_is_refused_with_the_precisions_there_are(tmp_path):
    with pytest.raises(EngineBuildError, match="precision is fp16, which OpenVINO does not run .* It runs fp32, "):
        build(float_classifier(tmp_path), "fp16")


def test_a_file_that_is_no_graph_is_refused_with_its_name(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")

    with pytest.raises(EngineBuildError, match="cannot build broken.onnx as fp32 for batches of 4"):
        build(path, "fp32")


def test_a_damaged_engine_says_to_build_it_again(tmp_path):
    blob = build(float_classifier(tmp_path), "fp32").blob

    with pytest.raises(EngineBuildError, match="cannot load an engine of 100 bytes: .* Build it again"):
        run(blob[:100], some_images(4), "fp32")


def test_an_engine_of_another_release_says_so(tmp_path):
    blob = build(float_classifier(tmp_path), "fp32").blob
    other = blob.replace(b"ov=" + ENGINE.identity().version.encode(), b"ov=2020.1.1", 1)

    with pytest.raises(EngineBuildError, match="OpenVINO version/isa mismatch.*Build it again"):
        run(other, some_images(4), "fp32")


def test_an_engine_for_another_batch_size_is_refused(tmp_path):
    blob = build(float_classifier(tmp_path), "fp32", batch_size=4).blob

    with pytest.raises(EngineBuildError, match="is 4, and 1 was asked for"):
        run(blob, some_images(1), "fp32", batch_size=1)


def test_importing_the_engine_forks_no_process_that_sends_telemetry():
    program = (
        "import multiprocessing, threading, ptq.engines.openvino\n"
        "import openvino.tools.ovc.telemetry_utils as utils\n"
        "print(utils.tm.__name__, multiprocessing.active_children(), threading.active_count())"
    )

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)

    assert found.stdout.strip() == "openvino.tools.ovc.telemetry_stub [] 1"


@pytest.mark.parametrize("images", [1, 2, 5, 7])
def test_many_batches_give_the_logits_of_one_after_the_other(tmp_path, images):
    engine = OpenVinoEngine(threads=2)
    path = float_classifier(tmp_path)
    settings = {"precision": "fp32", "batch_size": 2, "float_remainder": "fp32"}
    inputs = np.random.default_rng(0).standard_normal((images, *IMAGE), dtype=np.float32)
    batches = [inputs[start : start + 2] for start in range(0, images, 2)]

    found = list(engine.logits(path, iter(batches), **settings))

    runner = engine.load(engine.build(path, **settings).blob, **settings)
    assert [len(part) for part in found] == [len(batch) for batch in batches]
    for part, batch in zip(found, batches, strict=True):
        np.testing.assert_array_equal(part, runner(batch))


def residual_classifier(folder: Path) -> Path:
    """Two residual blocks of the usual kind: the identity is read by a convolution and by the add, both quantized."""
    generator = np.random.default_rng(2)
    constants: dict[str, np.ndarray] = {}
    nodes = []

    def quantized(name: str, amax: np.ndarray | float, *, kind: type) -> str:
        scale = (np.asarray(amax) / (255 if kind is np.uint8 else 127)).astype(np.float32)
        constants[f"{name}.scale"], constants[f"{name}.zero"] = scale, np.zeros(scale.shape, kind)
        axis = {"axis": 0} if scale.ndim else {}
        parameters = [f"{name}.scale", f"{name}.zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.q"], f"{name}.Q", **axis))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.q", *parameters], [f"{name}.dq"], f"{name}.DQ", **axis)
        )
        return f"{name}.dq"

    def convolution(name: str, read: str, channels: int) -> str:
        weight = generator.normal(size=(32, channels, 3, 3)).astype(np.float32) / 10
        constants[f"{name}.weight"] = weight
        constants[f"{name}.bias"] = generator.normal(size=32).astype(np.float32)
        weight_read = quantized(f"{name}.weight", np.abs(weight).reshape(32, -1).max(axis=1), kind=np.int8)
        nodes.append(
            helper.make_node("Conv", [read, weight_read, f"{name}.bias"], [f"{name}.out"], name, pads=[1, 1, 1, 1])
        )
        return f"{name}.out"

    def activated(name: str, read: str) -> str:
        nodes.append(helper.make_node("Relu", [read], [name], f"{name}.relu"))
        return quantized(name, generator.uniform(3, 9), kind=np.uint8)

    block = activated("stem.y", convolution("stem", quantized("images", 4.0, kind=np.int8), 3))
    for number in (1, 2):
        inner = activated(f"inner{number}.y", convolution(f"inner{number}", block, 32))
        outer = convolution(f"outer{number}", inner, 32)
        nodes.append(helper.make_node("Add", [outer, block], [f"sum{number}"], f"add{number}"))
        block = activated(f"block{number}.y", f"sum{number}")
    nodes.append(helper.make_node("GlobalAveragePool", [block], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"], "flatten"))
    return save(folder / "residual.onnx", nodes, constants)


def test_the_convolution_before_a_residual_add_writes_int8_built_or_loaded(tmp_path):
    path = residual_classifier(tmp_path)
    built = build(path, "int8")
    assert int8_share(built.layers).int8_output_percent == 100.0
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({0: [4, *IMAGE]})
    usual = report_layers(core.compile_model(model, "CPU", settings))
    assert int8_share(usual).int8_output_percent < 100.0  # else the rule is not needed any more
    images = some_images(4)
    (logits,) = ENGINE.logits(path, [images], precision="int8", batch_size=4, float_remainder="fp32")
    np.testing.assert_array_equal(run(built.blob, images, "int8"), logits)


def test_a_graph_without_residual_adds_keeps_the_generated_elementwise_code(tmp_path):
    engine = OpenVinoEngine(threads=1)
    engine._drops_snippets.clear()
    engine.build(quantized_classifier(tmp_path, unsigned=True), precision="int8", batch_size=4, float_remainder="fp32")
    assert list(engine._drops_snippets.values()) == [False]
    engine.build(residual_classifier(tmp_path), precision="int8", batch_size=4, float_remainder="fp32")
    assert list(engine._drops_snippets.values()) == [False, True]
