"""Does the server take up a run whose process died, and does it give up at some point?"""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.objects import StateType
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Cancelling, Crashed, Pending, Running

from deployments import automations, server_calls

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(deployed):
    """The test server with the automations, which wait as shortly as Prefect allows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SILENCE", "PAUSE_BEFORE_ATTEMPT", "PAUSE_BEFORE_START", "LONGEST_PENDING"):
            patch.setattr(automations, name, timedelta(seconds=10))
        automations.set_up_automations()
    return deployed


def new_run(server):
    deployment = server.read_deployment_by_name("quantize-model/on-demand")
    return server.create_flow_run_from_deployment(deployment.id).id


def go_through(server, run, *states):
    """Sets the states as a worker does: not all in a moment, which mixes their events."""
    for state in states:
        server.set_flow_run_state(run, state)
        time.sleep(1)


def crash(server, run):
    go_through(server, run, Pending(), Running(), Crashed())


def is_scheduled_again(server, run):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.read_flow_run(run).state.type == StateType.SCHEDULED:
            return True
        time.sleep(0.5)
    return False


@pytest.mark.slow
def test_a_run_that_crashes_every_time_is_tried_three_times(server):
    run, other = new_run(server), new_run(server)
    crash(server, run)
    assert is_scheduled_again(server, run)
    crash(server, run)
    assert is_scheduled_again(server, run)
    crash(server, run)
    crash(server, other)
    assert is_scheduled_again(server, other)
    found = server.read_flow_run(run)
    assert (found.state.type, found.run_count) == (StateType.CRASHED, automations.MOST_ATTEMPTS)


@pytest.mark.slow
def test_a_run_that_stays_pending_is_tried_again_and_one_that_began_is_not(server):
    lost, begun = new_run(server), new_run(server)
    go_through(server, begun, Pending(), Running())
    go_through(server, lost, Pending())
    assert is_scheduled_again(server, lost)
    time.sleep(10)
    assert server.read_flow_run(begun).state.type == StateType.RUNNING


@pytest.mark.slow
def test_runs_whose_worker_is_gone_are_given_up_or_begun_anew(server):
    pending, running, cancelling = (new_run(server) for _ in range(3))
    server.set_flow_run_state(pending, Pending())
    server.set_flow_run_state(running, Running())
    server.set_flow_run_state(cancelling, Running())
    server.set_flow_run_state(cancelling, Cancelling())
    assert server_calls.give_up_lost_runs(str(server.api_url).removesuffix("/").removesuffix("/api")) >= 3
    found = [server.read_flow_run(run).state.type for run in (pending, running, cancelling)]
    assert found == [StateType.SCHEDULED, StateType.CRASHED, StateType.CANCELLED]


def test_a_server_that_does_not_answer_has_lost_nothing():
    assert server_calls.give_up_lost_runs("http://127.0.0.1:1") == 0
    assert not server_calls.is_healthy("http://127.0.0.1:1")
    assert not server_calls.has_worker_since("http://127.0.0.1:1", 0)


def test_the_automations_know_every_flow_that_is_deployed():
    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    entrypoints = [str(ROOT / deployment["entrypoint"]) for deployment in content["deployments"]]
    assert sorted(automations.FLOWS) == sorted(load_flow_from_entrypoint(entrypoint).name for entrypoint in entrypoints)
