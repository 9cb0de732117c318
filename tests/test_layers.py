"""Do the imports go flows -> tasks -> ptq, and is each heavy library imported where the layout says?"""

import ast
import sys
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("ptq", "tasks", "flows")
FILES = [path.relative_to(ROOT).as_posix() for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]

# What a layer may not import, by the first part of the dotted name.
FORBIDDEN = {
    "ptq": {"prefect", "prefect_dask", "prefect_aws", "prefect_docker", "tasks", "flows"},
    "tasks": {"flows"},
    "flows": set(),
}

# The nouns, which is all that a flow may take from the core; the command line also shows results.
NOUNS = ("ptq.config", "ptq.records", "ptq.errors")
EXTRA_FOR = {
    "flows/cli.py": (
        "ptq.api",
        "ptq.commands",
        "ptq.data.demo_digits",
        "ptq.demo_data",
        "ptq.evaluation",
        "ptq.records.verdict",
        "ptq.report.terminal",
        "ptq.retention",
        "ptq.storage",
        "ptq.terminal",
        "ptq.verdict",
    )
}

# What stages share. Any other import from one task module to another goes sideways.
SHARED_TASK_MODULES = ("tasks.retries", "tasks.stage", "tasks.progress", "tasks.announcements", "tasks.dask_stages")

# The files that may import a heavy library; torch and numpy may be imported anywhere below the flows.
HOMES = {
    "pytorch_quantization": {"ptq/networks/fake_quant.py"},
    "onnx_graphsurgeon": {
        "ptq/networks/export.py",
        "ptq/checks/run.py",
        "ptq/graph/nodes.py",
        "ptq/graph/canonical.py",
        "ptq/graph/insertion.py",
        "ptq/graph/names.py",
    },
    "tensorrt": {"ptq/engines/tensorrt.py"},
    "openvino": {"ptq/engines/openvino.py"},
    "onnxruntime": {"ptq/engines/onnxruntime.py"},
    "boto3": {"ptq/storage/s3_client.py", "ptq/storage/store.py", "ptq/storage/s3_bucket.py"},
    "botocore": {
        "ptq/storage/s3_client.py",
        "ptq/storage/store.py",
        "ptq/storage/s3_bucket.py",
        "ptq/storage/s3_reader.py",
    },
    "polars": {
        "ptq/data/listing.py",
        "ptq/data/sampling.py",
        "ptq/evaluation/predictions.py",
        "ptq/data/index.py",
        "ptq/numerics/metrics.py",
        "ptq/report/run_tables.py",
    },
    "PIL": {"ptq/data/images.py", "ptq/data/demo_digits.py"},
    "sklearn": {"ptq/data/demo_digits.py"},
    "matplotlib": {"ptq/report/charts.py"},
    "jinja2": {"ptq/report/page_parts.py"},
    "torchvision": {"ptq/networks/factory.py"},
    "distributed": {"tasks/dask_stages.py"},
    "prefect_dask": {"tasks/dask_stages.py"},
}
HEAVY = {*HOMES, "torch", "onnx", "numba", "scipy"}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name, written out in full, and whether importing the file imports it."""

    name: str
    at_import: bool

    @property
    def top(self):
        return self.name.split(".")[0]

    def is_in(self, module):
        return self.name == module or self.name.startswith(f"{module}.")


def imports_of(source, file):
    """Every import of a file: plain, from, relative, deferred, and import_module with a literal name."""
    package = list(Path(file).parent.parts)
    found = []
    pending = [(ast.parse(source), True)]
    while pending:
        node, at_import = pending.pop()
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and is_dynamic_import(node):
            names = [node.args[0].value]
        found.extend(Import(name=name, at_import=at_import) for name in names)
        is_deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        pending.extend((child, at_import and not is_deferred) for child in ast.iter_child_nodes(node))
    return found


def is_dynamic_import(call):
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    is_literal = bool(call.args) and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    return function in {"import_module", "__import__"} and is_literal


def faults_of(source, file):
    """What is wrong with the imports of a file, one sentence each."""
    layer = file.split("/")[0]
    own_module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    allowed_nouns = NOUNS + EXTRA_FOR.get(file, ())
    faults = []
    for found in imports_of(source, file):
        if found.top in FORBIDDEN[layer]:
            faults.append(f"{file} imports {found.name}: {layer} may not import {found.top}")
        if layer == "flows" and found.top == "ptq" and not any(map(found.is_in, allowed_nouns)):
            faults.append(f"{file} imports {found.name}: a flow takes only {', '.join(allowed_nouns)} from ptq")
        if layer == "flows" and found.at_import and found.top in HEAVY:
            faults.append(f"{file} imports {found.name} on import: a flow loads without heavy libraries")
        if layer == "tasks" and found.top == "tasks" and not any(map(found.is_in, (*SHARED_TASK_MODULES, own_module))):
            faults.append(f"{file} imports {found.name}: a task module imports no other")
        if found.top in HOMES and file not in HOMES[found.top]:
            faults.append(f"{file} imports {found.name}: {found.top} belongs to {', '.join(sorted(HOMES[found.top]))}")
    return faults


def shadowed_module(name):
    """Where a top-level module of this name is found without the flows folder, None if nowhere."""
    if name in sys.stdlib_module_names or BuiltinImporter.find_spec(name):
        return "the standard library"
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "flows"]
    spec = PathFinder.find_spec(name, [str(ROOT), *elsewhere])
    return None if spec is None else (spec.origin or next(iter(spec.submodule_search_locations)))


@pytest.mark.parametrize("file", FILES)
def test_imports_keep_to_the_layers_and_to_the_homes_of_the_libraries(file):
    assert faults_of((ROOT / file).read_text(), file) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_files_of_every_layer_were_found(layer):
    assert [file for file in FILES if file.startswith(f"{layer}/") and not file.endswith("__init__.py")] != []


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
        ("ptq/numerics/amax.py", "from tasks import data"),
        ("ptq/engines/openvino.py", "import flows.cli"),
        ("ptq/engines/openvino.py", "from ...tasks import data"),
        ("tasks/data.py", "from flows.cli import main"),
        ("tasks/data.py", "import tasks.amax"),
        ("tasks/data.py", "from tasks import amax"),
        ("tasks/data.py", "from . import amax"),
        ("tasks/data.py", "from .amax import compute_amax"),
        ("tasks/stage.py", "from tasks.data import index_images"),
        ("flows/quantize_model.py", "from ptq.numerics.metrics import split_metrics"),
        ("flows/quantize_model.py", "from ptq import metrics"),
        ("flows/quantize_model.py", "import ptq"),
        ("flows/quantize_model.py", "from ptq.records.verdict import Verdict"),
        ("flows/quantize_model.py", "from ptq.configuration import PtqConfig"),
        ("flows/cli.py", "def f():\n    from ptq.storage.store import open_store"),
        ("flows/cli.py", "import torch"),
        ("ptq/activations.py", "import openvino"),
        ("ptq/activations.py", "def f():\n    import openvino.properties as p"),
        ("ptq/activations.py", "import importlib\nimportlib.import_module('openvino')"),
        ("ptq/activations.py", "try:\n    import tensorrt\nexcept ImportError:\n    tensorrt = None"),
        ("tasks/data.py", "import polars"),
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
        ("ptq/numerics/amax.py", "from ptq.prefect_names import flows, tasks"),
        ("ptq/engines/tensorrt.py", "def f():\n    import tensorrt"),
        ("ptq/engines/tensorrt.py", "from .interface import Engine\nfrom ..errors import EngineBuildError"),
        (
            "tasks/data.py",
            "import prefect\nfrom ptq import datasets\nfrom tasks.stage import stage\nfrom . import retries",
        ),
        ("flows/quantize_model.py", "from ptq import config\nfrom tasks.data import index_images\nimport prefect"),
        (
            "flows/cli.py",
            "from ptq.records.verdict import Verdict\ndef f():\n    import torch\n    from ptq import terminal",
        ),
    ],
)
def test_an_import_that_keeps_the_rules_is_left_alone(file, source):
    assert faults_of(source, file) == []
