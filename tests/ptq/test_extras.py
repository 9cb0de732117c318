import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from flows import cli
from ptq.config import PtqConfig
from ptq.errors import UsageError
from ptq.extras import Extra, extra
from ptq.records.graph import EngineIdentity
from tasks.runtime.runners import spread_stages

ROOT = Path(__file__).parents[2]
OPTIONAL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", get_args(Extra))
def test_the_message_names_the_module_and_the_command_that_installs_it(name):
    message = re.escape(f"The demo needs the module absent_module, which is not installed. Expected the optional "
                        f"dependencies `{name}`: install them with `pip install '.[{name}]'`.")  # fmt: skip
    with pytest.raises(UsageError, match=message), extra(name, needed_by="The demo"):
        import absent_module  # noqa: F401


def test_an_error_of_another_kind_is_left_as_it_is():
    with pytest.raises(ImportError, match="cannot import name 'absent'"), extra("demo", needed_by="The demo"):
        from ptq.errors import absent  # noqa: F401


def test_the_optional_dependencies_are_those_that_the_code_names_and_the_developers_get_all_that_run_anywhere():
    assert set(OPTIONAL) == {*get_args(Extra), "dev"}
    assert "ptq-prefect[dask,demo,server]" in OPTIONAL["dev"]


# Prefect brings what the receiver imports; the other optional libraries may be absent from an installation.
ABSENT = ("prefect_dask", "distributed", "dask", "sklearn", "tensorrt")
EVERYTHING = """
import importlib, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(","), None))
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def imported_without(absent, *modules):
    """What a fresh interpreter that lacks some libraries says on importing modules."""
    command = [sys.executable, "-c", EVERYTHING, ",".join(absent), *modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_an_installation_without_the_optional_dependencies_imports_what_everybody_needs():
    done = imported_without(
        ABSENT, "flows.cli", "flows.quantize_model", "flows.watch_checkpoints", "deployments.bootstrap"
    )
    assert done.returncode == 0, done.stderr


def test_a_cluster_on_this_machine_says_what_it_needs():
    done = imported_without(("distributed",), "deployments.local_dask")
    assert "`make dask` needs the module distributed, which is not installed." in done.stderr


def make_absent(monkeypatch, library):
    """Has every import of the library fail, also of its modules that another test has imported already."""
    loaded = [name for name in sys.modules if name.startswith(f"{library}.")]
    for name in (library, *loaded):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("absent", "module", "arguments", "said"),
    [
        ("sklearn", "ptq.data.demo_digits", ("demo",), "`ptq demo` needs the module sklearn"),
        ("uvicorn", "flows.receiver", ("receive", "--prefix", "s3://b/p"), "`ptq receive` needs the module uvicorn"),
    ],
)
def test_a_command_says_what_it_needs(monkeypatch, capsys, absent, module, arguments, said):
    make_absent(monkeypatch, absent)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "argv", ["ptq", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert said in capsys.readouterr().err


def test_a_run_on_dask_says_what_it_needs(monkeypatch):
    make_absent(monkeypatch, "distributed")
    monkeypatch.delitem(sys.modules, "tasks.runtime.dask_runner", raising=False)
    runner = {"name": "dask", "address": "tcp://127.0.0.1:8786"}
    config = PtqConfig.model_validate({"model": {"checkpoint": "x.onnx"}, "data": {"path": "x"}, "runner": runner})
    with pytest.raises(UsageError, match="`runner.name: dask` needs the module distributed"):
        spread_stages(config, EngineIdentity(name="openvino", version="1", device="CPU", threads=1))
