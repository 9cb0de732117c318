"""The commands that work on a store: history, restore, gc."""

import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from flows.cli_options import Json, PublishedModel, StoreUri
from flows.cli_output import new_console, print_json, show_tables
from ptq.config import DEFAULT_STORE


def history(model: PublishedModel, store: StoreUri = DEFAULT_STORE, as_json: Json = False) -> None:
    """List the published versions of a model, oldest first, and what made each of them."""
    from ptq.report.terminal import tables_of_history
    from ptq.storage.registry import existing_store, read_history

    entries = read_history(existing_store(store), model)
    if as_json:
        print_json({"model": model, "versions": entries})
        return
    show_tables(*tables_of_history(model, entries))


def restore(
    model: PublishedModel,
    version: Annotated[str, typer.Argument(help="Version, or the beginning of it.")],
    store: StoreUri = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Publish an earlier version of a model again."""
    from ptq.records.base import to_jsonable
    from ptq.storage.registry import existing_store, restore_version

    found = restore_version(existing_store(store), model, version, now=datetime.now(UTC))
    if as_json:
        print_json(to_jsonable(found))
    elif found.replaced == found.version:
        new_console().print(f"{model} {found.version} is the latest version already.", markup=False)
    else:
        new_console().print(f"Published {model} {found.version} again, replacing {found.replaced}.", markup=False)


def gc(
    store: StoreUri = DEFAULT_STORE,
    keep_days: Annotated[float, typer.Option(help="Days for which the stages of a run are kept.")] = 30.0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove; otherwise only say what would be.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what no published version and no recent run needs; a dry run unless told to delete."""
    from ptq.records.base import to_jsonable
    from ptq.report.terminal import table_of_collection
    from ptq.storage.garbage import collect_garbage
    from ptq.storage.registry import existing_store

    found = collect_garbage(existing_store(store), keep_days=keep_days, now=time.time(), delete=delete)
    if as_json:
        print_json(to_jsonable(found))
        return
    show_tables(table_of_collection(found))
    if found.is_dry_run:
        new_console().print("Nothing was removed. To remove it, run again with --delete.", markup=False)
