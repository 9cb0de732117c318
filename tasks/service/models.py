"""Which models are kept up to date, and is a checkpoint still the newest?"""

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ptq.config import PtqConfig
from ptq.data.remote_inputs import Inputs
from ptq.errors import UsageError
from ptq.service import model_configs
from ptq.storage.store import open_store


@task(timeout_seconds=60, cache_policy=NO_CACHE)
def find_models(models: str, names: Sequence[str]) -> list[str]:
    """List the models that have a config, or those of them that are named."""
    known = model_configs.model_names(Path(models))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"names has {', '.join(unknown)}, which have no config in {models}; there are configs for "
            f"{', '.join(known)}."
        )
    return list(names or known)


@task(timeout_seconds=60, cache_policy=NO_CACHE)
def load_model_config(models: str, model: str, *, checkpoint: str = "") -> PtqConfig:
    """Read the config of a model, with another checkpoint where one is given."""
    return model_configs.model_config(Path(models), model, checkpoint=checkpoint)


@task(timeout_seconds=3600, cache_policy=NO_CACHE)
def is_superseded(config: PtqConfig, sha256: str) -> bool:
    """Whether the checkpoint was replaced since the event that told of it; another event tells of the new one."""
    if not sha256:
        return False
    found = Inputs(open_store(config.output.store)).any_checkpoint_digest(config.model.checkpoint)
    if found != sha256:
        get_run_logger().warning(
            "%s now has the SHA-256 %s, not %s as when it was found: it was replaced since, and an event of its own "
            "tells of the new one",
            config.model.checkpoint,
            found[:12],
            sha256[:12],
        )
    return found != sha256
