from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from ptq.errors import ArtifactError, CalibrationError
from ptq.records.base import ArtifactRef
from ptq.storage.store import open_store
from tasks.runtime.retries import is_transient
from tasks.runtime.stage import RunContext, stage


@dataclass(frozen=True, slots=True)
class Doubled:
    value: int
    blob: ArtifactRef


calls: list[int] = []
outside = {"content": "a"}


@stage(returns=Doubled, timeout_seconds=10, ignore=("threads",), reads=lambda value: [value, outside["content"]])
def double(value: int, *, threads: int = 1, run: RunContext) -> Doubled:
    """Double a number and store it."""
    calls.append(value)
    return Doubled(2 * value, open_store(run.store_uri).put_bytes(str(2 * value).encode(), "doubled.txt"))


@pytest.fixture
def run(tmp_path):
    calls.clear()
    outside["content"] = "a"
    return RunContext(store_uri=str(tmp_path / "store"), run_id="run-1")


def test_a_stage_runs_once_for_the_same_inputs(run):
    assert double.fn(3, run=run) == double.fn(3, run=run)
    assert calls == [3]


def test_a_stage_runs_again_for_other_inputs(run):
    double.fn(3, run=run)
    double.fn(4, run=run)
    assert calls == [3, 4]


def test_the_store_and_ignored_arguments_are_no_inputs(run, tmp_path):
    double.fn(3, run=run)
    double.fn(3, threads=8, run=RunContext(run.store_uri, "run-2"))
    assert calls == [3]


def test_a_change_outside_the_store_is_seen(run):
    double.fn(3, run=run)
    outside["content"] = "b"
    double.fn(3, run=run)
    assert calls == [3, 3]


@stage(returns=Doubled, timeout_seconds=10, reads=lambda value: outside["content"])
def overtaken(value: int, *, run: RunContext) -> Doubled:
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
    double.fn(3, run=RunContext(run.store_uri, "run-2"))
    store = open_store(run.store_uri)
    assert [note["cached"] for note in store.run_stages("run-1")] == [False]
    assert [note["cached"] for note in store.run_stages("run-2")] == [True]


def test_every_stage_has_a_time_limit_and_its_own_name():
    assert double.name == "double"
    assert double.timeout_seconds == 10


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ConnectionError("reset"), True), (CalibrationError("no image"), False), (KeyError(), False)],
)
def test_only_transport_faults_are_worth_another_attempt(error, expected):
    state = SimpleNamespace(result=lambda raise_on_failure: error)
    assert is_transient(None, None, state) is expected
