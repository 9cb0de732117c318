"""Who is told how far a stage has come?

By default the run's logger, with rate and time left. Where a Prefect server keeps what it is told, a long stage also
has a progress artifact on the run's page. A terminal puts a listener of its own here, which may draw bars. The listener
is a matter of the process, not of a run, so it is set once, before the flow starts.
"""

import contextvars
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Protocol, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings


class Listener(Protocol):
    """What a terminal implements."""

    def advanced(self, what: str, done: int, total: int) -> None:
        """Is called as a stage advances."""

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Is called when a stage has ended."""

    def said(self, text: str) -> None:
        """Is called with what a person should read while the run goes on."""


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


def say(text: str, *, level: int = logging.INFO) -> None:
    """Logs a sentence and tells it to the listeners."""
    get_run_logger().log(level, text)
    for listener in _listeners:
        listener.said(text)


def artifact_key(*parts: str) -> str:
    """Returns a key that Prefect takes: lowercase letters, digits and dashes.

    >>> artifact_key("progress", "Decoded test images")
    'progress-decoded-test-images'
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def has_lasting_server() -> bool:
    """Whether a server keeps artifacts beyond this process; the embedded one ends with it."""
    return bool(get_current_settings().api.url)


def progress_logger(what: str, *, every_s: float = 5.0) -> Callable[[int, int], None]:
    """Returns a callback (done, total) that logs rate and time left, at most every `every_s` seconds and at the end.

    A stage that lasts longer than that has a progress artifact, too, where there is a server that keeps it.
    """
    logger = get_run_logger()
    started = last = time.monotonic()
    artifact = _ProgressArtifact(what, logger) if has_lasting_server() else None

    def report(done: int, total: int) -> None:
        nonlocal last
        for listener in _listeners:
            listener.advanced(what, done, total)
        moment = time.monotonic()
        if moment - last < every_s and done < total:
            return
        if artifact and moment - started >= every_s:
            artifact.show(done, total)
        last = moment
        rate = done / max(moment - started, 1e-9)
        logger.info("%s: %d of %d (%.0f/s, %.0f s left)", what, done, total, rate, (total - done) / max(rate, 1e-9))

    return report


class _ProgressArtifact:
    """A progress artifact of the run in whose context it is made, created when it is first shown.

    Each request goes out from a thread of its own: the callback may be called with a lock held, and a server that is
    slow or away holds up no stage. While a request is out, only the end is still shown.
    """

    def __init__(self, what: str, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._what = what
        self._logger = logger
        self._run = contextvars.copy_context()
        self._id: UUID | None = None
        self._request: threading.Thread | None = None

    def show(self, done: int, total: int) -> None:
        """Sends how far the stage is; `total` is at least 1."""
        before = self._request
        if before is not None and before.is_alive() and done < total:
            return
        # A context can be entered once at a time: each thread has a copy.
        send = self._run.copy().run
        percent = round(100 * done / total, 1)
        name = f"progress of {self._what}"
        self._request = threading.Thread(name=name, target=send, args=(self._send, percent, before), daemon=True)
        self._request.start()

    def _send(self, percent: float, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            if self._id is None:
                key = artifact_key("progress", self._what)
                self._id = cast(UUID, create_progress_artifact(percent, key=key, description=self._what))
            else:
                update_progress_artifact(self._id, percent)
        except Exception as error:  # Progress is a courtesy: whatever its server answers, the stage goes on.
            self._logger.debug("The progress of %s could not be shown: %s", self._what, error)
