import ctypes
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptq.engines.base import int8_share
from ptq.engines.tensorrt import TensorRtEngine, find_problem, probe_cuda
from ptq.engines.tensorrt_plan import ApiSurface, BuildPlan, build_plan, layers_from_inspector
from ptq.errors import EngineBuildError

PROBLEM = find_problem()
needs_gpu = pytest.mark.skipif(PROBLEM != "", reason=f"TensorRT cannot run here: {PROBLEM}")

# The flags that matter to a plan. Those of 10.16 and 11.4 were read from the releases' own Python bindings.
SURFACE_8_6 = ApiSurface(
    version=(8, 6),
    network_flags=frozenset({"EXPLICIT_BATCH", "EXPLICIT_PRECISION"}),
    builder_flags=frozenset({"FP16", "INT8", "FP8", "TF32", "OBEY_PRECISION_CONSTRAINTS", "REFIT"}),
)
SURFACE_10_16 = ApiSurface(
    version=(10, 16),
    network_flags=frozenset(
        {"EXPLICIT_BATCH", "STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS"}
    ),
    builder_flags=frozenset({"FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "TF32", "STRIP_PLAN", "WEIGHTLESS"}),
)
# The same names at a release before strong typing became the rule.
SURFACE_10_0 = ApiSurface((10, 0), SURFACE_10_16.network_flags, SURFACE_10_16.builder_flags)
SURFACE_11_4 = ApiSurface(
    version=(11, 4),
    network_flags=frozenset({"STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS"}),
    builder_flags=frozenset({"TF32", "STRIP_PLAN", "REFIT", "SPARSE_WEIGHTS"}),
)

LAYERS_OF_8_AND_10 = json.dumps(
    {
        "Layers": [
            {
                "Name": "Reformatting CopyNode for Input Tensor 0 to conv1",
                "LayerType": "Reformat",
                "Inputs": [{"Name": "images", "Format/Datatype": "Row major linear FP32"}],
                "Outputs": [
                    {"Name": "images.q", "Format/Datatype": "Four wide channel vectorized row major Int8 format"}
                ],
                "ParameterType": "Reformat",
                "TacticValue": "0x00000000000003e8",
            },
            {
                "Name": "conv1 + relu1",
                "LayerType": "CaskConvolution",
                "Inputs": [
                    {"Name": "images.q", "Format/Datatype": "Four wide channel vectorized row major Int8 format"}
                ],
                "Outputs": [
                    {"Name": "b", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}
                ],
                "ParameterType": "Convolution",
                "Weights": {"Type": "Int8", "Count": 432},
                "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32",
            },
            {
                "Name": "fc",
                "LayerType": "gemm",
                "Inputs": [{"Name": "f", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
                "Outputs": [{"Name": "logits", "Format/Datatype": "Row major linear FP32"}],
                "ParameterType": "MatrixMultiply",
            },
        ],
        "Bindings": ["images", "logits"],
    }
)
LAYERS_OF_11 = json.dumps(
    {
        "Layers": [
            {
                "Name": "conv1 + relu1",
                "LayerType": "ConvActPool",
                "Inputs": [
                    {"Name": "images.q", "Format": "Four wide channel vectorized row major", "DataType": "Int8"}
                ],
                "Outputs": [{"Name": "b", "Format": "Row major linear", "DataType": "Half"}],
                "Weights": {"Type": "Int8", "Count": 432},
                "TacticName": "sm90_i8f16",
            },
            {
                "Name": "conv2 + add",
                "LayerType": "kgen",
                "Inputs": [{"Name": "b", "Format": "Row major linear", "DataType": "BFloat16"}],
                "Outputs": [{"Name": "c", "Format": "Row major linear", "DataType": "Float"}],
                "Weights": {"Type": "BFloat16", "Count": 2304},
            },
            {"Name": "flatten of conv2", "LayerType": "NoOp", "Inputs": [], "Outputs": []},
        ],
        "I/O Tensors": [{"Name": "images", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 3, 8, 8]}],
    }
)


@dataclass(frozen=True, kw_only=True)
class PlanCase:
    """A release, a request, and the plan that its names allow."""

    name: str
    surface: ApiSurface
    precision: str
    weak_typing: bool = False
    plan: BuildPlan


WEAK_8, WEAK_10, STRONG = ("EXPLICIT_BATCH",), (), ("STRONGLY_TYPED",)
PLAN_CASES = [
    PlanCase(name="8.6 fp32", surface=SURFACE_8_6, precision="fp32", plan=BuildPlan(False, WEAK_8, (), ("TF32",))),
    PlanCase(
        name="8.6 fp16", surface=SURFACE_8_6, precision="fp16", plan=BuildPlan(False, WEAK_8, ("FP16", "TF32"), ())
    ),
    PlanCase(
        name="8.6 int8",
        surface=SURFACE_8_6,
        precision="int8",
        plan=BuildPlan(False, WEAK_8, ("INT8", "FP16", "TF32"), ()),
    ),
    PlanCase(
        name="10.0 int8",
        surface=SURFACE_10_0,
        precision="int8",
        plan=BuildPlan(False, WEAK_10, ("INT8", "FP16", "TF32"), ()),
    ),
    PlanCase(name="10.16 fp32", surface=SURFACE_10_16, precision="fp32", plan=BuildPlan(True, STRONG, (), ("TF32",))),
    PlanCase(name="10.16 int8", surface=SURFACE_10_16, precision="int8", plan=BuildPlan(True, STRONG, ("TF32",), ())),
    PlanCase(
        name="10.16 fp16, weak",
        surface=SURFACE_10_16,
        precision="fp16",
        weak_typing=True,
        plan=BuildPlan(False, WEAK_10, ("FP16", "TF32"), ()),
    ),
    PlanCase(name="11.4 fp32", surface=SURFACE_11_4, precision="fp32", plan=BuildPlan(True, STRONG, (), ("TF32",))),
    PlanCase(name="11.4 int8", surface=SURFACE_11_4, precision="int8", plan=BuildPlan(True, STRONG, ("TF32",), ())),
    PlanCase(
        name="11.4 fp16, weak",
        surface=SURFACE_11_4,
        precision="fp16",
        weak_typing=True,
        plan=BuildPlan(True, STRONG, ("TF32",), ()),
    ),
]


@pytest.mark.parametrize("case", PLAN_CASES, ids=lambda case: case.name)
def test_the_plan_uses_what_the_release_has(case):
    assert build_plan(case.surface, precision=case.precision, weak_typing=case.weak_typing) == case.plan


@pytest.mark.parametrize(
    "surface", [SURFACE_8_6, SURFACE_10_0, SURFACE_10_16, SURFACE_11_4], ids=lambda s: str(s.version)
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("weak_typing", [True, False])
def test_a_plan_names_no_flag_that_the_release_lacks(surface, precision, weak_typing):
    plan = build_plan(surface, precision=precision, weak_typing=weak_typing)

    assert set(plan.network_flags) <= surface.network_flags
    assert {*plan.set_flags, *plan.cleared_flags} <= surface.builder_flags


def test_a_precision_that_is_not_built_is_refused_with_those_that_are():
    with pytest.raises(EngineBuildError, match="precision is bf16.* It builds fp32, fp16, int8"):
        build_plan(SURFACE_11_4, precision="bf16")


def test_a_release_without_the_flags_and_without_strong_typing_is_refused():
    bare = ApiSurface(version=(7, 0), network_flags=frozenset({"EXPLICIT_BATCH"}), builder_flags=frozenset({"FP16"}))

    with pytest.raises(EngineBuildError, match="TensorRT 7.0 has no builder flag INT8.*8.6, 10 or 11"):
        build_plan(bare, precision="int8")


def test_layers_of_releases_8_and_10_have_their_kind_types_and_kernel():
    reformat, convolution, linear = layers_from_inspector(LAYERS_OF_8_AND_10)

    assert (reformat.kind, reformat.input_type, reformat.output_type) == ("reformat", "fp32", "int8")
    assert (convolution.kind, convolution.input_type, convolution.output_type) == ("convolution", "int8", "int8")
    assert convolution.kernel == "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32"
    assert (linear.kind, linear.input_type, linear.output_type) == ("linear", "fp16", "fp32")


def test_layers_of_release_11_have_their_kind_and_types():
    fused, generated, nothing = layers_from_inspector(LAYERS_OF_11)

    assert (fused.kind, fused.input_type, fused.output_type) == ("convolution", "int8", "fp16")
    assert (generated.kind, generated.input_type, generated.output_type) == ("convolution", "bf16", "fp32")
    assert (nothing.kind, nothing.input_type, nothing.output_type) == ("noop", "", "")


def test_the_share_of_int8_is_counted_from_the_inspector():
    share = int8_share(layers_from_inspector(LAYERS_OF_8_AND_10))

    assert (share.layers, share.int8_input_percent, share.int8_output_percent, share.reformats) == (2, 50.0, 50.0, 1)
    assert share.float_layers == ("fc",)


def test_an_unknown_type_keeps_the_words_of_the_inspector():
    text = json.dumps({"Layers": [{"Name": "a", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}]})

    assert layers_from_inspector(text)[0].input_type == "N/A due to dynamic shapes"


def test_a_layer_without_details_keeps_its_name():
    (layer,) = layers_from_inspector('{"Layers": ["conv1 + relu1"], "Bindings": []}')

    assert (layer.name, layer.kind) == ("conv1 + relu1", "")


@pytest.mark.parametrize("text", ["no JSON", '{"layers": []}', "[]"])
def test_text_of_another_schema_is_refused(text):
    with pytest.raises(EngineBuildError, match="which holds no list of layers. Expected JSON with the key Layers"):
        layers_from_inspector(text)


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver library")
def test_without_a_driver_library_the_probe_says_so():
    assert probe_cuda() == "there is no NVIDIA driver library (libcuda.so.1)"
    assert find_problem() == probe_cuda()


def save_classifier(path: Path, *, quantized: bool) -> Path:
    """Writes a 3 x 3 convolution of 16 channels and a linear layer, with Q/DQ of both if `quantized`."""
    generator = np.random.default_rng(0)
    constants = {
        "conv.weight": generator.normal(size=(16, 3, 3, 3)).astype(np.float32),
        "fc.weight": generator.normal(size=(10, 16)).astype(np.float32),
    }
    pairs, read = {}, {}
    for name, amax, shape in (
        ("images", 4.0, ()),
        ("c", 8.0, ()),
        ("conv.weight", 3.0, (16,)),
        ("fc.weight", 3.0, (10,)),
    ):
        scale = [f"{name}.scale", f"{name}.zero"]
        attributes = {"axis": 0} if shape else {}
        constants[scale[0]] = np.full(shape, amax / 127, np.float32)
        constants[scale[1]] = np.zeros(shape, np.int8)
        pairs[name] = [
            helper.make_node("QuantizeLinear", [name, *scale], [f"{name}.q"], **attributes),
            helper.make_node("DequantizeLinear", [f"{name}.q", *scale], [f"{name}.dq"], **attributes),
        ]
        read[name] = f"{name}.dq" if quantized else name
    before = [*pairs["images"], *pairs["conv.weight"], *pairs["fc.weight"]]
    nodes = [
        *(before if quantized else []),
        helper.make_node("Conv", [read["images"], read["conv.weight"]], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"], name="pool"),
        helper.make_node("Flatten", ["b"], ["c"], name="flatten"),
        *(pairs["c"] if quantized else []),
        helper.make_node("Gemm", [read["c"], read["fc.weight"]], ["logits"], name="fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_gpu_agrees_with_the_reference(tmp_path, precision):
    from ptq.engines.onnxruntime import OnnxRuntimeEngine

    path = save_classifier(tmp_path / "a.onnx", quantized=precision == "int8")
    images = np.random.default_rng(1).normal(size=(3, 3, 16, 16)).astype(np.float32)
    settings = {"precision": precision, "batch_size": 4, "float_remainder": "fp32"}
    gpu, reference = TensorRtEngine(), OnnxRuntimeEngine(threads=1)

    built = gpu.build(path, **settings)
    found = gpu.load(built.blob, **settings)(images)
    expected = reference.load(path.read_bytes(), **settings)(images)

    # One code of the pooled activations is 1 % of the logits, where another order of sums moves a value over an edge.
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < (1e-5 if precision == "fp32" else 0.02)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_runs_a_quantized_convolution_in_int8(tmp_path):
    path = save_classifier(tmp_path / "a.onnx", quantized=True)

    built = TensorRtEngine().build(path, precision="int8", batch_size=8, float_remainder="fp32")

    (convolution, *_) = (layer for layer in built.layers if layer.kind == "convolution")
    assert convolution.input_type == "int8"


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_reports_one_positive_latency_per_inference(tmp_path):
    engine = TensorRtEngine()
    settings = {"precision": "fp32", "batch_size": 2, "float_remainder": "fp32"}
    built = engine.build(save_classifier(tmp_path / "a.onnx", quantized=False), **settings)
    runner = engine.load(built.blob, **settings)

    latencies_ms, elapsed_s = runner.timed_calls(
        np.ones((2, 3, 16, 16), np.float32), warmup_ms=10, duration_s=0.05, min_iterations=20
    )

    assert len(latencies_ms) >= 20
    assert min(latencies_ms) > 0
    # On one stream computations do not overlap.
    assert sum(latencies_ms) / 1000 <= elapsed_s * 1.01


@pytest.mark.gpu
@needs_gpu
def test_the_timing_cache_of_a_build_serves_the_next_engine(tmp_path):
    path, first = save_classifier(tmp_path / "a.onnx", quantized=True), TensorRtEngine()
    first.build(path, precision="int8", batch_size=1, float_remainder="fp32")

    second = TensorRtEngine(timing_cache=first.timing_cache)
    second.build(path, precision="int8", batch_size=1, float_remainder="fp32")

    assert len(first.timing_cache) > 0
    assert len(second.timing_cache) == len(first.timing_cache)
