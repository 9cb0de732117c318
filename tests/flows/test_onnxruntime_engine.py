"""A run whose model is for ONNX Runtime."""

import networks
import onnx
import pytest
import torch

from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from ptq.records.verdict import Verdict


def test_a_model_for_onnxruntime_is_evaluated_and_benchmarked_on_it_and_runs_on_integers(
    prefect_backend, image_folder, tmp_path
):
    torch.save(networks.small_resnet().state_dict(), tmp_path / "small.pth")
    config = PtqConfig.model_validate(
        {
            "model": {"name": "networks:SmallResNet", "checkpoint": str(tmp_path / "small.pth")},
            "data": {"path": str(image_folder), "preprocessing": {"resize": 24, "crop": 24}},
            "quantization": {"dialects": ["cpu", "onnxruntime"]},
            "calibration": {"trials": 1, "images": 16, "methods": ["max"]},
            "engine": {"name": "onnxruntime", "threads": 1},
            "benchmark": {"batch_sizes": [1], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
            "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
            "output": {"store": str(tmp_path / "store"), "directory": str(tmp_path / "output")},
        }
    )
    assert quantize_model(config).accepted
    verdict = Verdict.model_validate_json((tmp_path / "output" / "verdict.json").read_bytes())
    assert verdict.engine.name == "onnxruntime"
    assert (verdict.graph_checks.errors, verdict.graph_checks.warnings) == (0, 0)
    # The last layer writes the logits, in float.
    found = verdict.int8.conv_int8_input_percent, verdict.int8.conv_int8_output_percent
    assert found == (100, pytest.approx(100 * 6 / 7))
    assert verdict.parity.layer == ""
    kinds = {}
    for name in ("model_int8.onnx", "model_int8_cpu.onnx"):
        graph = onnx.load(tmp_path / "output" / name).graph
        kinds[name] = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    assert kinds["model_int8.onnx"] > kinds["model_int8_cpu.onnx"]
