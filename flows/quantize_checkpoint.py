"""A new checkpoint in, its model kept up to date: what an event starts."""

from prefect import flow
from prefect.states import Completed, State

from flows.quantize_model import quantize_model
from ptq.records.decision import RunResult
from tasks.service.model_lock import model_lock
from tasks.service.models import is_superseded, load_model_config
from tasks.service.notices import announce


@flow(name="quantize-checkpoint", flow_run_name="{model}")
def quantize_checkpoint(
    uri: str,
    model: str,
    sha256: str = "",
    models: str = "deployments/models",
    notify: list[str] = [],  # noqa: B006 - the form in the UI shows the default of a list
) -> State[RunResult]:
    """Quantize the checkpoint that an event names with its model's own config, and publish it if it is good enough.

    1. read the model's config   2. wait for the model's turn   3. nothing, where the checkpoint was replaced since
    4. quantize, compare with the version in service, publish   5. tell

    Args:
        uri: the checkpoint, a path or s3://bucket/key.
        model: name of the model, which has a config of that name.
        sha256: digest of the checkpoint when it was found; empty: whatever is there now.
        models: folder with one config a model.
        notify: Prefect notification blocks that are told of a rejected model, such as slack-webhook/operations.
    """
    config = load_model_config(models, model, checkpoint=uri)
    with model_lock(config.model.published_name, config.output.store):
        if is_superseded(config, sha256):
            return Completed(name="Superseded", message=f"{uri} was replaced since; an event of its own tells of it.")
        result = quantize_model(config)
    announce(result, notify)
    return Completed(name="Published" if result.accepted else "Rejected", message=result.sentence, data=result)
