"""Which instruction sets a processor has, and what OpenVINO's kernels do under those without VNNI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptq.engines import isa
from ptq.errors import EngineBuildError, UsageError
from ptq.numerics.saturation import neighbours

ROOT = Path(__file__).parents[3]
ZEN3 = ["fpu", "sse4_1", "avx", "avx2"]
ICE_LAKE = [*ZEN3, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"]
SAPPHIRE_RAPIDS = [*ICE_LAKE, "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8"]


@pytest.mark.parametrize(
    ("features", "limit", "newest"),
    [
        (ZEN3, "", "avx2"),
        (ZEN3, "avx512_core_vnni", "avx2"),
        ([*ZEN3, "avx_vnni"], "", "avx2_vnni"),
        (ICE_LAKE, "", "avx512_core_vnni"),
        (ICE_LAKE, "avx2_vnni", "avx2"),
        (SAPPHIRE_RAPIDS, "", "avx512_core_amx"),
        (SAPPHIRE_RAPIDS, "avx512_core", "avx512_core"),
        (SAPPHIRE_RAPIDS, "a name that oneDNN does not know", "avx512_core_amx"),
    ],
)
def test_the_newest_instruction_set_within_the_limit_is_used(features, limit, newest):
    assert isa.isas_within(features, limit=limit)[-1] == newest


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "avx2"),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE", "avx512_core"),
        ("ONEDNN_MAX_CPU_ISA", "AVX10_1_512", "avx512_core_fp16"),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", "avx512_core_amx"),
    ],
)
def test_the_limit_in_the_environment_is_heeded(monkeypatch, variable, value, expected):
    monkeypatch.setattr(isa, "_processor_features", lambda: frozenset(SAPPHIRE_RAPIDS))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv(variable, value)
    assert isa.current_isa() == expected


def test_another_architecture_goes_by_its_name(monkeypatch):
    monkeypatch.setattr(isa, "_processor_features", frozenset)
    monkeypatch.setattr(isa.platform, "machine", lambda: "ARM64")
    assert isa.current_isa() == "arm64"
    assert not isa.adds_in_16_bits("arm64")


def test_an_unknown_instruction_set_is_named_with_those_there_are():
    with pytest.raises(UsageError, match=r"is 'avx3'. Those that .* are sse41, avx2, .* or `native`"):
        isa.play_isa("avx3")


def test_an_engine_that_knows_no_limit_is_named(monkeypatch):
    monkeypatch.setattr(isa, "_processor_features", lambda: frozenset(ZEN3))
    with pytest.raises(
        UsageError, match="engine.isa is avx2, and engine onnxruntime uses whatever .*--engine openvino"
    ):
        isa.play_isa("avx2", engine="onnxruntime")


def test_one_that_the_processor_lacks_is_named_with_those_it_has(monkeypatch):
    monkeypatch.setattr(isa, "_processor_features", lambda: frozenset(ZEN3))
    with pytest.raises(EngineBuildError, match="has no avx512_core_vnni; it has sse41, avx2. Take one of these"):
        isa.play_isa("avx512_core_vnni")


def test_openvino_that_runs_already_cannot_be_limited(monkeypatch):
    monkeypatch.setattr(isa, "_processor_features", lambda: frozenset(SAPPHIRE_RAPIDS))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineBuildError, match="avx512_core_amx, and cannot change to avx2. Set .*_ISA=AVX2 before"):
        isa.play_isa("avx2")
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ
    isa.play_isa("avx512_core_amx")


def test_before_openvino_runs_the_limit_is_set(monkeypatch):
    monkeypatch.setattr(isa, "_processor_features", lambda: frozenset(SAPPHIRE_RAPIDS))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "DEFAULT")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    isa.play_isa("avx2")
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert isa.current_isa() == "avx2"


# Every pair of elements of a kernel in an output channel of its own, both 127, the others 0: which of them saturate?
PROGRAM = """
import itertools, json, sys
import numpy as np
import ptq.engines.openvino
import openvino
from openvino import opset13 as ov

def quantized(node, low, high, levels=256):
    return ov.fake_quantize(node, *(np.float32(each) for each in (low, high, low, high)), levels)

def saturating(inputs, size, outputs, groups, is_signed):
    pairs = list(itertools.combinations(range(inputs * size * size), 2))
    found = []
    for start in range(0, len(pairs), outputs):
        chunk = pairs[start : start + outputs]
        weight = np.zeros((groups, outputs, inputs, size, size), np.float32)
        for out, pair in enumerate(chunk):
            for element in pair:
                weight[:, out, element // size**2, element // size % size, element % size] = 127
        steps = ov.constant(weight if groups > 1 else weight[0])
        image = ov.parameter([1, inputs * groups, 8, 8], openvino.Type.f32)
        low, high = (-128, 127) if is_signed else (0, 255)
        operands = quantized(image, low, high), quantized(steps, -127, 127, levels=255)
        operation = ov.group_convolution if groups > 1 else ov.convolution
        border = [size // 2, size // 2]
        result = operation(*operands, strides=[1, 1], pads_begin=border, pads_end=border, dilations=[1, 1])
        model = openvino.Model([result], [image])
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        middle = compiled(np.full((1, inputs * groups, 8, 8), high, np.float32))[0][0, :, 4, 4]
        found += [pair for pair, value in zip(chunk, middle) if value != 2 * 127 * high]
    return found

print(json.dumps([saturating(*case) for case in json.loads(sys.argv[1])]))
"""
CASES = [(5, 1, 10, 1, False), (4, 1, 6, 1, True), (3, 3, 40, 2, False), (3, 3, 40, 2, True), (1, 3, 1, 4, False)]


def saturating_pairs(limit):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": limit},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif("avx2" not in isa.playable_isas(), reason="needs a processor with AVX2")
def test_openvino_without_vnni_saturates_at_the_neighbours_and_nowhere_else():
    for (inputs, size, outputs, groups, _), found in zip(CASES, saturating_pairs("AVX2"), strict=True):
        expected = neighbours(inputs, size**2, outputs=outputs, groups=groups)
        assert {tuple(pair) for pair in found} == {tuple(sorted(pair)) for pair in expected.tolist()}


@pytest.mark.skipif(isa.adds_in_16_bits(isa.current_isa()), reason="needs a processor with VNNI")
def test_openvino_with_vnni_saturates_nowhere():
    assert saturating_pairs("DEFAULT") == [[]] * len(CASES)
