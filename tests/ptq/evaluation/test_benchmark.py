"""What `measure_engines` records, with OpenVINO's real engines and with a runner that separates transfers."""

from dataclasses import replace

import numpy as np
import pytest

from ptq.engines import int8_share, open_engine
from ptq.engines.base import TransferSamples
from ptq.errors import EngineBuildError
from ptq.evaluation import benchmark as benchmarking
from ptq.evaluation.benchmark import COMPUTE_ONLY, ONE_MODE, LoadedEngine, measure_engines
from ptq.records.base import ArtifactRef
from ptq.records.graph import EngineIdentity, EngineRecord, Int8Share
from tests.ptq.engines.test_tensorrt import save_classifier

SETTINGS = {
    "threads": 1, "float_remainder": "fp32", "input_shape": (3, 16, 16), "warmup_ms": 1.0, "duration_s": 0.02,
    "min_iterations": 4, "rounds": 2,
}  # fmt: skip


def loaded(tmp_path, precision, batch_size):
    path = save_classifier(tmp_path / f"{precision}.onnx", quantized=precision == "int8")
    engine = open_engine("openvino", threads=1)
    built = engine.build(path, precision=precision, batch_size=batch_size, float_remainder="fp32")
    blob = tmp_path / f"{precision}.blob"
    blob.write_bytes(built.blob)
    record = EngineRecord(
        engine=engine.identity(), precision=precision, batch_size=batch_size, onnx_sha256="0" * 64,
        blob=ArtifactRef(blob.name, "0" * 64, len(built.blob)), int8=int8_share(built.layers), build_s=built.build_s,
    )  # fmt: skip
    return LoadedEngine(record, blob)


def test_a_cpu_engine_has_one_mode_and_says_so(tmp_path):
    found = measure_engines([loaded(tmp_path, "fp32", 2), loaded(tmp_path, "int8", 2)], **SETTINGS)
    assert (found.mode, found.end_to_end, found.cross_checks) == (ONE_MODE, (), ())
    assert [measurement.precision for measurement in found.measurements] == ["fp32", "int8"]
    assert all(len(measurement.rounds_median_ms) == 2 for measurement in found.measurements)
    assert all(len(measurement.samples_ms) >= 4 for measurement in found.measurements)


def test_an_engine_of_another_instruction_set_is_refused(tmp_path):
    item = loaded(tmp_path, "int8", 2)
    identity = replace(item.record.engine, isa="avx512_core_amx_of_another_machine")
    other = LoadedEngine(replace(item.record, engine=identity), item.blob)
    here = item.record.engine.isa
    with pytest.raises(EngineBuildError, match=f"int8.blob was built for avx512_core_amx_of.*this process use {here}"):
        measure_engines([other], **SETTINGS)


class GpuRunner:
    """Constant times: INT8 takes twice as long as FP32, and the upload longer than either."""

    def __init__(self, precision):
        self.milliseconds = {"fp32": 1.0, "int8": 2.0}[precision]

    def timed_calls(self, images, *, warmup_ms, duration_s, min_iterations):
        return [self.milliseconds] * min_iterations, self.milliseconds * min_iterations / 1000

    def timed_transfers(self, images, *, warmup_ms, iterations):
        times = (self.milliseconds,) * iterations
        return TransferSamples((3.0,) * iterations, times, (0.5,) * iterations, (0.1,) * iterations, 0.01 * iterations)

    def close(self):
        pass


class GpuEngine:
    def load(self, blob, *, precision, batch_size, float_remainder):
        return GpuRunner(precision)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "open_engine", lambda name, *, threads: GpuEngine())
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "blob").write_bytes(b"plan")
    identity = EngineIdentity("tensorrt", "10.16.1", "a GPU", 0)
    share = Int8Share(2, 50.0, 0.0, 1, ("fc",), ("copy of fc",))
    record = EngineRecord(identity, "fp32", 2, "0" * 64, ArtifactRef("blob", "0" * 64, 4), share, 1.0)
    return [LoadedEngine(replace(record, precision=kind), tmp_path / "blob") for kind in ("fp32", "int8")]


def test_an_engine_that_separates_transfers_has_two_modes(gpu):
    found = measure_engines(gpu, **SETTINGS)
    assert found.mode == COMPUTE_ONLY
    assert [(item.precision, item.median_ms, item.compute_median_ms) for item in found.end_to_end] == [
        ("fp32", 4.5, 1.0), ("int8", 5.5, 2.0)
    ]  # fmt: skip
    np.testing.assert_allclose([item.throughput_images_per_s for item in found.end_to_end], 200.0)
    assert sum("bound by transfers" in warning for warning in found.warnings) == 2


def test_int8_that_does_not_pay_is_a_red_flag_with_the_layers_at_fault(gpu):
    (flag,) = measure_engines(gpu, **SETTINGS).red_flags
    assert "its median is 2.000 ms, and FP32's is 1.000 ms" in flag
    assert "1 of 2 convolutions and linear layers ran in float (fc)" in flag
    assert "converts between types 1 times (copy of fc)" in flag
