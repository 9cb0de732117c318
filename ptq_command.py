"""What does the command `ptq` start, where a user's project has a `tasks.py`, a `flows/` or a `ptq.py` of its own?

Networks are named `package.module:factory` and found on PYTHONPATH, which Python searches before what is installed. The
packages of this project are therefore loaded from where this file lies, before anything is searched, and the processes
that the command starts find them first.
"""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_HOME = Path(__file__).resolve().parent
_PACKAGES = ("ptq", "tasks", "flows", "deployments")


def main() -> None:
    """Runs `flows.cli.main` of this project."""
    for name in _PACKAGES:
        folder = _HOME / name
        specification = spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[os.fspath(folder)]
        )
        assert specification is not None
        assert specification.loader is not None
        sys.modules[name] = module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    paths = (os.fspath(_HOME), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    from flows.cli import main as command

    command()
