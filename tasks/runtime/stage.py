"""What is common to every stage?

Turns a function into a Prefect task that runs only when its result is not in the store yet: the stage's key is
the digest of its arguments, of what it declares to use of the run, of the code it depends on and of the versions of
the numeric libraries this code names. A hit shows as Cached in the UI. The record is written after its objects, so a
run that is killed leaves nothing half done.
"""

import inspect
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.transactions import TransactionState, get_transaction
from prefect.utilities.annotations import quote

from ptq.errors import ArtifactError
from ptq.provenance import library_versions
from ptq.records.base import record_from_json, to_jsonable
from ptq.storage.store import StageEntry, stage_key
from tasks.runtime.code_digest import code_of_stage
from tasks.runtime.context import ContextView, StageContext, value_of
from tasks.runtime.machine_lock import shared_machine, whole_machine
from tasks.runtime.progress import announce_finished

_MACHINE: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    "shared": shared_machine,
    "whole": whole_machine,
}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class _Stage(Task[Parameters, Result]):
    """A task whose parameter `run` is not searched for results of other tasks, of which a context holds none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the stage."""
        if "run" in kwargs:
            kwargs["run"] = quote(kwargs["run"])
        return super().__call__(*args, **kwargs)


def stage(
    *,
    returns: type,
    timeout_seconds: float | None,
    uses: Collection[str] = (),
    ignores: Collection[str] = (),
    reads: Callable[..., Any] | None = None,
    reads_until: Literal["begun", "done"] = "done",
    run_name: str | None = None,
    machine: Literal["", "shared", "whole"] = "",
) -> Callable[[Callable[Parameters, Result]], Task[Parameters, Result]]:
    """Returns a decorator that makes a cached Prefect task of a function with a parameter `run`, its context.

    Args:
        returns: the record's type.
        uses: what the stage reads of the run, as dotted paths such as `config.calibration.bins`. It can read nothing
            else.
        ignores: arguments, and paths into the run, that the stage may read and that do not change its result.
        timeout_seconds: limit of one attempt; None for mapped stages, which run in worker threads: Prefect cannot
            interrupt those and would warn on every run.
        reads: given the other arguments by name, what the stage reads from outside the store (a digest), so that
            a change out there is seen.
        reads_until: when that is read. A stage that reads to its end fails where it was changed meanwhile; one that
            reads as it begins, and may take hours from then on, is not asked again.
        run_name: Prefect's template for the name of the task run.
        machine: what the stage needs of this machine: nothing to speak of, cores that others may share, or all of it
            to itself, as a benchmark does.
    """

    def decorate(function: Callable[Parameters, Result]) -> Task[Parameters, Result]:
        name = function.__name__
        signature = inspect.signature(function)
        declared = frozenset({*uses, *ignores})

        @wraps(function)
        def body(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            run: StageContext = bound.arguments["run"]
            store = run.store
            inputs = {key: value for key, value in bound.arguments.items() if key not in ("run", *ignores)}
            used = {path: value_of(run, path) for path in uses}
            bound.arguments["run"] = ContextView(run, declared, stage=name)
            outside = _outside(reads, bound.arguments)
            code = code_of_stage(function)
            made_by = {"code": code.sha256, "libraries": library_versions(code.libraries)}
            key = stage_key(name, {"arguments": inputs, "uses": used, "outside": outside, **made_by})
            entry = store.read_stage(name, key)
            if entry is not None:
                store.note_stage(run.run_id, entry, cached=True)
                announce_finished(name, seconds=entry.seconds, cached=True)
                _show_as_cached()
                return record_from_json(returns, entry.record)
            with _MACHINE[machine]():
                started = time.monotonic()
                made = function(*bound.args, **bound.kwargs)
            if reads_until == "done" and _outside(reads, bound.arguments) != outside:
                raise ArtifactError(
                    f"What {name} reads was replaced while it read it, so its result is of neither version and was not "
                    "kept. Expected checkpoint and images that nobody writes to. Run again."
                )
            entry = StageEntry(
                name, key, to_jsonable(made), round(time.monotonic() - started, 3), round(time.time(), 3)
            )
            store.write_stage(entry)
            store.note_stage(run.run_id, entry, cached=False)
            announce_finished(name, seconds=entry.seconds, cached=False)
            return made

        body.declared = declared  # type: ignore[attr-defined]
        wrapped: Any = _Stage(
            body,
            name=name,
            task_run_name=run_name,
            cache_policy=NO_CACHE,
            persist_result=False,
            timeout_seconds=timeout_seconds,
            log_prints=False,
        )
        return cast(Task[Parameters, Result], wrapped)

    return decorate


def _outside(reads: Callable[..., Any] | None, arguments: Mapping[str, Any]) -> Any:
    """The digest of what a stage reads from outside the store, None where it reads nothing."""
    if reads is None:
        return None
    return reads(**{key: arguments[key] for key in inspect.signature(reads).parameters})


def _show_as_cached() -> None:
    """Gives the running task the final state Cached: Prefect does so where the task's transaction is committed."""
    transaction = get_transaction()
    if transaction is not None:
        transaction.state = TransactionState.COMMITTED
