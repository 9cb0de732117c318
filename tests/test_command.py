"""Does `ptq` run this project's modules where a user's have their names?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PTQ = Path(sys.executable).with_name("ptq")
# What a process that the command starts imports.
CHILD = """
import subprocess, sys, ptq_command
sys.argv = ["ptq", "--version"]
try:
    ptq_command.main()
except SystemExit:
    code = "import tasks.runtime.prefect_server as found; print(found.__file__)"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
"""


@pytest.fixture(params=["tasks.py", "ptq.py", "flows/__init__.py"])
def environment(request, tmp_path):
    """An environment whose PYTHONPATH has a user's module under one of our names."""
    file = tmp_path / request.param
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise ImportError('a module of the user')")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def run(command, environment, folder):
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.skipif(not PTQ.is_file(), reason="the project is not installed")
def test_a_command_finds_its_own_modules(environment, tmp_path_factory):
    found = run([PTQ, "--version"], environment, tmp_path_factory.mktemp("elsewhere"))
    assert found.stderr == ""
    assert found.stdout.startswith("ptq ")


def test_so_do_the_processes_that_it_starts(environment):
    environment = {**environment, "PYTHONPATH": os.pathsep.join((environment["PYTHONPATH"], str(ROOT)))}
    found = run([sys.executable, "-P", "-c", CHILD], environment, ROOT.parent)
    assert found.stderr == ""
    assert str(ROOT / "tasks" / "runtime" / "prefect_server.py") in found.stdout
