"""Who may use this machine's cores at the moment?

A benchmark needs the machine to itself; other heavy stages may share it. Two files are locked with flock, which ends
with the process, so that a run that is killed leaves no lock behind. The first file is a turnstile: whoever waits for
the machine alone holds it, so that no stream of others can keep a benchmark waiting for ever.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ptq.files import disk_errors

# Containers that share a machine are given one folder for it.
FOLDER_VARIABLE = "PTQ_LOCK_DIR"


def lock_folder() -> Path:
    """Returns the folder of the lock files: PTQ_LOCK_DIR, else one for this user."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "ptq" / "locks")


@contextlib.contextmanager
def whole_machine() -> Iterator[None]:
    """Waits until no stage of any run uses this machine, and keeps others from it.

    Raises:
        ArtifactError: the lock files cannot be written.
    """
    with _file("turnstile") as turnstile, _file("machine") as machine:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def shared_machine() -> Iterator[None]:
    """Waits until nobody has, or waits for, the whole machine. Raises as `whole_machine`."""
    with _file("machine") as machine:
        with _file("turnstile") as turnstile:
            fcntl.flock(turnstile, fcntl.LOCK_EX)
            fcntl.flock(machine, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _file(name: str) -> Iterator[IO[str]]:
    """An open lock file; closing it gives the lock back."""
    folder = lock_folder()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / f"{name}.lock").open("w")
    with stream:
        yield stream
