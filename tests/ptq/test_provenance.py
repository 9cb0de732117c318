"""Are the sources those that the program started with? Each program here has a copy of them to change."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROLOGUE = """
import hashlib
import sys
from pathlib import Path
from ptq import provenance
from ptq.errors import ArtifactError
digest = provenance.package_digest()
provenance.refuse_changed_sources()
import ptq.files
"""


@pytest.fixture
def printed(tmp_path):
    """Runs a program in a folder with a copy of `ptq` and returns what it prints."""
    shutil.copytree(ROOT / "ptq", tmp_path / "ptq", ignore=shutil.ignore_patterns("__pycache__"))

    def run(program):
        done = subprocess.run(
            [sys.executable, "-c", PROLOGUE + program], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_the_digest_of_the_package_is_of_the_sources_at_the_start(printed):
    program = """
Path("ptq/dialect.py").write_text("changed = 1")
provenance.package_digest.cache_clear()
print(provenance.package_digest() == digest)
"""
    assert printed(program) == "True"


@pytest.mark.parametrize(
    ("change", "module"),
    [
        ("Path('ptq/dialect.py').write_text('changed = 1')", "ptq.dialect"),
        ("Path('ptq/dialect.py').unlink()", "ptq.dialect"),
        ("Path('ptq/added.py').write_text('added = 1')", "ptq.added"),
        ("Path('ptq/numerics/__init__.py').write_text('changed = 1')", "ptq.numerics.latency"),
    ],
    ids=["edited", "removed", "added", "package"],
)
def test_a_module_that_was_changed_after_the_start_is_not_imported(printed, change, module):
    program = f"""
{change}
try:
    import {module}
except ArtifactError as error:
    print("{module}" in sys.modules, error)
"""
    assert printed(program).startswith("False ptq/")


def test_the_message_says_which_file_and_what_to_do(printed):
    program = """
Path("ptq/dialect.py").write_text("changed = 1")
try:
    import ptq.dialect
except ArtifactError as error:
    print(error)
"""
    message = printed(program)
    assert message.startswith("ptq/dialect.py was changed since this program started")
    assert message.endswith("Start the program again: stages that have ended are found in the store.")


def test_a_module_that_is_loaded_or_unchanged_is_not_disturbed(printed):
    program = """
Path("ptq/files.py").write_text("changed = 1")
import ptq.dialect
from ptq.files import write_file
print("imported")
"""
    assert printed(program) == "imported"


def test_a_change_before_the_first_stage_is_known_is_refused_too(printed):
    program = """
Path("ptq/files.py").write_text("changed = 1")
try:
    provenance.refuse_changed_sources()
except ArtifactError as error:
    print(error)
"""
    assert printed(program).startswith("ptq/files.py was changed")
