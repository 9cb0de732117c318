"""Who is told how far a stage has come?

By default the run's logger, with rate and time left. A terminal puts a listener of its own here, which may draw
bars. The listener is a matter of the process, not of a run, so it is set once, before the flow starts.
"""

import time
from collections.abc import Callable
from typing import Protocol

from prefect.logging import get_run_logger


class Listener(Protocol):
    """What a terminal implements."""

    def advanced(self, what: str, done: int, total: int) -> None:
        """Is called as a stage advances."""

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Is called when a stage has ended."""


_listeners: list[Listener] = []


def add_listener(listener: Listener) -> None:
    """Adds a listener for the rest of the process."""
    _listeners.append(listener)


def remove_listener(listener: Listener) -> None:
    """Removes a listener."""
    _listeners.remove(listener)


def announce_finished(stage: str, *, seconds: float, cached: bool) -> None:
    """Tells the listeners that a stage has ended; a stage found in the store is cached."""
    for listener in _listeners:
        listener.finished(stage, seconds, cached)


def progress_logger(what: str, *, every_s: float = 5.0) -> Callable[[int, int], None]:
    """Returns a callback (done, total) that logs rate and time left, at most every `every_s` seconds and at the end."""
    logger = get_run_logger()
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        for listener in _listeners:
            listener.advanced(what, done, total)
        moment = time.monotonic()
        if moment - last < every_s and done < total:
            return
        last = moment
        rate = done / max(moment - started, 1e-9)
        logger.info("%s: %d of %d (%.0f/s, %.0f s left)", what, done, total, rate, (total - done) / max(rate, 1e-9))

    return report
