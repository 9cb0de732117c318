"""Do the graph checks, and what holds a file against what was decided, stay silent on this project's own graphs?"""

import onnx
import pytest
import torch
from networks import Untraceable, small_resnet

from ptq.checks.run import check_graph
from ptq.dialect import observed_names
from ptq.graph.against_plan import Decisions, find_difference
from ptq.graph.candidate import write_candidate
from ptq.graph.pair_sums import limit_pair_sums
from ptq.networks.export import export_onnx, export_qdq_template
from ptq.networks.factory import create_model
from ptq.networks.fake_quant import fake_quant_from_folded, weight_amax
from ptq.networks.folding import fold_model
from ptq.networks.observed import observed_from_folded
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of
from tests.support.networks import PLACEMENT

METADATA = {"checkpoint_sha256": "0" * 64, "method": "max", "trial": "0"}
# One small network of each kind of block, and the pixels of a side.
NETWORKS = {
    "mobilenet_v2": 32, "mobilenet_v3_small": 32, "squeezenet1_1": 48, "regnet_y_400mf": 32, "mnasnet0_5": 32,
    "benchmarks.networks:cifar_resnet20": 32, "tests.support.networks:small_vision_transformer": 32,
    "tests.support.networks:small_swin": 32, "tests.support.networks:small_convnext": 32,
    "tests.support.networks:small_densenet": 32,
}  # fmt: skip

LARGEST = ("mobilenet_v3_small", "regnet_y_400mf", "mnasnet0_5", "tests.support.networks:small_swin")


def findings_of(model, directory, *, side, dialects=("cpu", "onnxruntime", "tensorrt"), **options):
    """What is found in the Q/DQ graphs of every dialect of a network calibrated on one random batch."""
    shape = (3, side, side)
    folded = fold_model(model, input_shape=shape)
    view = view_of(folded.module, traced=folded.traced)
    plan = place_quantizers(view, **{**PLACEMENT, **options}, whole_operators=True)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, *tensors = observed_from_folded(folded.module, plan)(images)
    amax = {name: float(seen.abs().max()) + 1e-3 for name, seen in zip(observed_names(plan), tensors, strict=True)}
    fake_quant = fake_quant_from_folded(
        folded.module, plan, dialect="tensorrt", activation_amax=amax, weight_amax=weight_amax(folded.module, plan)
    )
    export_qdq_template(fake_quant, directory / "native.onnx", plan=plan, input_shape=shape)
    both = ("openvino", "onnxruntime")
    limit_pair_sums(directory / "native.onnx", directory / "template.onnx", plan=plan, runtimes=both)
    export_onnx(folded.module, directory / "fp32.onnx", input_shape=shape)
    fp32 = onnx.load(directory / "fp32.onnx")
    allowed = (*plan.float_layers, *plan.float_operators)
    found = []
    for dialect in dialects:
        path = directory / f"{dialect}.onnx"
        write_candidate(
            directory / "template.onnx", path, plan=plan, dialect=dialect, activation_amax=amax, metadata=METADATA
        )
        checks = check_graph(
            path, dialect=dialect, allowed_float_layers=allowed, input_shape=shape, num_classes=logits.shape[1]
        )
        found += [finding for finding in checks.findings if finding.severity != "info"]
        decided = Decisions(plan=plan, dialect=dialect, amax=amax, biases={})
        found += filter(None, [find_difference(onnx.load(path), fp32, decided)])
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGEST else name for name in NETWORKS]
)
def test_no_check_finds_anything_in_the_graph_of_a_family(name, tmp_path):
    model = create_model(name, num_classes=10, channels=3)
    assert findings_of(model, tmp_path, side=NETWORKS[name]) == []


@pytest.mark.parametrize(
    "options",
    [{"residuals": False}, {"pools": False}, {"commuting_pools": False}, {"first_layer": False, "last_layer": False},
     {"skip_layers": ("block1.conv2",)}],
    ids=str,
)  # fmt: skip
def test_what_a_user_leaves_in_float_is_no_fault(options, tmp_path):
    assert findings_of(small_resnet(), tmp_path, side=16, **options) == []


def test_what_cannot_be_traced_stays_in_float_without_a_finding(tmp_path):
    assert findings_of(Untraceable().eval(), tmp_path, side=16, dialects=("cpu", "tensorrt")) == []
    # What its layers write cannot be quantized, so that ONNX Runtime runs them in float, which is told.
    (found,) = findings_of(Untraceable().eval(), tmp_path, side=16, dialects=("onnxruntime",))
    assert (found.severity, found.check) == ("error", "whole-operator")
