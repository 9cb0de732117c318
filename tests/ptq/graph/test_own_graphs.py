"""Do the graph checks, and what holds a file against what was decided, stay silent on this project's own graphs?"""

import onnx
import pytest
import torch
from candidates import calibrated
from networks import Untraceable, small_resnet

from ptq.checks.run import check_graph
from ptq.graph.against_plan import find_difference
from ptq.networks.factory import create_model

# One small network of each kind of block, and the pixels of a side.
NETWORKS = {
    "mobilenet_v2": 32, "mobilenet_v3_small": 32, "squeezenet1_1": 48, "regnet_y_400mf": 32, "mnasnet0_5": 32,
    "benchmarks.networks:cifar_resnet20": 32, "tests.support.networks:small_vision_transformer": 32,
    "tests.support.networks:small_swin": 32, "tests.support.networks:small_convnext": 32,
    "tests.support.networks:small_densenet": 32,
}  # fmt: skip

LARGEST = ("mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "mnasnet0_5", "tests.support.networks:small_swin")


def findings_of(model, directory, *, side, dialects=("cpu", "onnxruntime", "tensorrt"), **options):
    """What is found in the Q/DQ graphs of every dialect of a network calibrated on one random batch."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    network = calibrated(model, directory, images, **options)
    allowed = (*network.plan.float_layers, *network.plan.float_operators)
    fp32 = onnx.load(network.fp32)
    found = []
    for dialect in dialects:
        path = network.write(dialect)
        checks = check_graph(
            path,
            dialect=dialect,
            allowed_float_layers=allowed,
            input_shape=(3, side, side),
            num_classes=network.classes,
        )
        found += [finding for finding in checks.findings if finding.severity != "info"]
        found += filter(None, [find_difference(onnx.load(path), fp32, network.decided(dialect))])
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
