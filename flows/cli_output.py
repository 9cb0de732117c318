"""What does the terminal show, and how does a command end?

Tables, verdicts and one JSON document go to standard output; progress and errors to standard error. Exit codes: 0
accepted or done, 1 failed or checks failed, 2 wrong usage or config, 3 rejected by the gate.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from ptq.errors import ArtifactError
from ptq.records.verdict import Verdict

FAILED, WRONG_USAGE, REJECTED = 1, 2, 3
# How Prefect's client begins what it says of a server that does not answer.
_NO_SERVER = ("Failed to reach API", "Timed out while attempting to connect")


class Terminal:
    """Shows stages as they end, and bars while they run if the output is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        if self._console.is_terminal and not quiet:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> "Terminal":
        from tasks.runtime.progress import add_listener

        add_listener(self)
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        from tasks.runtime.progress import remove_listener

        remove_listener(self)
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Prints one line above the bars."""
        self._console.print(text, markup=False)

    def advanced(self, what: str, done: int, total: int) -> None:
        """Moves the bar of `what`."""
        if self._progress is None:
            return
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total, rate="")
        bar = self._bars[what]
        self._progress.update(bar, completed=done, total=total)
        speed = self._progress.tasks[self._progress.task_ids.index(bar)].speed
        self._progress.update(bar, rate=f"{speed:.{0 if speed >= 10 else 1}f}/s" if speed else "")
        if done >= total:
            self._progress.remove_task(self._bars.pop(what))

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Prints a line for a finished stage."""
        self.say(f"  {stage:<26} {'cached' if cached else f'{seconds:.1f} s'}")

    def said(self, text: str) -> None:
        """Prints a sentence of the run."""
        self.say(f"  {text}")


def run_flow(flow: Any, **arguments: Any) -> Any:
    """Runs a flow and returns its result; the error it failed with is raised as it was."""
    from prefect.logging.handlers import PrefectConsoleHandler
    from prefect.logging.loggers import get_logger

    # The terminal has its own lines; the run's logs go on to the server.
    for logger in (logging.getLogger(), get_logger()):
        for handler in logger.handlers:
            if isinstance(handler, PrefectConsoleHandler):
                handler.setLevel(logging.CRITICAL + 1)
    try:
        state = flow(**arguments, return_state=True)
    except RuntimeError as error:
        if not str(error).startswith(_NO_SERVER):
            raise
        from prefect.settings import PREFECT_API_URL

        url = PREFECT_API_URL.value()
        what = f"at {url}, which PREFECT_API_URL names," if url else "that this command starts for itself"
        raise ArtifactError(
            f"The Prefect server {what} does not answer: {str(error).splitlines()[0]} Expected one that runs; start "
            "it, or unset PREFECT_API_URL to have one for this command alone."
        ) from error
    return state.result(raise_on_failure=True)


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with a message, and with `--json` with a document that holds it."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"ptq: {message}", markup=False)
    if "--json" in sys.argv:
        print_json({"error": message, "exit_code": code})
    raise SystemExit(code)


def new_console() -> Console:
    """Returns standard output; where it is no terminal, wide enough for every table and without wrapping."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=140, soft_wrap=True)


def print_json(document: Any) -> None:
    """Prints one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=1, sort_keys=True) + "\n")


def show_verdict(verdict: Verdict, folder: Path, as_json: bool) -> None:
    """Prints the verdict of a run whose results are in `folder`."""
    if as_json:
        print_json(json.loads(verdict.model_dump_json(by_alias=True)))
        return
    from ptq.report.terminal import tables_of_verdict

    show_tables(*tables_of_verdict(verdict))
    console = new_console()
    for flag in verdict.red_flags:
        console.print(flag, style="bold red", markup=False)
    word = "Accepted" if verdict.gate.accepted else "Rejected"
    console.print(f"{word}: {' '.join(verdict.gate.reasons)}", markup=False)
    console.print(f"Report: {folder / 'report.html'}", markup=False)


def show_tables(*tables: Any) -> None:
    """Prints tables of `ptq.report.terminal` on standard output."""
    for table in tables:
        new_console().print(_rich_table(table))


def _rich_table(table: Any) -> RichTable:
    result = RichTable(title=table.title, title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        result.add_column(column, justify="right" if table.is_numeric(index) else "left")
    for index, row in enumerate(table.rows):
        style = "red" if index in table.alarming else "bold" if index in table.emphasized else ""
        result.add_row(*row, style=style)
    return result
