"""In which environment does a command run, and the processes that it starts?

Containers run under users without a home, offices behind proxies that know nothing of this machine, and projects have
modules of our names: none of it keeps a run from ending.
"""

import os
import sys
import tempfile
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

# Quiet: the embedded server neither phones home nor gives up while a busy machine starts it.
_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}
# Of the embedded server; the module tells what for.
_EVENT_LOOP = "tasks.runtime.prefect_server:event_loop"
# Where no proxy has any business.
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
# Folders that are below the home unless these name others, and what they are called below another one. Set to nothing
# they are as if they were not set.
_FOLDERS = {
    "PREFECT_HOME": "prefect",
    "PTQ_CACHE_DIR": "cache",
    "PTQ_LOCK_DIR": "locks",
    "XDG_CACHE_HOME": "other-caches",
    "MPLCONFIGDIR": "matplotlib",
}


def settings() -> dict[str, str]:
    """What the embedded server is started with.

    A process started in this folder looks for modules here first, where `tasks` may be somebody else's; it would not
    start.
    """
    package = _EVENT_LOOP.partition(".")[0]
    here, ours = PathFinder.find_spec(package, [os.getcwd()]), find_spec(package)
    is_ours = here is None or (ours is not None and here.origin == ours.origin)
    return _SETTINGS | ({"UVICORN_LOOP": _EVENT_LOOP} if is_ours else {})


def prepare_environment() -> None:
    """Sets what is not set, before a library reads it: quiet services, no proxy to this machine, a home to write to."""
    for name, value in settings().items():
        os.environ.setdefault(name, value)
    given = ",".join(os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy"))
    others = [each.strip() for each in given.split(",") if each.strip()]
    if "*" not in others:
        hosts = ",".join(dict.fromkeys((*others, *_THIS_MACHINE)))
        os.environ.update({"NO_PROXY": hosts, "no_proxy": hosts})
    for name in _FOLDERS:
        if os.environ.get(name) == "":
            del os.environ[name]
    absent = {name: folder for name, folder in _FOLDERS.items() if name not in os.environ}
    if absent and not _can_be_written(_home()):
        kept = _folder_of_this_user()
        sys.stderr.write(f"ptq: {_home()} cannot be written, {kept} is used for what is kept between commands.\n")
        os.environ.update({name: str(kept / folder) for name, folder in absent.items()})


def _home() -> Path:
    """The home of this user, which a container may not have."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def _can_be_written(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _folder_of_this_user() -> Path:
    """A folder among the temporary ones that belongs to this user alone."""
    folder = Path(tempfile.gettempdir()) / f"ptq-home-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
    except OSError:
        is_ours = False
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="ptq-home-"))
