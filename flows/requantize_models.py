"""Every model kept up to date, night after night: what the schedule starts."""

from typing import Any

from prefect import flow
from prefect.states import Completed, Failed, State

from flows.quantize_model import quantize_model
from tasks.service.models import find_models, load_model_config
from tasks.service.nightly import failure_of, keep_nightly_result
from tasks.service.notices import announce


@flow(name="requantize-models")
def requantize_models(
    models: str = "deployments/models",
    names: list[str] = [],  # noqa: B006 - the form in the UI shows the default of a list
    notify: list[str] = [],  # noqa: B006
) -> State[None]:
    """Quantize every model again, each with its own config, and publish those that are good enough.

    For each model: 1. read its config   2. quantize, compare with the version in service, publish   3. tell
    4. note the night. A model that fails keeps no other from being done.

    Args:
        models: folder with one config a model.
        names: the models to do, by the names of their configs; empty: all of them.
        notify: Prefect notification blocks that are told of a rejected model, such as slack-webhook/operations.
    """
    found = find_models(models, names)
    failures = [failure for name in found if (failure := _requantize(models, name, notify))]
    if failures:
        return Failed(message=f"{len(failures)} of {len(found)} models failed. {' '.join(failures)}")
    return Completed(message=f"{len(found)} models done: {', '.join(found)}.")


def _requantize(models: str, name: str, notify: list[str]) -> str:
    """Quantize one model and note the night; returns what failed, empty if nothing did."""
    loaded = load_model_config(models, name, return_state=True)
    if not loaded.is_completed():
        return f"{name}: {failure_of(loaded)}"
    config = loaded.result()
    run = quantize_model(config, return_state=True)
    result = run.result() if run.is_completed() else None
    states: list[State[Any]] = [run]
    if result is not None:
        states.append(announce(result, notify, return_state=True))
    run_id = run.state_details.flow_run_id
    states.append(keep_nightly_result(config, run_id, result, error=failure_of(run), return_state=True))
    failures = [failure for state in states if (failure := failure_of(state))]
    return f"{name}: {'; '.join(failures)}" if failures else ""
