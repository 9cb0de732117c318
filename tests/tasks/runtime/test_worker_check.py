import re
from dataclasses import replace

import pytest

from ptq.engines import open_engine
from ptq.storage.store import open_store
from tasks.runtime.worker_check import worker_mismatch, worker_requirements


@pytest.fixture
def terms(tmp_path):
    engine = open_engine("openvino", threads=1).identity()
    return worker_requirements(engine, threads=1, store_uri=str(tmp_path / "store"))


def test_the_machine_of_the_run_meets_its_own_terms(terms):
    assert worker_mismatch(terms) == ""


def test_a_relative_store_is_named_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = open_engine("openvino", threads=1).identity()
    assert worker_requirements(engine, threads=1, store_uri="store").store_uri == (tmp_path / "store").as_uri()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": "0" * 64}, r"has the sources [0-9a-f]{12} of ptq, tasks and flows, the flow 000000000000\."),
        ({"libraries": (("numpy", "1.0"),)}, r"has numpy [0-9.]+, the flow 1\.0\. Install the same constraints\.txt"),
        ({"threads": 2}, r"runs openvino .* with 2 threads, the flow openvino .* with 1 threads; .* engine\.threads"),
    ],
)
def test_a_worker_that_differs_is_told_what_differs(terms, change, message):
    assert re.match(message, worker_mismatch(replace(terms, **change)))


def test_a_worker_that_sees_another_store_is_told_so(terms, tmp_path):
    elsewhere = replace(terms, store_uri=open_store(str(tmp_path / "other")).uri)
    assert worker_mismatch(elsewhere).startswith(f"does not see what the flow wrote to the store {elsewhere.store_uri}")


def test_a_worker_without_the_engine_says_why_it_cannot_compute(terms):
    without = replace(terms, engine=replace(terms.engine, name="none"))
    assert worker_mismatch(without).startswith("cannot compute stages: engine.name is 'none'")
