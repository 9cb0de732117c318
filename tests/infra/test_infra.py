"""Does what infra/ names exist: keys, paths, commands, variables, images?

No container engine is needed, and none is used: nothing here shows that an image builds.
"""

import importlib.util
import json
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.settings.models.root import Settings
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
COMPOSE = yaml.safe_load((INFRA / "docker-compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILES = {path.name: path.read_text() for path in sorted(INFRA.glob("Dockerfile*")) if "ignore" not in path.name}
TEMPLATE = json.loads((INFRA / "kubernetes-work-pool.json").read_text())
EXAMPLE = (INFRA / ".env.example").read_text()

Duration = Annotated[str, StringConstraints(pattern=r"^\d+(ms|s|m|h)$")]
Text = Annotated[str, StringConstraints(min_length=1)]


class Strict(BaseModel):
    """A section of the compose file; a key that the specification lacks is an error."""

    model_config = ConfigDict(extra="forbid")


class Build(Strict):
    context: Text
    dockerfile: Text
    target: Text = ""


class HealthCheck(Strict):
    test: list[Text] = Field(min_length=2)
    interval: Duration
    timeout: Duration
    retries: int = Field(ge=1)
    start_period: Duration = "0s"


class Dependency(Strict):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Device(Strict):
    driver: Text
    count: int
    capabilities: list[Text]


class Limits(Strict):
    memory: Annotated[str, StringConstraints(pattern=r"^\d+[mg]$")]


class Reservations(Strict):
    devices: list[Device]


class Resources(Strict):
    limits: Limits | None = None
    reservations: Reservations | None = None


class Deploy(Strict):
    resources: Resources


class Service(Strict):
    image: Annotated[str, StringConstraints(pattern=r"^[a-z0-9./-]+:v?\d+\.\d+[\w.-]*$")]
    restart: Annotated[str, StringConstraints(pattern=r"^(no|always|unless-stopped|on-failure(:\d+)?)$")]
    build: Build | None = None
    init: bool = False
    stop_grace_period: Duration = "10s"
    profiles: list[Text] = []
    depends_on: dict[str, Dependency] = {}
    environment: dict[str, Text] = {}
    ports: list[Annotated[str, StringConstraints(pattern=r"^127\.0\.0\.1:\d+:\d+$")]] = []
    volumes: list[Text] = []
    entrypoint: list[Text] = []
    command: list[Text] = []
    healthcheck: HealthCheck | None = None
    deploy: Deploy | None = None


class Compose(Strict):
    name: Text
    services: dict[str, Service]
    volumes: dict[str, None]


def variables_in(text):
    return set(re.findall(r"\$\{(\w+)", text))


def known_to_prefect():
    names, pending = set(), [Settings.model_json_schema()]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            names |= set(item.get("supported_environment_variables", []))
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return names


def read_by_our_code():
    """The PTQ_ variables that our code and prefect.yaml read."""
    files = [ROOT / "prefect.yaml", *(path for layer in ("ptq", "tasks", "flows", "deployments") for path in
             sorted((ROOT / layer).rglob("*.py")))]  # fmt: skip
    return {name for path in files for name in re.findall(r"PTQ_[A-Z_]+", path.read_text())}


def faults_of_environment(names):
    """The variables that nobody reads."""
    others = {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "ROOT_ACCESS_KEY", "ROOT_SECRET_KEY",
              "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION",
              "AWS_EC2_METADATA_DISABLED", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PATH", "DO_NOT_TRACK",
              "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}  # fmt: skip
    known = others | known_to_prefect() | read_by_our_code()
    return sorted(set(names) - known)


def is_command(words):
    """Whether the first words name a program of the image, or a module that Python can run."""
    if words[:2] == ["python", "-m"]:
        return importlib.util.find_spec(words[2]) is not None
    programs = {script.name for script in entry_points(group="console_scripts")} | {"python"}
    return words[0] in programs


def test_the_compose_file_has_only_keys_and_values_of_the_specification():
    content = {key: value for key, value in COMPOSE.items() if not key.startswith("x-")}
    assert len(Compose.model_validate(content).services) == 7


@pytest.mark.parametrize("wrong", [{"restart": "sometimes"}, {"image": "postgres:latest"}, {"healthchek": {}}])
def test_a_wrong_key_or_value_would_be_noticed(wrong):
    with pytest.raises(ValueError, match="validation error"):
        TypeAdapter(Service).validate_python({"image": "postgres:17.6", "restart": "always"} | wrong)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_services_and_mounts_volumes_that_exist(name):
    service = SERVICES[name]
    for other, dependency in service.get("depends_on", {}).items():
        assert other in SERVICES
        assert dependency["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] if "/" not in source else (INFRA / source).is_dir()
    if "build" in service:
        assert (INFRA / service["build"]["context"]).resolve() == ROOT
        dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
        assert f" AS {service['build'].get('target', 'worker')}\n" in dockerfile


def test_every_own_image_is_built_by_a_service():
    own = {service["image"] for service in SERVICES.values() if service["image"].startswith("ptq-")}
    assert own == {service["image"] for service in SERVICES.values() if "build" in service}
    assert len(own) == 3


@pytest.mark.parametrize("name", [name for name in SERVICES if SERVICES[name]["image"].startswith("ptq-")])
def test_the_command_of_a_service_of_ours_exists(name):
    assert is_command(SERVICES[name].get("command", ["prefect"]))


@pytest.mark.parametrize("words", [["prefekt"], ["python", "-m", "deployments.local_servce"]])
def test_a_command_that_does_not_exist_is_noticed(words):
    assert not is_command(words)


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_that_a_service_is_given_is_read_by_somebody(name):
    assert faults_of_environment(SERVICES[name].get("environment", {})) == []


def test_a_variable_that_nobody_reads_is_noticed():
    assert faults_of_environment(["PTQ_HOME", "PTQ_HOUSE", "PREFECT_API_URI"]) == ["PREFECT_API_URI", "PTQ_HOUSE"]


def test_every_password_must_be_set_and_the_example_sets_none():
    text = (INFRA / "docker-compose.yaml").read_text()
    asked = variables_in(text)
    settings = dict(line.split("=", 1) for line in EXAMPLE.splitlines() if line and not line.startswith("#"))
    assert asked == set(settings)
    assert [name for name, value in settings.items() if value] == ["PTQ_SERVER_URL"]
    optional = set(re.findall(r"\$\{(\w+):-", text))
    assert set(re.findall(r"\$\{(\w+):\?", text)) == asked - optional
    assert optional == {"PTQ_SERVER_URL"}


def test_the_file_with_the_passwords_is_not_committed():
    assert "infra/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_store_that_the_deployments_use_lies_in_the_bucket_that_is_made():
    (command,) = SERVICES["s3-bucket"]["command"]
    environment = SERVICES["bootstrap"]["environment"]
    assert "create-bucket --bucket ptq" in command
    assert {environment[name].split("/")[2] for name in ("PTQ_WATCHED", "PTQ_STORE")} == {"ptq"}


@pytest.mark.parametrize("file", DOCKERFILES)
def test_a_dockerfile_copies_what_exists_runs_what_exists_and_is_no_root(file):
    lines = DOCKERFILES[file].replace("\\\n", " ").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") and "--from" not in line
              for word in line.split()[1:-1] if not word.startswith("--")]  # fmt: skip
    assert len(copied) >= 8
    assert [word for word in copied if not (ROOT / word).exists()] == []
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILES[file], re.MULTILINE)
    used = re.findall(r"^(?:FROM|COPY --from=)\s*([a-z-]+)\b", DOCKERFILES[file], re.MULTILINE)
    assert set(used) <= set(stages)
    commands = [json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ")]
    assert [command for command in commands if not is_command(command)] == []
    assert len(commands) == lines.count("USER ptq") >= 1


@pytest.mark.parametrize("file", DOCKERFILES)
def test_the_base_image_is_one_version_of_the_python_that_the_project_asks_for(file):
    assert set(re.findall(r"PYTHON_IMAGE=(\S+)", DOCKERFILES[file])) == {"python:3.11.14-slim-bookworm"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert re.findall(r"^FROM (\S+:\S+)", DOCKERFILES[file], re.MULTILINE) == []


@pytest.mark.parametrize("file", DOCKERFILES)
def test_every_installation_keeps_to_the_constraints(file):
    installations = re.findall(
        r"pip install ([^&]+?)(?= &&|\n[A-Z\n])", DOCKERFILES[file].replace("\\\n", " ") + "\n\n"
    )
    assert len(installations) >= 1
    assert [found for found in installations if "-c /build/constraints.txt" not in found] == []


@pytest.mark.parametrize("file", DOCKERFILES)
def test_every_variable_of_a_dockerfile_is_read_by_somebody(file):
    names = re.findall(r"^(?:ENV |    )([A-Z_]+)=", DOCKERFILES[file], re.MULTILINE)
    assert len(names) >= 6
    assert faults_of_environment(names) == []


def test_every_package_of_the_project_is_copied_into_the_images():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    top = {package.split(".")[0] for package in packages}
    assert {"flows", "tasks", "ptq", "deployments"} == top
    for text in DOCKERFILES.values():
        assert [package for package in sorted(top) if f"COPY {package} /build/{package}\n" not in text] == []


def shipped_template():
    """The template for Kubernetes that Prefect ships."""
    import prefect.server.api.collections_data.views as views

    (folder,) = views.__path__
    metadata = json.loads((Path(folder) / "aggregate-worker-metadata.json").read_text())
    return metadata["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]


def placeholders(item):
    return set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(item)))


def test_prefect_takes_the_kubernetes_template():
    assert WorkPoolCreate(name="ptq", type="kubernetes", base_job_template=TEMPLATE).type == "kubernetes"
    jsonschema.Draft202012Validator.check_schema(TEMPLATE["variables"])


def test_every_placeholder_of_the_template_is_a_variable_and_every_variable_is_used():
    assert placeholders(TEMPLATE["job_configuration"]) == set(TEMPLATE["variables"]["properties"])


def test_the_template_keeps_what_the_kubernetes_worker_reads():
    shipped = shipped_template()
    assert set(TEMPLATE["job_configuration"]) == set(shipped["job_configuration"])
    assert set(shipped["variables"]["properties"]) <= set(TEMPLATE["variables"]["properties"])


def test_the_defaults_of_the_template_fit_its_own_schema():
    variables = TEMPLATE["variables"]
    defaults = {name: field["default"] for name, field in variables["properties"].items() if "default" in field}
    assert defaults["image"] == "ptq-worker:0.1.0"
    jsonschema.validate(defaults, variables)


def test_the_job_is_a_kubernetes_job_without_privileges():
    manifest: dict[str, Any] = TEMPLATE["job_configuration"]["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (manifest["apiVersion"], manifest["kind"], manifest["spec"]["parallelism"]) == ("batch/v1", "Job", 1)
    assert (pod["restartPolicy"], pod["securityContext"]["runAsNonRoot"]) == ("Never", True)
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_readme_names_every_file_and_only_files_that_exist():
    text = (INFRA / "README.md").read_text()
    named = set(re.findall(r"^\| `([\w.-]+)` \|", text, re.MULTILINE))
    shown = {path.name for path in INFRA.iterdir() if path.name != "README.md" and not path.name.startswith(".")}
    assert named == {name for name in shown if not name.endswith(".dockerignore")}
    assert [
        path for path in re.findall(r"\binfra/[\w.-]+", text) if path != "infra/.env" and not (ROOT / path).exists()
    ] == []


def queues_of(command):
    """The queues that a worker's command names, in either spelling of the option."""
    words = [part for word in command for part in word.split("=")]
    return {queue for option, queue in zip(words, words[1:], strict=False) if option == "--work-queue"}


def test_the_workers_without_a_gpu_take_runs_from_every_queue_of_a_deployment():
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    used = {deployment["work_pool"].get("work_queue_name", "default") for deployment in deployments}
    assert used == {"default", "checkpoints"}
    (command,) = [
        json.loads(line.removeprefix("CMD "))
        for line in DOCKERFILES["Dockerfile"].splitlines()
        if line.startswith('CMD ["prefect", "worker"')
    ]
    assert queues_of(command) == used
    assert queues_of(SERVICES["worker-cpu"]["command"]) == used
