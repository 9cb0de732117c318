"""Can everything that prefect.yaml declares be loaded, scheduled, triggered and run?"""

import asyncio
import inspect
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags, FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.flows import load_flow_from_entrypoint
from prefect.server.schemas.schedules import CronSchedule
from prefect.server.utilities.user_templates import render_user_template_sync
from prefect.states import Crashed, Pending, Running
from prefect.utilities.schema_tools import validate

from deployments import automations, bootstrap
from ptq.config import PtqConfig
from ptq.config_file import load_yaml

ROOT = Path(__file__).parents[2]
CONTENT = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in CONTENT["deployments"]}
MODELS = sorted((ROOT / "deployments" / "models").glob("*.yaml"))
SCHEDULES = [(name, schedule) for name, found in DEPLOYMENTS.items() for schedule in found.get("schedules", [])]
EVENT = {"uri": "s3://models/digits/a.pth", "model": "digits", "sha256": "ab" * 32, "size_bytes": 7}


def flow_of(name):
    return load_flow_from_entrypoint(str(ROOT / DEPLOYMENTS[name]["entrypoint"]))


def parameters_from_event(name, payload):
    (trigger,) = DEPLOYMENTS[name]["triggers"]
    event = {"event": {"payload": payload}}
    templates = trigger["parameters"].items()
    return {key: render_user_template_sync(template, event) for key, template in templates}


def test_the_four_deployments_are_there():
    assert list(DEPLOYMENTS) == ["nightly", "on-new-checkpoint", "on-demand", "watch-checkpoints"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_flow_of_a_deployment_loads(name):
    assert callable(flow_of(name))


@pytest.mark.parametrize("name", [name for name in DEPLOYMENTS if "triggers" not in DEPLOYMENTS[name]])
def test_the_parameters_fit_the_flow_and_none_is_left_to_a_default(name):
    flow, parameters = flow_of(name), DEPLOYMENTS[name]["parameters"]
    validate(parameters, flow.parameters.model_dump(), raise_on_error=True)
    flow.validate_parameters(parameters)
    assert set(parameters) == set(inspect.signature(flow.fn).parameters)


@pytest.mark.parametrize("payload", [EVENT, {}], ids=["full payload", "empty payload"])
def test_an_event_gives_parameters_that_fit_the_flow(payload):
    flow = flow_of("on-new-checkpoint")
    parameters = DEPLOYMENTS["on-new-checkpoint"]["parameters"] | parameters_from_event("on-new-checkpoint", payload)
    validate(parameters, flow.parameters.model_dump(), raise_on_error=True)
    flow.validate_parameters(parameters)
    assert set(parameters) == set(inspect.signature(flow.fn).parameters)
    assert [parameters[key] for key in ("uri", "model", "sha256")] == [
        payload.get(key, "") for key in ("uri", "model", "sha256")
    ]


@pytest.mark.parametrize("name", [name for name in DEPLOYMENTS if "triggers" in DEPLOYMENTS[name]])
def test_every_field_of_a_payload_has_a_default(name):
    (trigger,) = DEPLOYMENTS[name]["triggers"]
    DeploymentEventTrigger.model_validate(trigger)
    assert ["| default(" in template for template in trigger["parameters"].values()] == [True, True, True]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_deployment_runs_in_the_pool_with_the_tag_that_the_automations_look_for(name):
    deployment = DEPLOYMENTS[name]
    assert deployment["tags"] == ["ptq"]
    assert deployment["work_pool"]["name"] == bootstrap.POOL
    assert deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert len(deployment["description"]) > 50


@pytest.mark.parametrize(("name", "schedule"), SCHEDULES, ids=[name for name, _ in SCHEDULES])
def test_a_schedule_parses_and_names_its_time_zone(name, schedule):
    cron = CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    assert len(asyncio.run(cron.get_dates(3))) == 3


def test_the_night_begins_at_two_in_berlin_in_summer_and_in_winter():
    ((_, schedule),) = [found for found in SCHEDULES if found[0] == "nightly"]
    cron = CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    summer, winter = (
        asyncio.run(cron.get_dates(1, start=datetime(2027, month, 1, 12, tzinfo=UTC)))[0].astimezone(UTC).hour
        for month in (7, 12)
    )
    assert (summer, winter) == (0, 1)


@pytest.mark.parametrize("file", MODELS, ids=[file.stem for file in MODELS])
def test_the_config_of_a_model_is_whole_and_opens_with_the_command_that_runs_it(file):
    content = load_yaml(file)
    assert PtqConfig.model_validate(content).model_dump(mode="json") == content
    assert file.read_text().startswith(f"# .venv/bin/ptq quantize --config deployments/models/{file.name}\n")


def test_on_demand_offers_the_config_of_the_example():
    assert MODELS != []
    assert DEPLOYMENTS["on-demand"]["parameters"]["config"] == load_yaml(ROOT / "deployments/models/digits.yaml")


def ours():
    return DeploymentFilter(tags=DeploymentFilterTags(all_=["ptq"]))


def runs_of(client, name, *, enough, parameters=None):
    """The runs of a deployment as soon as there are `enough` with these parameters; all that came within a minute."""
    deadline = time.monotonic() + 60
    while True:
        (deployment,) = [found for found in client.read_deployments(deployment_filter=ours()) if found.name == name]
        runs = [
            run
            for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=["ptq"])))
            if run.deployment_id == deployment.id
            and (parameters is None or parameters.items() <= run.parameters.items())
        ]
        if len(runs) >= enough or time.monotonic() > deadline:
            return runs
        time.sleep(0.5)


def test_what_is_deployed_is_what_is_declared(deployed):
    found = {item.name: item for item in deployed.read_deployments(deployment_filter=ours())}
    assert set(found) == set(DEPLOYMENTS)
    assert [step["directory"] for step in found["nightly"].pull_steps[0].values()] == [str(ROOT)]
    assert found["watch-checkpoints"].parameters["prefix"] == "checkpoints"
    assert found["watch-checkpoints"].parameters["store"] == "file://.ptq/store"


@pytest.mark.parametrize("payload", [EVENT, {}], ids=["full payload", "empty payload"])
def test_an_event_starts_one_run_with_its_payload_as_parameters(deployed, payload):
    emit_event(event="checkpoint.created", resource={"prefect.resource.id": "ptq.checkpoint.digits"}, payload=payload)
    expected = {key: payload.get(key, "") for key in ("uri", "model", "sha256")}
    runs = runs_of(deployed, "on-new-checkpoint", enough=1, parameters=expected)
    assert [run.parameters for run in runs] == [expected | {"models": "deployments/models", "notify": []}]


def test_of_checkpoints_that_wait_a_worker_is_given_as_many_as_may_run(deployed):
    bootstrap.limit_queues(ROOT)
    deployment = deployed.read_deployment_by_name("quantize-checkpoint/on-new-checkpoint")
    limit = DEPLOYMENTS["on-new-checkpoint"]["concurrency_limit"]["limit"]
    made = [
        deployed.create_flow_run_from_deployment(deployment.id, parameters={"uri": uri, "model": "many"})
        for uri in ("a.pth", "b.pth", "c.pth")
    ]
    offered = deployed.request(
        "POST", "/work_pools/{name}/get_scheduled_flow_runs", path_params={"name": bootstrap.POOL},
        json={"work_queue_names": ["checkpoints"], "scheduled_before": str(datetime.now(UTC))},
    ).json()  # fmt: skip
    for run in made:
        deployed.delete_flow_run(run.id)
    assert len(offered) == limit


def test_runs_that_watch_another_prefix_than_before_are_ended_and_no_other(deployed):
    deployment = deployed.read_deployment_by_name(bootstrap.WATCHER)
    elsewhere, before, same, running, crashed = (
        deployed.create_flow_run_from_deployment(deployment.id, parameters=changed).id
        for changed in (
            {"prefix": "s3://models/checkpoints"}, {"store": "file://.before"}, {}, {"prefix": "b"}, {"prefix": "c"}
        )
    )  # fmt: skip
    for state in (Pending(), Running()):
        deployed.set_flow_run_state(running, state)
    for state in (Pending(), Crashed()):
        deployed.set_flow_run_state(crashed, state)
    bootstrap.end_other_watches()
    # A worker ends the process of a run that is to be cancelled, and of no other.
    assert deployed.read_flow_run(running).state.type == StateType.CANCELLING
    assert deployed.read_flow_run(crashed).state.type == StateType.CANCELLED
    assert deployed.read_flow_run(same).state.type == StateType.SCHEDULED
    for gone in (elsewhere, before):
        with pytest.raises(ObjectNotFound):
            deployed.read_flow_run(gone)


# The last one: from here on the server takes up what has crashed.
def test_setting_up_twice_leaves_one_automation_of_each_name(deployed):
    for _ in range(2):
        automations.set_up_automations()
    names = [automation.name for automation in automations.automations()]
    assert [len(deployed.read_automations_by_name(name)) for name in names] == [1, 1, 1, 1]
