import pytest
from prefect.logging import disable_run_logger

from ptq.config import PtqConfig
from ptq.engines.base import BuiltEngine
from ptq.records.graph import EngineIdentity, LayerReport
from ptq.storage.store import open_store
from tasks.runtime.context import RunContext
from tasks.stages import engine

CONFIG = PtqConfig.model_validate({"model": {"name": "resnet18", "checkpoint": "a.pth"}, "data": {"path": "images"}})
IDENTITY = EngineIdentity(name="tensorrt", version="10.16.1", device="a GPU", threads=0)


class CachingEngine:
    """An engine that learns one byte at each build."""

    def __init__(self, timing_cache):
        self.timing_cache = timing_cache

    def build(self, onnx, *, precision, batch_size, float_remainder):
        layers = (LayerReport("conv", "convolution", "int8", "int8", "kernel"),)
        return BuiltEngine(onnx.read_bytes(), layers, 0.5, ("typing: strong",), self.timing_cache + b"k")


@pytest.fixture
def opened(monkeypatch):
    caches = []

    def open_it(name, *, threads, timing_cache=b""):
        caches.append(timing_cache)
        return CachingEngine(timing_cache)

    monkeypatch.setattr(engine, "open_engine", open_it)
    return caches


def build(store, batch_size, identity=IDENTITY):
    graph = open_store(str(store)).put_bytes(b"graph", "model.onnx")
    with disable_run_logger():
        run = RunContext(str(store), "run-1", CONFIG, identity, ("fp32", "int8"))
        return engine.build_engine.fn(graph, "int8", batch_size, "fp32", run=run)


def test_the_timing_cache_goes_from_one_build_to_the_next_of_the_same_engine(tmp_path, opened):
    for batch_size in (1, 2, 3):
        build(tmp_path, batch_size)
    other = EngineIdentity(name="tensorrt", version="11.4.0", device="a GPU", threads=0)
    build(tmp_path, 1, identity=other)
    assert opened == [b"", b"k", b"kk", b""]


def test_the_timing_cache_does_not_repeat_a_build(tmp_path, opened):
    first, again = build(tmp_path, 1), build(tmp_path, 1)
    assert first == again
    assert len(opened) == 1


def test_the_settings_of_the_build_are_in_the_record(tmp_path, opened):
    assert build(tmp_path, 1).build_settings == ("typing: strong",)
