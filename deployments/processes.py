"""Which processes belong to the service, and how are they ended?

A process id alone may belong to a stranger by now: a record keeps the time of creation with it. Children of children
are found by a variable in their environment, which they inherit even where their parent has died.
"""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

_MARK = "PTQ_SERVICE"
# psutil rounds the time of creation, and a clock that is set moves it a little.
_CLOCK_S = 1.0


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process id, and when that process was created, in seconds since 1970."""

    pid: int
    created: float


def record_of(pid: int) -> ProcessRecord:
    """Returns the record of a running process.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    return ProcessRecord(pid, psutil.Process(pid).create_time())


def is_running(record: ProcessRecord) -> bool:
    """Whether the recorded process still runs, and is no other one that was given its id."""
    try:
        process = psutil.Process(record.pid)
        is_same = abs(process.create_time() - record.created) < _CLOCK_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def mark_of(folder: Path, part: str) -> dict[str, str]:
    """Returns the variable that marks the processes of one part of the service, and all that they start.

    Args:
        folder: the service's folder, which tells it from other services on this machine.
        part: name of the part.
    """
    return {_MARK: f"{part}@{folder}"}


def find_marked(folder: Path, part: str = "") -> list[psutil.Process]:
    """Returns the processes of a service, or of one part of it, without this one and those that started it."""
    own = psutil.Process()
    left_out = {own.pid, *(parent.pid for parent in own.parents())}
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(_MARK, "") if process.pid not in left_out else ""
        except psutil.Error:
            # It has ended meanwhile, or belongs to another user.
            continue
        if mark.endswith(f"@{folder}") and mark.startswith(f"{part}@" if part else ""):
            found.append(process)
    return found


def end_processes(processes: Iterable[psutil.Process], *, patience_s: float) -> None:
    """End processes: ask them to, and after `patience_s` seconds make them. Returns when they are gone."""
    left = list(processes)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(left, timeout=patience_s)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def end_marked(folder: Path, part: str = "", *, patience_s: float) -> int:
    """End the processes of a service, or of one part of it, and those that they start meanwhile.

    Returns:
        how many processes were ended.
    """
    ended: set[int] = set()
    deadline = time.monotonic() + patience_s + 10
    while (found := find_marked(folder, part)) and time.monotonic() < deadline:
        ended |= {process.pid for process in found}
        end_processes(found, patience_s=patience_s)
    return len(ended)
