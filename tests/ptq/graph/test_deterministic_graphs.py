"""Does the same configuration give the same ONNX bytes, in another folder and another process?"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Hash randomization differs from process to process, and with it the order of a set.
PROGRAM = """
import hashlib, sys
from pathlib import Path
import torch
from ptq.graph.half_precision import half_from_float32
from ptq.config import QuantizationConfig
from ptq.graph.candidate import write_candidate
from ptq.quantization.prepare_torch import prepare_torch_model, write_float_model, write_template
import onnx
from tests.support.networks import small_resnet
folder, shape = Path(sys.argv[1]), (3, 16, 16)
torch.manual_seed(0)
name, checkpoint = "tests.support.networks:small_resnet", folder / "checkpoint.pth"
torch.save(small_resnet().state_dict(), checkpoint)
classes = list(small_resnet().state_dict().values())[-1].numel()
prepared = prepare_torch_model(name=name, checkpoint=checkpoint, class_count=classes, has_named_classes=True,
    input_shape=shape, quantization=QuantizationConfig(), directory=folder)
template = folder / "template.onnx"
write_template(template, weights=prepared.files["weights"], plan=prepared.plan, name=name, num_classes=classes,
    input_shape=shape)
amax = {spec.name: 1.0 + index for index, spec in enumerate(prepared.plan.activations)}
for dialect in ("cpu", "tensorrt"):
    write_candidate(template, folder / f"{dialect}.onnx", plan=prepared.plan, dialect=dialect, activation_amax=amax,
        metadata={"method": "max", "trial": "0", "checkpoint_sha256": "0"})
half = half_from_float32(onnx.load(folder / "tensorrt.onnx")).model
(folder / "half.onnx").write_bytes(half.SerializeToString(deterministic=True))
for batch_size in (None, 4):
    for precision in ("fp32", "fp16"):
        write_float_model(folder / f"{precision}_{batch_size}.onnx", name=name, checkpoint=checkpoint,
            precision=precision, input_shape=shape, batch_size=batch_size)
"""
FILES = [
    "model_fp32.onnx", "model_observed.onnx", "template.onnx", "cpu.onnx", "tensorrt.onnx", "half.onnx",
    "fp32_None.onnx", "fp32_4.onnx", "fp16_None.onnx", "fp16_4.onnx",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What this process writes, and another one."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(here)])
        exec(PROGRAM, {})
    # A hash seed that this process has not, unless by a chance of one to four thousand million.
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(there)], check=True, cwd=ROOT, env=environment)
    return here, there


@pytest.mark.parametrize("name", FILES)
def test_the_same_configuration_gives_the_same_sha256(name, folders):
    first, second = (hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in folders)
    assert first == second


def test_the_files_differ_from_each_other(folders):
    assert len({hashlib.sha256((folders[0] / name).read_bytes()).hexdigest() for name in FILES}) > len(FILES) - 2
