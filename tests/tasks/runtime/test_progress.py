"""How far a stage is: in the log, and on the page of the run where a server keeps it."""

import logging
import threading

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.runtime import progress
from tasks.runtime.progress import artifact_key, has_lasting_server, progress_logger

ALWAYS, NEVER = 0.0, 3600.0


def requests_of(what):
    return [thread for thread in threading.enumerate() if thread.name == f"progress of {what}"]


def settle(what):
    """Wait until everything that was sent has been answered."""
    for thread in requests_of(what):
        thread.join()


def artifacts_of(what):
    with get_client(sync_client=True) as client:
        return client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key("progress", what)]))
        )


def run_stage(what, *steps, every_s=ALWAYS, between=lambda: None):
    """A run whose one stage reports each step and waits until it was shown: the ids of the run and of the stage."""

    @task
    def advance():
        report = progress_logger(what, every_s=every_s)
        for done, total in steps:
            report(done, total)
            settle(what)
            between()

    @flow
    def run():
        return advance(return_state=True).state_details

    details = run()
    return details.flow_run_id, details.task_run_id


@pytest.fixture
def debug_lines():
    """What the run's logger says at the level debug."""
    lines = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: lines.append(record.getMessage()) if record.levelno == logging.DEBUG else None
    logger = logging.getLogger("prefect.task_runs")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_a_long_stage_has_a_progress_artifact_on_the_page_of_its_run(prefect_backend):
    flow_run_id, task_run_id = run_stage("Long images", (1, 4), (3, 4))
    (artifact,) = artifacts_of("Long images")
    assert (artifact.type, artifact.data, artifact.description) == ("progress", 75.0, "Long images")
    assert (artifact.flow_run_id, artifact.task_run_id) == (flow_run_id, task_run_id)


def test_a_stage_that_has_ended_is_at_100(prefect_backend):
    run_stage("Ended images", (1, 3), (3, 3))
    (artifact,) = artifacts_of("Ended images")
    assert artifact.data == 100.0


def test_a_short_stage_has_none(prefect_backend):
    run_stage("Short images", (1, 4), (4, 4), every_s=NEVER)
    assert artifacts_of("Short images") == []


def test_an_artifact_that_cannot_be_updated_fails_no_stage(prefect_backend, debug_lines):
    def forget():
        for artifact in artifacts_of("Lost images"):
            with get_client(sync_client=True) as client:
                client.delete_artifact(artifact.id)

    run_stage("Lost images", (1, 4), (4, 4), between=forget)
    assert [line for line in debug_lines if line.startswith("The progress of Lost images could not be shown: ")] != []


def test_a_server_that_keeps_one_waiting_holds_up_no_stage_and_is_told_the_end(monkeypatch, prefect_backend):
    answered, told = threading.Event(), []

    def slow(percent, *, key, description):
        told.append((key, percent))
        answered.wait()
        return "id"

    monkeypatch.setattr(progress, "create_progress_artifact", slow)
    monkeypatch.setattr(progress, "update_progress_artifact", lambda id, percent: told.append((id, percent)))
    with disable_run_logger():
        report = progress_logger("Slow images", every_s=ALWAYS)
    report(1, 4)
    report(2, 4)
    report(4, 4)
    answered.set()
    settle("Slow images")
    assert told == [("progress-slow-images", 25.0), ("id", 100.0)]


def test_the_server_of_a_url_lasts_and_the_embedded_one_does_not(prefect_backend):
    assert has_lasting_server()
    with temporary_settings({PREFECT_API_URL: None}):
        assert not has_lasting_server()


def test_the_embedded_server_is_told_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(progress, "create_progress_artifact", lambda *arguments, **named: told.append(named))
    with temporary_settings({PREFECT_API_URL: None}), disable_run_logger():
        report = progress_logger("Embedded images", every_s=ALWAYS)
        report(1, 4)
        settle("Embedded images")
    assert told == []
