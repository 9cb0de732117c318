import importlib
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pytest
from prefect import Task

from ptq.config import PtqConfig
from ptq.errors import ArtifactError
from ptq.records.base import ArtifactRef
from ptq.records.graph import EngineIdentity
from ptq.storage.store import open_store
from tasks.runtime.context import RunContext, StageContext, value_of
from tasks.runtime.stage import stage


@dataclass(frozen=True, slots=True)
class Doubled:
    value: int
    blob: ArtifactRef


STAGES = Path(__file__).resolve().parents[3] / "tasks" / "stages"
calls: list[int] = []
outside = {"content": "a"}


@stage(returns=Doubled, timeout_seconds=10, ignores=("threads",), reads=lambda value: [value, outside["content"]])
def double(value: int, *, threads: int = 1, run: StageContext) -> Doubled:
    """Double a number and store it."""
    calls.append(value)
    return Doubled(2 * value, open_store(run.store_uri).put_bytes(str(2 * value).encode(), "doubled.txt"))


@pytest.fixture
def run(tmp_path):
    calls.clear()
    outside["content"] = "a"
    return StageContext(store_uri=str(tmp_path / "store"), run_id="run-1")


def test_a_stage_runs_once_for_the_same_inputs(run):
    assert double.fn(3, run=run) == double.fn(3, run=run)
    assert calls == [3]


def test_a_stage_runs_again_for_other_inputs(run):
    double.fn(3, run=run)
    double.fn(4, run=run)
    assert calls == [3, 4]


def test_the_store_and_ignored_arguments_are_no_inputs(run, tmp_path):
    double.fn(3, run=run)
    double.fn(3, threads=8, run=StageContext(run.store_uri, "run-2"))
    assert calls == [3]


def test_a_change_outside_the_store_is_seen(run):
    double.fn(3, run=run)
    outside["content"] = "b"
    double.fn(3, run=run)
    assert calls == [3, 3]


@stage(returns=Doubled, timeout_seconds=10, reads=lambda value: outside["content"])
def overtaken(value: int, *, run: StageContext) -> Doubled:
    """Double a number while somebody replaces what it reads, the first time."""
    calls.append(value)
    outside["content"] = "b"
    return Doubled(2 * value, open_store(run.store_uri).put_bytes(b"", "empty.txt"))


def test_what_was_read_while_it_was_replaced_is_not_kept(run):
    with pytest.raises(ArtifactError, match="What overtaken reads was replaced while it read it"):
        overtaken.fn(3, run=run)
    assert open_store(run.store_uri).run_stages("run-1") == []
    overtaken.fn(3, run=run)
    overtaken.fn(3, run=run)
    assert calls == [3, 3]


@stage(returns=Doubled, timeout_seconds=60, reads=lambda: outside["content"], reads_until="begun")
def read_first(value, *, run):
    calls.append(value)
    outside["content"] = "c"
    return Doubled(2 * value, open_store(run.store_uri).put_bytes(b"", "empty.txt"))


def test_a_stage_that_reads_as_it_begins_keeps_its_result_whatever_is_replaced_afterwards(run):
    record = read_first.fn(3, run=run)
    outside["content"] = "a"
    assert read_first.fn(3, run=run) == record
    assert calls == [3]


def test_a_stage_whose_object_was_lost_runs_again(run):
    record = double.fn(3, run=run)
    open_store(run.store_uri).get_path(record.blob).unlink()
    assert double.fn(3, run=run) == record
    assert calls == [3, 3]


def test_a_run_notes_what_it_found_and_what_it_computed(run):
    double.fn(3, run=run)
    double.fn(3, run=StageContext(run.store_uri, "run-2"))
    store = open_store(run.store_uri)
    assert [note["cached"] for note in store.run_stages("run-1")] == [False]
    assert [note["cached"] for note in store.run_stages("run-2")] == [True]


def test_every_stage_has_a_time_limit_and_its_own_name():
    assert double.name == "double"
    assert double.timeout_seconds == 10


CONFIG = PtqConfig.model_validate({"model": {"name": "resnet18", "checkpoint": "a.pth"}, "data": {"path": "images"}})


def run_with(tmp_path, **calibration):
    config = CONFIG.model_copy(update={"calibration": CONFIG.calibration.model_copy(update=calibration)})
    engine = EngineIdentity(name="openvino", version="1", device="a CPU", threads=0)
    return RunContext(str(tmp_path / "store"), "run-1", config, engine, ("fp32", "int8"), "val")


@stage(returns=Doubled, timeout_seconds=10, uses=("config.calibration.seed", "dialect"), ignores=("threads",))
def seeded(*, run: RunContext) -> Doubled:
    """Store the seed."""
    calls.append(run.config.calibration.seed)
    return Doubled(run.config.calibration.seed, run.store.put_bytes(f"{run.dialect} {run.threads}".encode(), "a.txt"))


def test_a_stage_runs_again_for_another_value_of_a_setting_that_it_uses_and_for_no_other(run, tmp_path):
    for settings in ({"seed": 0}, {"seed": 1}, {"seed": 1, "images": 9}):
        seeded.fn(run=run_with(tmp_path, **settings))
    assert calls == [0, 1]


@pytest.mark.parametrize("path", ["config.calibration.images", "config.gate", "identity", "normalization"])
def test_a_setting_that_a_stage_reads_and_does_not_declare_cannot_reach_it(run, tmp_path, path):
    @stage(returns=Doubled, timeout_seconds=10, uses=("config.calibration.seed",))
    def undeclared(*, run: RunContext) -> Doubled:
        """Read what is not declared."""
        return Doubled(int(str(attrgetter(path)(run))), run.store.put_bytes(b"", "empty.txt"))

    with pytest.raises(AttributeError, match=rf"Stage undeclared reads {path} of its run, .* add {path} to uses"):
        undeclared.fn(run=run_with(tmp_path))
    assert open_store(str(tmp_path / "store")).run_stages("run-1") == []


def stages_of_a_run():
    modules = [importlib.import_module(f"tasks.stages.{path.stem}") for path in STAGES.glob("[a-z]*.py")]
    found = {name: each for module in modules for name, each in vars(module).items() if isinstance(each, Task)}
    return {name: each.fn.declared for name, each in found.items() if hasattr(each.fn, "declared")}


def test_whatever_a_stage_declares_is_in_the_context_of_a_run_or_an_argument(tmp_path):
    run, found = run_with(tmp_path), stages_of_a_run()
    assert len(found) > 20
    arguments = {"model", "data", "config"}
    missing = {
        (name, path) for name, declared in found.items() for path in declared - arguments if not has_path(run, path)
    }
    assert missing == set()


def has_path(run, path):
    try:
        value_of(run, path)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize(
    ("engine", "asked", "has", "expected"),
    [
        ("openvino", "portable", "avx512_core_amx", True),
        ("openvino", "portable", "avx2", True),
        ("openvino", "native", "avx2", True),
        ("openvino", "native", "avx512_core", True),
        ("openvino", "native", "avx2_vnni", False),
        ("openvino", "native", "arm64", False),
        ("openvino", "avx512_core_vnni", "avx512_core_vnni", False),
        ("tensorrt", "portable", "", False),
    ],
)
def test_weights_are_fit_for_16_bit_sums_where_the_model_or_this_processor_needs_it(engine, asked, has, expected):
    config = CONFIG.model_copy(update={"engine": CONFIG.engine.model_copy(update={"isa": asked})})
    run = RunContext("store", "run-1", config, EngineIdentity(engine, "1", "a device", 1, has), ("fp32", "int8"))
    assert run.limits_pair_sums is expected
