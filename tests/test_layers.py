"""Do imports go flows -> tasks -> ptq, from room to room below, and is each heavy library where it belongs?"""

import subprocess
import sys
from importlib.machinery import BuiltinImporter, PathFinder
from pathlib import Path

import pytest
from imports import imports_of

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("ptq", "tasks", "flows")
FILES = [path.relative_to(ROOT).as_posix() for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]

GROUND = {"errors", "extras", "config", "config_file", "files", "uris", "provenance", "wording", "dialect"}
# The rooms of `ptq`, from the ground up, and which of them each may import. A room imports nothing above itself.
ROOMS = {
    "errors": set(),
    "extras": {"errors"},
    "config": set(),
    "config_file": {"errors"},
    "files": {"errors"},
    "uris": {"errors"},
    "provenance": {"errors"},
    "wording": set(),
    "records": {"config"},
    "dialect": {"config", "records"},
    "numerics": {"errors", "config", "wording", "records"},
    "storage": {"errors", "files", "uris", "records"},
    "data": {*GROUND, "records", "storage"},
    "graph": {*GROUND, "records", "numerics"},
    "networks": {*GROUND, "records", "numerics", "data", "graph"},
    "engines": {*GROUND, "records", "graph"},
    "checks": {*GROUND, "records", "numerics", "graph"},
    "quantization": {*GROUND, "records", "numerics", "graph", "networks", "engines"},
    "calibration": {*GROUND, "records", "numerics", "data", "graph", "engines", "quantization"},
    "evaluation": {
        *GROUND, "records", "numerics", "storage", "data", "graph", "networks", "engines", "quantization",
    },
    "service": {*GROUND, "records", "storage", "data"},
    "report": {
        *GROUND, "records", "numerics", "storage", "data", "graph", "quantization", "calibration", "evaluation",
        "service",
    },
    "api": {
        *GROUND, "records", "storage", "data", "graph", "networks", "engines", "checks", "quantization", "calibration",
        "evaluation", "report",
    },
}  # fmt: skip
# The rooms of `tasks`. A stage imports no other stage.
TASK_ROOMS = {"runtime": set(), "stages": {"runtime"}, "service": {"runtime"}}

# What a layer may not import, by the first part of the dotted name.
FORBIDDEN = {
    "ptq": {"prefect", "prefect_dask", "prefect_aws", "prefect_docker", "tasks", "flows"},
    "tasks": {"flows"},
    "flows": set(),
}

# The nouns, which is all that a flow may take from the core; the command line also shows results.
NOUNS = ("ptq.config", "ptq.records", "ptq.errors", "ptq.extras")
EXTRA_FOR = {
    "flows/__init__.py": ("ptq.provenance",),
    "flows/cli.py": ("ptq.config_file", "ptq.data.demo_digits"),
    "flows/cli_files.py": ("ptq.api", "ptq.report.terminal"),
    "flows/cli_options.py": ("ptq.config_file",),
    "flows/cli_output.py": ("ptq.report.terminal",),
    "flows/cli_store.py": ("ptq.report.terminal", "ptq.storage.garbage", "ptq.storage.registry"),
}

# The files that may import a heavy library; torch and numpy may be imported anywhere below the flows.
HOMES = {
    "pytorch_quantization": {"ptq/networks/fake_quant.py"},
    "onnx_graphsurgeon": {"ptq/graph/", "ptq/checks/", "ptq/networks/export.py"},
    "tensorrt": {"ptq/engines/tensorrt.py"},
    "openvino": {"ptq/engines/openvino.py"},
    "onnxruntime": {"ptq/engines/onnxruntime.py"},
    "boto3": {"ptq/storage/s3_client.py", "ptq/storage/s3_bucket.py"},
    "botocore": {"ptq/storage/s3_client.py", "ptq/storage/s3_bucket.py", "ptq/storage/s3_reader.py"},
    "polars": {"ptq/data/", "ptq/evaluation/predictions.py", "ptq/report/"},
    "PIL": {"ptq/data/images.py", "ptq/data/demo_digits.py"},
    "sklearn": {"ptq/data/demo_digits.py"},
    "matplotlib": {"ptq/report/charts.py"},
    "jinja2": {"ptq/report/page_parts.py"},
    "torchvision": {"ptq/networks/factory.py"},
    "distributed": {"tasks/runtime/dask_runner.py"},
    "prefect_dask": {"tasks/runtime/dask_runner.py"},
}
HEAVY = {*HOMES, "torch", "onnx", "numba", "scipy"}

# What importing a module must not load: whoever takes a maximum waits for no framework.
FRAMEWORKS = {"torch", "torchvision", "pytorch_quantization", "openvino", "onnx_graphsurgeon"}
LIGHT = ("ptq.records", "ptq.numerics", "tasks.stages.amax")


def room_of(parts):
    """The room of a file or a dotted name, by its parts: the second, without the ending of a file."""
    return parts[1].removesuffix(".py") if len(parts) > 1 else ""


def room_fault(found, layer, room):
    """What is wrong with importing this from that room, empty where nothing is."""
    table = {"ptq": ROOMS, "tasks": TASK_ROOMS}.get(layer, {})
    if found.top != layer or layer == "flows" or room == "__init__":
        return ""
    target = room_of(found.name.split("."))
    if target in table[room] or (target == room and room != "stages"):
        return ""
    return f"{layer}.{room} may import {', '.join(sorted(table[room])) or 'no other room'}, not {layer}.{target}"


def is_at_home(library, file):
    return any(file == home or (home.endswith("/") and file.startswith(home)) for home in HOMES[library])


def faults_of(source, file):
    """What is wrong with the imports of a file, one sentence each."""
    layer = file.split("/")[0]
    room = room_of(file.split("/"))
    allowed_nouns = NOUNS + EXTRA_FOR.get(file, ())
    faults = []
    for found in imports_of(source, file):
        if found.top in FORBIDDEN[layer]:
            faults.append(f"{file} imports {found.name}: {layer} may not import {found.top}")
        if fault := room_fault(found, layer, room):
            faults.append(f"{file} imports {found.name}: {fault}")
        if layer == "flows" and found.top == "ptq" and not any(map(found.is_in, allowed_nouns)):
            faults.append(f"{file} imports {found.name}: a flow takes only {', '.join(allowed_nouns)} from ptq")
        if layer == "flows" and found.at_import and found.top in HEAVY:
            faults.append(f"{file} imports {found.name} on import: a flow loads without heavy libraries")
        if found.top in HOMES and not is_at_home(found.top, file):
            faults.append(f"{file} imports {found.name}: {found.top} belongs to {', '.join(sorted(HOMES[found.top]))}")
    return faults


def shadowed_module(name):
    """Where a top-level module of this name is found without the flows folder, None if nowhere."""
    if name in sys.stdlib_module_names or BuiltinImporter.find_spec(name):
        return "the standard library"
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "flows"]
    spec = PathFinder.find_spec(name, [str(ROOT), *elsewhere])
    return None if spec is None else (spec.origin or next(iter(spec.submodule_search_locations)))


def test_imports_keep_to_the_layers_the_rooms_and_the_homes_of_the_libraries():
    found = {file: faults_of((ROOT / file).read_text(), file) for file in FILES}
    assert {file: faults for file, faults in found.items() if faults} == {}


@pytest.mark.parametrize("layer", LAYERS)
def test_files_of_every_layer_were_found(layer):
    assert [file for file in FILES if file.startswith(f"{layer}/") and not file.endswith("__init__.py")] != []


def test_every_room_is_in_the_table_and_has_files():
    found = {room_of(file.split("/")) for file in FILES if file.startswith("ptq/")} - {"__init__"}
    assert found == set(ROOMS)


def test_no_room_may_import_what_stands_above_it():
    order = list(ROOMS)
    assert [
        room for room, below in ROOMS.items() if any(order.index(each) >= order.index(room) for each in below)
    ] == []


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_loads_no_framework(name):
    """Whatever it imports and whatever that imports, for every module of a room."""
    folder = ROOT / name.replace(".", "/")
    modules = [f"{name}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"] or [name]
    program = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert FRAMEWORKS & set(loaded.split()) == set()


@pytest.mark.parametrize(
    "name", [Path(file).stem for file in FILES if file.startswith("flows/") and Path(file).stem != "__init__"]
)
def test_no_file_of_flows_has_the_name_of_a_top_level_module(name):
    assert shadowed_module(name) is None


@pytest.mark.parametrize("name", ["ptq", "tasks", "onnx", "torch", "prefect", "polars", "json", "sys"])
def test_a_name_that_would_shadow_a_module_is_noticed(name):
    assert shadowed_module(name) is not None


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ptq/numerics/amax.py", "import prefect"),
        ("ptq/numerics/amax.py", "from prefect.logging import get_run_logger"),
        ("ptq/numerics/amax.py", "from tasks.stages import data"),
        ("ptq/numerics/amax.py", "from ptq.engines.base import Engine"),
        ("ptq/numerics/amax.py", "from ptq.quantization.prepared import plan_from_file"),
        ("ptq/records/plan.py", "from ptq.numerics.amax import METHODS"),
        ("ptq/graph/nodes.py", "from ..checks import run"),
        ("ptq/errors.py", "from ptq.config import PtqConfig"),
        ("ptq/engines/openvino.py", "import flows.cli"),
        ("ptq/engines/openvino.py", "from ....tasks.stages import data"),
        ("tasks/stages/data.py", "from flows.cli import main"),
        ("tasks/stages/data.py", "import tasks.stages.amax"),
        ("tasks/stages/data.py", "from tasks.stages import amax"),
        ("tasks/stages/data.py", "from . import amax"),
        ("tasks/stages/data.py", "from .amax import compute_amax"),
        ("tasks/runtime/stage.py", "from tasks.stages.data import index_images"),
        ("tasks/service/notices.py", "from tasks.stages.data import index_images"),
        ("flows/quantize_model.py", "from ptq.numerics.metrics import split_metrics"),
        ("flows/quantize_model.py", "from ptq import numerics"),
        ("flows/quantize_model.py", "import ptq"),
        ("flows/quantize_model.py", "from ptq.api import evaluate_file"),
        ("flows/quantize_model.py", "from ptq.configuration import PtqConfig"),
        ("flows/cli.py", "def f():\n    from ptq.storage.store import open_store"),
        ("flows/cli.py", "import torch"),
        ("ptq/engines/activations.py", "import openvino"),
        ("ptq/engines/activations.py", "def f():\n    import openvino.properties as p"),
        ("ptq/engines/activations.py", "import importlib\nimportlib.import_module('openvino')"),
        ("ptq/engines/activations.py", "try:\n    import tensorrt\nexcept ImportError:\n    tensorrt = None"),
        ("tasks/stages/data.py", "import polars"),
        ("ptq/evaluation/selection.py", "import polars as pl"),
        ("ptq/data/images.py", "from torchvision.transforms import v2"),
    ],
)
def test_an_import_that_breaks_a_rule_is_noticed(file, source):
    assert len(faults_of(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ptq/numerics/amax.py", "import numpy as np\nimport torch\nfrom ptq.errors import CalibrationError"),
        ("ptq/numerics/amax.py", "from ptq.numerics.histogram import Histograms\nfrom .latency import median"),
        ("ptq/numerics/amax.py", "from prefect_names import flows, tasks"),
        ("ptq/engines/tensorrt.py", "def f():\n    import tensorrt"),
        ("ptq/engines/tensorrt.py", "from .base import Engine\nfrom ..errors import EngineBuildError"),
        ("ptq/report/html.py", "import polars as pl\nfrom ptq.evaluation.gate import HEADLINES"),
        ("tasks/stages/data.py", "import prefect\nfrom ptq.data import index\nfrom tasks.runtime.stage import stage"),
        (
            "tasks/service/watching.py",
            "from tasks.service.announcements import announce\nfrom ..runtime import retries",
        ),
        (
            "flows/quantize_model.py",
            "from ptq import config\nfrom tasks.stages.data import index_images\nimport prefect",
        ),
        (
            "flows/cli_files.py",
            "from ptq.records.verdict import Verdict\ndef f():\n    import torch\n    from ptq import api",
        ),
    ],
)
def test_an_import_that_keeps_the_rules_is_left_alone(file, source):
    assert faults_of(source, file) == []
